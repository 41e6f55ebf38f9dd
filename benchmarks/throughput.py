"""dstune against a hand-written DeepSpeed loop: useful tokens/s and peak memory, interleaved in one call.

    python benchmarks/throughput.py                  # SmolLM2, ZeRO-2, 2 ranks, 2 x 512 packed tokens a rank
    python benchmarks/throughput.py --precision bf16 --rounds 3 --methods full lora

Both sides train the same packed rows of the sample dialogues with torch's fused AdamW, all tokens counting in the loss.
dstune runs as a user runs it (`dstune train`: data path, logging, checks included); the rival has its tensors ready in
memory. The first two steps of each run are not counted; a run's speed is the median of the others. What counts is the ratio
within a round; its median is reported.
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

from dstune import samples

UNTIMED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, help="write the table's numbers to this JSON file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    try:
        report = compare(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(options, report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    samples.resolve("sample://smollm2")
    samples.resolve("sample://chitchat")
    names = ("precision", "stage", "ranks", "length", "steps")
    jobs = {name: Job(method=name, **{key: getattr(options, key) for key in names}) for name in options.methods}
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
                formatted = ", ".join(f"{seconds:.2f}" for seconds in measured.seconds)
                print(
                    f"round {number + 1} {method:5} {name:12} {rate:8.1f} tokens/s {measured.peak_memory_gib:.2f} GiB, "
                    f"steps of {formatted} s",
                    flush=True,
                )
            report[method].append(pair)
    return report


def median(rounds: list[dict[str, dict[str, float]]], side: str, key: str) -> float:
    return statistics.median(pair[side][key] for pair in rounds)


def print_report(options: argparse.Namespace, report: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}; SmolLM2-135M, "
        f"ZeRO-{options.stage}, {options.precision}, {options.ranks} ranks, {Job.rows} x {options.length} packed tokens a rank, "
        f"medians of {options.rounds}"
    )
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
