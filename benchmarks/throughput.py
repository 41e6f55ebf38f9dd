"""dstune against a hand-written DeepSpeed loop, or against an earlier commit of itself, interleaved in one call.

    python benchmarks/throughput.py                  # SmolLM2, ZeRO-2, 2 ranks, 2 x 512 packed tokens a rank
    python benchmarks/throughput.py --precision bf16 --rounds 3 --methods full lora
    python benchmarks/throughput.py --against OLD    # a checkout of the earlier commit; see two_trees.py

Against the loop: useful tokens/s and peak memory. Both sides train the same packed rows of the sample dialogues with torch's
fused AdamW, all tokens counting in the loss. dstune runs as a user runs it (`dstune train`: data path, logging, checks
included); the rival has its tensors ready in memory. The first two steps of each run are not counted; a run's speed is the
median of the others. What counts is the ratio within a round; its median is reported.

Against OLD: this tree's run and that of OLD stop each other after every `--turn` steps. Reported is the ratio of the two turns
of a pair, a round's median and the mean of the rounds, with its 95% interval: of the speed by the clock, and of the processor
time of a step, which others on the machine change less. Neither run saves on its way: how often a tree does so by default is no
matter of its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from contenders import Job, Measured, run_dstune, run_script, write_tensors
from two_trees import interval, measured

from dstune import samples

UNTIMED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, help="pairs of fresh runs, 3; against OLD 2, an even number")
    parser.add_argument("--steps", type=int, default=5, help="of a run against the loop")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=Job.rows, help="packed rows of a rank in a step")
    parser.add_argument("--model", type=Path, help="against OLD: a folder of weights in place of SmolLM2")
    parser.add_argument("--against", metavar="OLD", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--turns", type=int, default=12, help="against OLD: pairs of turns of a round")
    parser.add_argument("--turn", type=int, default=1, help="against OLD: steps of a turn")
    parser.add_argument("--output", type=Path, help="write the table's numbers to this JSON file")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.against else 3)
    if options.against:
        if options.rounds % 2:
            parser.error("--rounds is even against OLD: each tree starts first in half of them")
        against(options)
        return
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    try:
        report = compare(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(options, report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


def jobs_of(options: argparse.Namespace) -> dict[str, Job]:
    names = ("precision", "stage", "ranks", "length", "rows", "steps")
    return {name: Job(method=name, **{key: getattr(options, key) for key in names}) for name in options.methods}


def against(options: argparse.Namespace) -> None:
    """Print and write what `two_trees.py` measures of each method."""
    for name in ("smollm2", "chitchat"):
        samples.resolve(f"sample://{name}")
    trees = (options.against.resolve(), Path(__file__).resolve().parents[1])
    overrides = ["checkpoint.every=0", *([f"model.path={options.model.resolve()}"] if options.model else [])]
    report: dict[str, list[list[dict[str, list[float]]]]] = {}
    print_conditions(options, f"{options.rounds} x {options.turns} pairs of turns of {options.turn} steps")
    print(
        "| method | tokens/s before | now | ratio (95%) | processor time of a step, ratio (95%) |\n|---|---|---|---|---|"
    )
    for method, job in jobs_of(options).items():
        rounds = measured(trees, job, overrides, options.turns, options.turn, options.rounds)
        report[method] = [
            [{name: [getattr(turn, name) for turn in pair] for name in ("wall", "processor")} for pair in pairs]
            for pairs in rounds
        ]
        tokens = job.rows * job.ranks * job.length
        speeds = [tokens / statistics.median(pair[side].wall for pairs in rounds for pair in pairs) for side in (0, 1)]
        ratios = [interval([[old.wall / new.wall for old, new in pairs] for pairs in rounds])]
        ratios += [interval([[new.processor / old.processor for old, new in pairs] for pairs in rounds])]
        described = " | ".join(f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in ratios)
        print(f"| {method} | {speeds[0]:.1f} | {speeds[1]:.1f} | {described} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    samples.resolve("sample://smollm2")
    samples.resolve("sample://chitchat")
    jobs = jobs_of(options)
    tensors = folder / "tensors.pt"
    tokens = write_tensors(next(iter(jobs.values())), tensors)
    report: dict[str, list[dict[str, dict[str, float]]]] = {method: [] for method in jobs}

    def handwritten(job: Job) -> Measured:
        return run_script("handwritten.py", [], job, tensors, folder)

    def dstune(job: Job) -> Measured:
        return run_dstune(job, folder)

    for number in range(options.rounds):
        for method, job in jobs.items():
            sides = [("handwritten", handwritten), ("dstune", dstune)]
            # Whoever goes second finds a warmer machine: the order changes every round.
            pair: dict[str, dict[str, float]] = {}
            for name, run in sides if number % 2 == 0 else reversed(sides):
                measured = run(job)
                timed = zip(tokens[UNTIMED:], measured.seconds[UNTIMED:], strict=True)
                rate = statistics.median(count / seconds for count, seconds in timed)
                pair[name] = {
                    "tokens_per_second": rate,
                    "peak_memory_gib": measured.peak_memory_gib,
                    "loss": measured.losses[-1],
                }
                step_seconds = ", ".join(f"{seconds:.2f}" for seconds in measured.seconds)
                print(
                    f"round {number + 1} {method:5} {name:12} {rate:8.1f} tokens/s {measured.peak_memory_gib:.2f} GiB, "
                    f"steps of {step_seconds} s",
                    flush=True,
                )
            report[method].append(pair)
    return report


def median(rounds: list[dict[str, dict[str, float]]], side: str, key: str) -> float:
    return statistics.median(pair[side][key] for pair in rounds)


def print_conditions(options: argparse.Namespace, counted: str) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    rows = f"{options.rows} x {options.length} packed tokens a rank"
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}; {options.model or 'SmolLM2-135M'}, "
        f"ZeRO-{options.stage}, {options.precision}, {options.ranks} ranks, {rows}, {counted}"
    )


def print_report(options: argparse.Namespace, report: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    print_conditions(options, f"medians of {options.rounds}")
    print(
        "| method | hand-written tokens/s | dstune tokens/s | ratio | hand-written GiB | dstune GiB |\n|---|---|---|---|---|---|"
    )
    for method, rounds in report.items():
        ratio = statistics.median(
            pair["dstune"]["tokens_per_second"] / pair["handwritten"]["tokens_per_second"] for pair in rounds
        )
        speed = [median(rounds, side, "tokens_per_second") for side in ("handwritten", "dstune")]
        memory = [median(rounds, side, "peak_memory_gib") for side in ("handwritten", "dstune")]
        print(f"| {method} | {speed[0]:.1f} | {speed[1]:.1f} | {ratio:.3f} | {memory[0]:.2f} | {memory[1]:.2f} |")


if __name__ == "__main__":
    main()
