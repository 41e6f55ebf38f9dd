"""dstune beside three rivals on SmolLM2-135M: 8 cells of method, trained tokens and ZeRO stage. Resumable.

    python benchmarks/compare.py                                      # all cells into runs/compare.json, about 40 minutes
    python benchmarks/compare.py --cells full-all-zero2 --rounds 2
    python benchmarks/compare.py --report                             # the table of what is there
    python benchmarks/compare.py --report --table                     # one line a cell, as in the documents

A cell is full or lora, on all tokens or on the assistant's alone, at ZeRO-2 or 3. The rivals are a hand-written DeepSpeed
loop (`handwritten.py`), TRL's SFTTrainer on DeepSpeed and the `transformers` Trainer on DeepSpeed (`trainers.py`). All train
the same packed rows of the sample dialogues in the same order, with torch's fused AdamW, PyTorch's attention (sdpa), the same
precision, the same threads a rank and nothing bound to cores. dstune runs as a user runs it, with data path, logging and checks.

A run that is in the results file is not run again; delete the file, or name another, to measure anew. The first two steps of
a run are not timed. A ratio compares runs of one round; medians are over rounds, or over steps where there is one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contenders import Failed, Job, Measured, run_dstune, run_script, write_tensors

from dstune import samples

SIDES = ("dstune", "deepspeed", "trl", "transformers")
NAMES = {
    "dstune": "dstune",
    "deepspeed": "hand-written DeepSpeed",
    "trl": "TRL + DeepSpeed",
    "transformers": "transformers Trainer + DeepSpeed",
}
CELLS = {
    f"{method}-{targets}-zero{stage}": Job(method=method, targets=targets, stage=stage)
    for stage in (2, 3)
    for method in ("full", "lora")
    for targets in ("all", "assistant")
}
UNTIMED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="of a run, the first two not timed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a rank in a step")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("runs/compare.json"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--table", action="store_true", help="one line a cell instead of one a side")
    options = parser.parse_args()
    if options.steps <= UNTIMED:
        parser.error(f"--steps={options.steps}: the first {UNTIMED} steps are not timed, so give more")
    shape = {name: getattr(options, name) for name in ("steps", "precision", "length", "rows", "ranks")}
    results = read(options.results) or {"settings": shape, "runs": {}}
    if results["settings"] != shape and not options.report:
        parser.error(f"{options.results} has runs of {results['settings']}, not of {shape}: give another --results")
    if not options.report:
        measure(options, results)
    (table if options.table else report)(results)


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def measure(options: argparse.Namespace, results: dict[str, Any]) -> None:
    samples.resolve("sample://smollm2")
    samples.resolve("sample://chitchat")
    for cell in options.cells:
        job = replace(CELLS[cell], **results["settings"])
        # Whoever goes later finds a warmer machine: the order turns from round to round.
        waiting = [
            (number, side)
            for number in range(options.rounds)
            for side in _turned(options.sides, number)
            if key(cell, number, side) not in results["runs"]
        ]
        if not waiting:
            continue
        with tempfile.TemporaryDirectory(prefix="dstune-compare-") as scratch:
            tensors = Path(scratch) / "tensors.pt"
            tokens = write_tensors(job, tensors)
            for number, side in waiting:
                try:
                    measured = asdict(run(side, job, tensors, Path(scratch))) | {"tokens": tokens}
                except Failed as error:
                    print(f"{key(cell, number, side)}: failed\n{error}", flush=True)
                    continue
                results["runs"][key(cell, number, side)] = measured
                write(options.results, results)
                speed_fields = {name: value for name, value in measured.items() if name != "tokens"}
                print(
                    f"{key(cell, number, side)}: {speed(measured):.1f} tokens/s {json.dumps(speed_fields)}", flush=True
                )


def _turned(sides: list[str], number: int) -> list[str]:
    start = number % len(sides)
    return sides[start:] + sides[:start]


def key(cell: str, number: int, side: str) -> str:
    return f"{cell}/{number}/{side}"


def run(side: str, job: Job, tensors: Path, folder: Path) -> Measured:
    match side:
        case "dstune":
            return run_dstune(job, folder)
        case "deepspeed":
            return run_script("handwritten.py", [], job, tensors, folder)
        case _:
            return run_script("trainers.py", [side], job, tensors, folder)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(path)


def speed(run: dict[str, Any]) -> float:
    """Return tokens a second of all ranks, padding left out, by the median of the timed steps."""
    rates = [count / seconds for count, seconds in zip(run["tokens"], run["seconds"], strict=True)]
    return statistics.median(rates[UNTIMED:])


def report(results: dict[str, Any]) -> None:
    shape = results["settings"]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "trl", "peft"))
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}; SmolLM2-135M, "
        f"{shape['precision']}, {shape['ranks']} ranks, {shape['rows']} x {shape['length']} packed tokens a rank and step"
    )
    print(
        "| cell | side | tokens/s | dstune is x faster | peak GiB a rank | to the first step, s | loss at the end | rounds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell in CELLS:
        for side in SIDES:
            side_runs = rounds(results, cell, side)
            if not side_runs:
                continue
            dstune_runs = rounds(results, cell, "dstune")
            ratios = [
                speed(dstune_runs[number]) / speed(rival_run)
                for number, rival_run in side_runs.items()
                if number in dstune_runs
            ]

            def median(name: str, runs: dict[int, dict[str, Any]] = side_runs) -> float:
                return statistics.median(run[name] for run in runs.values())

            ratio = f"{statistics.median(ratios):.3f}" if ratios and side != "dstune" else ""
            loss = statistics.median(run["losses"][-1] for run in side_runs.values())
            print(
                f"| {cell} | {NAMES[side]} | {statistics.median(map(speed, side_runs.values())):.1f} | {ratio} | "
                f"{median('peak_memory_gib'):.2f} | {median('first_step_seconds'):.1f} | {loss:.4f} | {len(side_runs)} |"
            )


def table(results: dict[str, Any]) -> None:
    """Print a line for each cell: how many times as fast dstune is as each rival, and what all sides take."""
    print(
        "| cell | tokens/s | x DeepSpeed | x TRL | x Trainer | peak GiB a rank | to the first step, s | loss at the end |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell, job in CELLS.items():
        runs_by_side = {side: rounds(results, cell, side) for side in SIDES}
        if not all(runs_by_side.values()):
            continue
        dstune_runs = runs_by_side["dstune"]
        ratios = [
            statistics.median(
                speed(dstune_runs[number]) / speed(run)
                for number, run in runs_by_side[side].items()
                if number in dstune_runs
            )
            for side in SIDES[1:]
        ]
        columns = [
            " / ".join(
                f"{statistics.median(value(run) for run in runs_by_side[side].values()):{form}}" for side in SIDES
            )
            for value, form in (
                (lambda run: run["peak_memory_gib"], ".2f"),
                (lambda run: run["first_step_seconds"], ".0f"),
                (lambda run: run["losses"][-1], ".3f"),
            )
        ]
        method = "LoRA" if job.method == "lora" else job.method
        targets = "the assistant's" if job.targets == "assistant" else "all tokens"
        tokens = statistics.median(map(speed, dstune_runs.values()))
        cells = " | ".join([f"{tokens:.0f}", *(f"{ratio:.2f}" for ratio in ratios), *columns])
        print(f"| {method}, {targets}, ZeRO-{job.stage} | {cells} |")


def rounds(results: dict[str, Any], cell: str, side: str) -> dict[int, dict[str, Any]]:
    """Return the runs of a side in a cell, by round."""
    run_by_round = {
        name.split("/")[1]: run for name, run in results["runs"].items() if name.split("/")[::2] == [cell, side]
    }
    return {int(number): run for number, run in run_by_round.items()}


if __name__ == "__main__":
    main()
