"""What a whole step of `dstune train` costs beside its forward and backward passes alone.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 3 --steps 4

SmolLM2-135M, all weights, bf16, two ranks, 8 micro-batches of 2 x 512 packed tokens a rank, all tokens trained. The other side
(`bare.py`) is two processes at once that compute their passes and nothing else: no DeepSpeed, no optimizer, no communication. They
compute them as transformers does, with a plain loss (`plain`), or as dstune does (`own`). dstune runs with gradients of every
rank whole (ZeRO-1) and partitioned (ZeRO-2), as a user runs it. The first two steps of a run are not timed; a ratio compares
runs of one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from contenders import Job, run_dstune, run_script, write_tensors

from dstune import samples

MICRO_BATCHES = 8
UNTIMED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--passes", choices=["plain", "own"], nargs="+", default=["plain", "own"], help="of the bare side"
    )
    options = parser.parse_args()
    samples.resolve("sample://smollm2")
    samples.resolve("sample://chitchat")
    job = Job(precision=options.precision, steps=options.steps)
    bare = {f"bare, {passes}": passes for passes in options.passes}
    stages = {f"dstune, ZeRO-{stage}": stage for stage in options.stages}
    sides = [*bare, *stages]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = folder / "tensors.pt"
        write_tensors(replace(job, steps=MICRO_BATCHES), tensors)
        settings = {"micro_batches": MICRO_BATCHES}
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                if side in bare:
                    measured = run_script("bare.py", [], job, tensors, folder, settings | {"passes": bare[side]})
                else:
                    staged = replace(job, stage=stages[side])
                    window = f"trainer.global_batch_size={job.rows * job.ranks * MICRO_BATCHES}"
                    measured = run_dstune(staged, folder, (window, "checkpoint.weights_only=true"))
                seconds[side].append(statistics.median(measured.seconds[UNTIMED:]))
                print(f"round {number + 1}  {side:18} {seconds[side][-1]:7.2f} s a step", flush=True)
    print(f"\n| dstune | s a step | {' | '.join(f'of {name}' for name in bare)} |\n|{' --- |' * (2 + len(bare))}")
    for side in stages:
        ratios = []
        for other in bare:
            each = [
                side_seconds / other_seconds
                for side_seconds, other_seconds in zip(seconds[side], seconds[other], strict=True)
            ]
            ratios.append(f"{statistics.median(each):.3f} ({', '.join(f'{ratio:.3f}' for ratio in each)})")
        print(f"| {side.removeprefix('dstune, ')} | {statistics.median(seconds[side]):.2f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
