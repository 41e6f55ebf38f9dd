"""Every method on the same rows: accuracy, trained share, time and memory.

    python benchmarks/methods.py [METHOD ...]

MiniLM, 4,000 film reviews, 2,000 held out by a fixed split (`experiment=sentiment`, for ulmfit `sentiment_ulmfit`), on two ranks
at ZeRO-2 through the command line, once for each method with settings of its own. Results are kept in
benchmarks/methods.json, from which `python tools/guides.py` makes the measured rows of docs/methods.md.

Seconds are those of the training command: start, scoring or features, training, one evaluation at the end, export. Other work on
the machine is in them. For `features` the cache is emptied first, and the time of the first epoch, in which the body reads
every row, is compared with that of the later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from dstune.core.paths import cache_root

RESULTS = Path(__file__).with_suffix(".json")
METHODS = {
    "head": ["method=head", "method.pooling=mean", "optimizer.lr=1e-2"],
    "features": [
        "method=features",
        "trainer.epochs=10",
        "optimizer.lr=1e-2",
        "method.logistic_regression=true",
        "method.random_forest=true",
    ],
    "ulmfit": ["experiment=sentiment_ulmfit"],
    "importance": ["method=importance", "method.share=0.1", "optimizer.lr=3e-4"],
    "lora": ["method=lora", "optimizer.lr=1e-3"],
    "full": ["method=full"],
}
COMMON = ["zero=stage2", "launch.processes=2", "evaluate.at_start=false", "trainer.precision=fp32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="some of them only; the rows of the others stay as they are")
    chosen = parser.parse_args().methods or list(METHODS)
    if unknown := set(chosen) - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    for name in chosen:
        row = measure(name)
        print(json.dumps(row, indent=1), flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
        packages = {package: version(package) for package in ("torch", "deepspeed", "transformers", "peft")}
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        results |= {"machine": machine, "packages": packages, "rows": {**results["rows"], name: row}}
        results["rows"] = {method: results["rows"][method] for method in METHODS if method in results["rows"]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table(json.loads(RESULTS.read_text()))


def measure(name: str) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    overrides = [*METHODS[name], *COMMON]
    if not overrides[0].startswith("experiment="):
        overrides = ["experiment=sentiment", *overrides]
    if name == "features":
        shutil.rmtree(cache_root() / "features", ignore_errors=True)
    try:
        began = time.perf_counter()
        command = [sys.executable, "-m", "dstune", "train", *overrides, f"run.dir={folder / 'run'}"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        result, environment = (
            json.loads((folder / "run" / f"{file}.json").read_text()) for file in ("result", "environment")
        )
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    steps = [row for row in rows if "step_seconds" in row]
    epochs: dict[int, float] = {}
    for row in steps:
        epoch = -int(-row["epoch"] // 1)  # 1 for the steps of the first one
        epochs[epoch] = epochs.get(epoch, 0.0) + row["step_seconds"]
    model = environment["model"]
    found: dict[str, object] = {
        "command": f"dstune train {' '.join(overrides)}",
        "accuracy": round(result["eval_final"]["accuracy"], 4),
        "held_out": int(result["eval_final"]["targets"]),
        "trained_share": model["trained"] / model["parameters"],
        "seconds": round(seconds, 1),
        "peak_memory_gib": result["peak_memory_gib"],
        "epoch_seconds": [round(epochs[number], 2) for number in sorted(epochs)],
    }
    if name == "features":
        # The first epoch is the one in which the body runs; what it gave is used by all of them.
        first = result["feature_seconds"] + epochs[1]
        later = sum(epochs[number] for number in epochs if number > 1) / (len(epochs) - 1)
        found |= {"first_epoch_seconds": round(first, 2), "later_epoch_seconds": round(later, 2)}
        for classifier, metrics in result["classifiers"].items():
            found[classifier] = round(metrics["validation"]["accuracy"], 4)
    return found


def table(results: dict) -> None:
    print(f"\n{results['machine']}; {', '.join(f'{name} {number}' for name, number in results['packages'].items())}")
    print("| method | accuracy | trained | seconds | peak GiB a rank |\n|---|---|---|---|---|")
    for name, row in results["rows"].items():
        print(
            f"| {name} | {row['accuracy']:.4f} | {row['trained_share']:.2%} | {row['seconds']:.0f} "
            f"| {row['peak_memory_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
