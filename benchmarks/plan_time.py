"""The planner's step time against the clock, after `dstune plan --calibrate`: random models on two CPU ranks.

    python benchmarks/plan_time.py --results runs/plan_time.json

On a machine that does nothing else: calibration and runs share its cores with whatever runs beside them. A case's time is the
median of its steps without the first two. Resumable: what is in the results, the calibration included, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import plan_accuracy as accuracy

from dstune.config.compose import compose
from dstune.launch.plan import planned
from dstune.planning.hardware import DEVICES, Cluster
from dstune.planning.time import Speed

STEPS = 5
CASES = {
    "llama_stage2": accuracy.Case(accuracy.LLAMA, 2, "bf16", 2, 512),
    "llama_stage3_fp32": accuracy.Case(accuracy.LLAMA, 3, "fp32", 2, 256),
    "llama_lora_stage2": accuracy.Case(accuracy.LLAMA, 2, "bf16", 2, 512, accuracy.LORA),
    "llama_stage2_checkpointing": accuracy.Case(accuracy.LLAMA, 2, "bf16", 1, 1024, (accuracy.CHECKPOINTING,)),
    "qwen3_stage2": accuracy.Case(accuracy.QWEN3, 2, "bf16", 2, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", choices=list(CASES))
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="dstune-benchmark-") as scratch:
        if not options.report:
            measure(results, Path(scratch), options.only or list(CASES))
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(results, indent=1))
        report(results, Path(scratch))


def measure(results: dict, scratch: Path, names: list[str]) -> None:
    env = os.environ | {"DSTUNE_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if "speeds" not in results:
        began = time.perf_counter()
        command = [sys.executable, "-m", "dstune", "plan", "--calibrate", "launch.processes=2", "--json"]
        subprocess.run(command, env=env, check=True, capture_output=True)
        results["calibration_seconds"] = time.perf_counter() - began
        results["speeds"] = json.loads((scratch / "cache" / "calibration-2.json").read_text())["2"]["speeds"]
    results.setdefault("steps", {})
    for name in names:
        if name in results["steps"]:
            continue
        folder = scratch / name
        case = CASES[name]
        accuracy.write_model(folder / "model", case.config)
        accuracy.write_rows(folder / "rows.jsonl", case)
        further = [f"run.dir={folder / 'run'}", f"trainer.max_steps={STEPS}"]
        overrides = case.overrides(folder / "model", folder / "rows.jsonl")
        subprocess.run(
            [sys.executable, "-m", "dstune", "train", *overrides, *further], env=env, check=True, capture_output=True
        )
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
        results["steps"][name] = statistics.median(seconds[2:])
        print(name, seconds, flush=True)


def report(results: dict, scratch: Path) -> None:
    speeds = {int(size): Speed(**numbers) for size, numbers in results["speeds"].items()}
    print(f"calibrated in {results['calibration_seconds']:.0f} s: {json.dumps(results['speeds'])}")
    print("| case | predicted s | measured s | error |\n| --- | --- | --- | --- |")
    for name, seconds in results["steps"].items():
        case = CASES[name]
        folder = scratch / f"{name}-plan"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case.config))
        config = compose(case.overrides(folder, folder / "rows.jsonl")).config
        cluster = Cluster(replace(DEVICES["CPU"], memory_gib=64.0), case.ranks)
        expected = planned(config, cluster, speeds).plan.configured.time.seconds
        print(f"| {name} | {expected:.2f} | {seconds:.2f} | {expected / seconds - 1:+.0%} |")


if __name__ == "__main__":
    main()
