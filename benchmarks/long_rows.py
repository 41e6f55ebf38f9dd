"""Memory and speed of long rows that ranks share (`parallel=ulysses`) beside rows of their own: the same rows and steps.

    python benchmarks/long_rows.py                          # SmolLM2-135M, three ranks, rows of 4,096 tokens
    python benchmarks/long_rows.py --length 2048 --rounds 2

SmolLM2 has nine attention heads, so three ranks share a row. A step has three rows: each rank computes one of its own, or all
three compute a third of each. ZeRO-3, plain text, packed into full rows. The first two steps of a run are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

WORDS = ("the", "old", "red", "tree", "river", "sees", "finds", "cat", "dog", "house", "under", "over")
WAYS = {"rows of their own": ["parallel=none"], "shared rows": ["parallel=ulysses", "parallel.size=3"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    runs_by_way: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        write_texts(folder / "texts.jsonl", options)
        for number in range(options.rounds):
            for way in WAYS:
                measured_run = measure(way, folder, number, options)
                runs_by_way[way].append(measured_run)
                print(f"round {number + 1}, {way}: {json.dumps(measured_run)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(f"\n{os.cpu_count()} cores; {packages}; {options.precision}, rows of {options.length:,} tokens")
    print("| | peak GiB a rank | tokens/s | loss of the last step |\n| --- | --- | --- | --- |")
    for way, runs in runs_by_way.items():
        peak, speed, loss = (statistics.median(run[key] for run in runs) for key in ("peak", "speed", "loss"))
        print(f"| {way} | {peak:.2f} | {speed:.0f} | {loss:.5f} |")


def write_texts(path: Path, options: argparse.Namespace) -> None:
    """Write texts of two lengths, so that rows hold one sample or several."""
    choose = random.Random(0)
    with path.open("w") as stream:
        for number in range(6 * options.steps):
            words = options.length - 8 if number % 2 else options.length // 3
            stream.write(json.dumps({"text": " ".join(choose.choices(WORDS, k=words))}) + "\n")


def measure(way: str, folder: Path, number: int, options: argparse.Namespace) -> dict[str, float]:
    run_dir = folder / f"{way.replace(' ', '-')}-{number}"
    command = [
        *(sys.executable, "-m", "dstune", "train", "model=smollm2", "task=causal_lm", "zero=stage3"),
        *(f"data.train={folder / 'texts.jsonl'}", "data.split.validation=0", "data.packing=true"),
        *("data.clean.duplicates=keep", f"data.max_length={options.length}", "launch.processes=3"),
        *("trainer.micro_batch_size=1", "trainer.global_batch_size=3", f"trainer.max_steps={options.steps}"),
        *(f"trainer.precision={options.precision}", "run.export=none", "run.force=true", f"run.dir={run_dir}"),
        *WAYS[way],
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"peak": result["peak_memory_gib"], "speed": result["tokens_per_second"], "loss": losses[-1]}


if __name__ == "__main__":
    main()
