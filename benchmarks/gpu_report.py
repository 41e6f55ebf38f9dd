"""What dstune does on one GPU, in four parts of at most nine minutes, as a report to paste. No internet; partial results are kept.

    make gpu-report PART=1             python benchmarks/gpu_report.py 1 --out gpu-report
    make gpu-report PART=5 GPUS=8      several GPUs: NCCL, stages 1 to 3, Ulysses, tensor parallelism

A case is a process of its own with a limit; what it measured is a line of OUT/part-N.jsonl, and a case that is there already, of
the same versions on the same machine, is not run again. `--simulate` computes small shapes on the simulated device of the tests: a
rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).with_name("gpu_cases.py")
SECONDS = 530
"""Of a part: nine minutes, less what starting it takes."""
PATIENCE = 10
"""A rehearsal, on a CPU and whatever else runs there, may take so many times as long."""

PARTS: dict[int, dict[str, int]] = {
    1: {"losses": 120, "attention": 120, "packed_step": 150, "qlora": 100},
    2: {"cross_entropy": 90, "norms": 60, "elementwise": 90, "plan": 120, "out_of_memory": 120},
    3: {
        "importance": 60,
        "preference": 60,
        "classification": 60,
        "half": 60,
        "deterministic": 90,
        "resume": 90,
        "offload": 90,
    },
    4: {"full_1_5b": 110, "lora_8b": 180, "trl_full_1_5b": 110, "trl_lora_8b": 130},
    5: {"nccl": 60, "ranks": 150, "ulysses": 90, "tensor": 90},
}
"""Seconds that each case may take, in the order of their value."""

PACKAGES = ("dstune", "torch", "deepspeed", "transformers", "peft", "trl", "flash-attn", "liger-kernel", "bitsandbytes")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on: one that was measured under others is not that of this report."""
    return {"versions": versions(), "simulated": options.simulate, "gpus": options.gpus, "host": socket.gethostname()}


def run_case(name: str, seconds: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the case measured, or why it did not."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(CASES), name, str(folder)]
    command += ["--simulate"] if options.simulate else []
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "GPUS": str(options.gpus),
    }
    began = time.monotonic()
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    found = {"case": name, "seconds": round(time.monotonic() - began, 1), "conditions": conditions(options)}
    measured = folder / "measured.json"
    rows = json.loads(measured.read_text()) if measured.exists() else []
    outcome = "ok" if code == 0 else f"over its {seconds:.0f} s" if code is None else f"exit code {code}"
    if code not in (0, None):
        found["last_lines"] = (folder / "output.log").read_text(errors="replace").splitlines()[-5:]
    return {**found, "outcome": outcome, "rows": rows}


def run_part(part: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    kept = out / f"part-{part}.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    same = conditions(options)
    known = {line["case"]: line for line in lines if line["outcome"] == "ok" and line["conditions"] == same}
    patience = PATIENCE if options.simulate else 1
    deadline = time.monotonic() + patience * SECONDS
    results = []
    for name, seconds in PARTS[part].items():
        if options.only and name not in options.only:
            continue
        left = deadline - time.monotonic()
        if name in known:
            result = known[name]
        elif left < 20:
            result = {"case": name, "seconds": 0, "outcome": "not run: the time of the part was over", "rows": []}
        else:
            result = run_case(name, min(patience * seconds, left), out.resolve(), options)
            with kept.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
        results.append(result)
        print(f"{name}: {result['outcome']}, {result['seconds']} s", flush=True)
    return results


def report(part: int, results: list[dict[str, Any]], *, simulate: bool) -> str:
    """Markdown to paste: the machine, and a table for each case."""
    machine = next(
        (row["machine"] for result in results for row in result["rows"] if "machine" in row), "unknown device"
    )
    lines = [f"### dstune on a GPU, part {part}: {machine}" + (" (a rehearsal)" if simulate else ""), ""]
    lines += [", ".join(f"{name} {version}" for name, version in versions().items()), ""]
    for result in results:
        lines += [f"**{result['case']}**: {result['outcome']}, {result['seconds']} s", ""]
        rows = [{key: value for key, value in row.items() if key != "machine"} for row in result["rows"]]
        rows = [row for row in rows if row]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if keys:
            lines += [f"| {' | '.join(keys)} |", "| " + " | ".join("---" for _ in keys) + " |"]
            lines += ["| " + " | ".join(formatted(row.get(key, "")) for key in keys) + " |" for row in rows]
            lines.append("")
        lines += [f"    {line}" for line in result.get("last_lines", ())]
    return "\n".join(lines) + "\n"


def formatted(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", type=int, choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--only", nargs="*", default=[], help="cases of the part")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--gpus", type=int, default=int(os.environ.get("GPUS", "1")))
    options = parser.parse_args()
    results = run_part(options.part, options)
    text = report(options.part, results, simulate=options.simulate)
    (options.out / f"part-{options.part}.md").write_text(text)
    print(f"\n{text}")
    return 0 if all(result["outcome"] == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
