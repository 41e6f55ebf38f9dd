"""What dstune does on one GPU, in parts of at most eight minutes, as a report to send. No internet; partial results are kept.

    make gpu-report PART=1             python benchmarks/gpu_report.py 1 --out gpu-report
    make gpu-report PART=5 GPUS=8      several GPUs: NCCL, stages 1 to 3, Ulysses, tensor parallelism
    make gpu-report PART=6 GPUS=8      gradients, collectives and kernels by dstune-verify, with its certificate

Parts 1 to 3 answer the questions in the order of their value: does it compute rightly, and how fast is LoRA of 8B beside TRL; full
training of 1.5B, its trace, and the plan beside the peak; kernels, recomputation, resume, offloading. Part 4 is the rest.

A case is a process of its own with a limit; what it measured is a line of OUT/part-N.jsonl, and a case that is there already, of
the same versions on the same machine, is not run again. `--output FILE.tar.gz` is written anew after each case. `--simulate`
computes small shapes on the simulated device of the tests: a rehearsal, whose times mean nothing. `benchmarks/gpu_kit.py` brings
what a machine without a network lacks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).with_name("gpu_cases.py")
SECONDS = 440
"""Of a part: eight minutes, less what installing and starting it take."""
PATIENCE = 10
"""A rehearsal, on a CPU and whatever else runs there, may take so many times as long."""

PARTS: dict[int, dict[str, int]] = {
    1: {"imports": 40, "attention": 70, "losses": 90, "lora_8b": 120, "trl_lora_8b": 120},
    2: {"full_1_5b": 75, "handwritten_1_5b": 75, "trl_full_1_5b": 80, "trace": 80, "plan": 110},
    3: {
        "whole_steps": 110,
        "recompute": 70,
        "resume": 70,
        "out_of_memory": 60,
        "half": 40,
        "qlora": 50,
        "offload": 40,
    },
    4: {
        "packed_step": 90,
        "cross_entropy": 60,
        "norms": 40,
        "elementwise": 60,
        "importance": 40,
        "preference": 40,
        "classification": 40,
        "deterministic": 60,
    },
    5: {"nccl": 60, "ranks": 150, "ulysses": 90, "tensor": 90},
    6: {"verify": 430},
}
"""Seconds that each case may take, in the order of their value."""

PACKAGES = ("dstune", "torch", "deepspeed", "transformers", "peft", "trl", "flash-attn", "liger-kernel", "bitsandbytes")


def versions() -> dict[str, str]:
    version_by_name = {}
    for name in PACKAGES:
        try:
            version_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return version_by_name


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Return what figures depend on: one that was measured under others is not that of this report."""
    return {"versions": versions(), "simulated": options.simulate, "gpus": options.gpus, "host": socket.gethostname()}


def unmet_condition(options: argparse.Namespace) -> str:
    """Return why no case of the report can run on this machine; empty if they can.

    Another process looks, since a process that has used a GPU keeps a part of its memory.
    """
    look = "import torch; print(torch.__version__, torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return (
            f"torch cannot be imported by {sys.executable}: {error}\n"
            "    fix: pip install a build of PyTorch for this GPU, then run `make gpu-report` again"
        )
    if options.simulate:
        return ""
    version, count = done.stdout.split()[-2:]
    if int(count) == 0:
        return (
            f"PyTorch {version} finds no GPU here\n"
            "    fix: run it where `nvidia-smi` lists one, with a CUDA build of PyTorch; --simulate rehearses it on a CPU"
        )
    if int(count) < options.gpus:
        return f"PyTorch finds {count} GPUs here, and --gpus is {options.gpus}\n    fix: --gpus {count}"
    return ""


def run_case(name: str, seconds: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the case measured, or why it did not."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(CASES), name, str(folder)]
    command += ["--simulate"] if options.simulate else []
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
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
    result = {"case": name, "seconds": round(time.monotonic() - began, 1), "conditions": conditions(options)}
    measured = folder / "measured.json"
    rows = json.loads(measured.read_text()) if measured.exists() else []
    outcome = "ok" if code == 0 else f"over its {seconds:.0f} s" if code is None else f"exit code {code}"
    if code not in (0, None):
        result["last_lines"] = (folder / "output.log").read_text(errors="replace").splitlines()[-5:]
    return {**result, "outcome": outcome, "rows": rows}


def run_part(part: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    results_file = out / f"part-{part}.jsonl"
    lines = [json.loads(line) for line in results_file.read_text().splitlines()] if results_file.exists() else []
    same_conditions = conditions(options)
    done = {line["case"]: line for line in lines if line["outcome"] == "ok" and line["conditions"] == same_conditions}
    patience = PATIENCE if options.simulate else 1
    deadline = time.monotonic() + patience * SECONDS
    results = []
    for name, seconds in PARTS[part].items():
        if options.only and name not in options.only:
            continue
        seconds_left = deadline - time.monotonic()
        if name in done:
            result = done[name]
        elif seconds_left < 20:
            result = {"case": name, "seconds": 0, "outcome": "not run: the time of the part was over", "rows": []}
        else:
            result = run_case(name, min(patience * seconds, seconds_left), out.resolve(), options)
            with results_file.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            write_archive(options)
        results.append(result)
        print(f"{name}: {result['outcome']}, {result['seconds']} s", flush=True)
    return results


def write_archive(options: argparse.Namespace) -> None:
    """Put the figures and logs so far into `--output`, complete at any moment: the machine may be taken away."""
    if options.output is None:
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(options.output.name + ".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(options.out.rglob("*")):
            if path.is_file() and path.suffix in (".jsonl", ".json", ".md", ".log") and path.stat().st_size < 2**20:
                archive.add(path, path.relative_to(options.out))
    partial.replace(options.output)


def report(part: int, results: list[dict[str, Any]], *, simulate: bool) -> str:
    """Return Markdown to paste: the machine, and a table for each case."""
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
            lines += ["| " + " | ".join(format_cell(row.get(key, "")) for key in keys) + " |" for row in rows]
            lines.append("")
        lines += [f"    {line}" for line in result.get("last_lines", ())]
    return "\n".join(lines) + "\n"


def format_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", type=int, choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--output", type=Path, help="an archive of what was measured, written after each case")
    parser.add_argument("--only", nargs="*", default=[], help="cases of the part")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--gpus", type=int, default=int(os.environ.get("GPUS", "1")))
    options = parser.parse_args()
    if reason := unmet_condition(options):
        print(f"gpu-report: {reason}", file=sys.stderr)
        return 2
    results = run_part(options.part, options)
    text = report(options.part, results, simulate=options.simulate)
    (options.out / f"part-{options.part}.md").write_text(text)
    write_archive(options)
    print(f"\n{text}")
    return 0 if all(result["outcome"] == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
