"""Where optimizer states are: memory and speed on CPU ranks, of the same steps on the same rows.

    python benchmarks/offloading.py
    python benchmarks/offloading.py --rounds 3 --disk /a/local/disk

SmolLM2-135M, all weights in fp32, two ranks at ZeRO-3, full rows of 256 tokens; the choices are interleaved, and the first
two steps of a run are not timed. On a CPU the states that `offload_optimizer=cpu` moves stay in the same memory; those on a
disk leave it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHOICES = {
    "in memory": ["zero=stage3"],
    "zero=stage3_offload": ["zero=stage3_offload"],
    "zero=stage3_nvme": ["zero=stage3_nvme"],
}


def train(folder: Path, name: str, overrides: list[str], steps: int) -> dict[str, float]:
    """Return peak memory of a rank in GiB, the median seconds of a step and its last loss."""
    run = folder / name.rpartition("=")[2].replace(" ", "-")
    command = [
        *(sys.executable, "-m", "dstune", "train", "model=smollm2", "data=chitchat", "data.max_length=256"),
        *("launch.processes=2", "trainer.precision=fp32", "trainer.micro_batch_size=1", "trainer.global_batch_size=4"),
        *(f"trainer.max_steps={steps}", "evaluate.at_start=false", "data.split.validation=0", "run.export=none"),
        *(f"run.dir={run}", *overrides),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {
        "gib": json.loads((run / "result.json").read_text())["peak_memory_gib"],  # the save at the end is in it
        "seconds": statistics.median(row["step_seconds"] for row in rows[2:]),
        "update": statistics.median(row["update_seconds"] for row in rows[2:]),
        "loss": rows[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--disk", default="/var/tmp", help="folder for the states on a disk")
    arguments = parser.parse_args()
    rows_by_choice: dict[str, list[dict[str, float]]] = {name: [] for name in CHOICES}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, overrides in CHOICES.items():
                further = [f"zero.nvme_path={arguments.disk}"] if "nvme" in name else []
                rows_by_choice[name].append(train(Path(folder), name, [*overrides, *further], arguments.steps))
                print(f"{name}: {rows_by_choice[name][-1]}", flush=True)
    print(f"\n{'optimizer states':22}{'peak GiB a rank':>16}{'s a step':>10}{'of it update':>14}  last loss")
    for name, rows in rows_by_choice.items():
        gib, seconds, update = (statistics.median(row[key] for row in rows) for key in ("gib", "seconds", "update"))
        last = ", ".join(sorted({f"{row['loss']:.6f}" for row in rows}))
        print(f"{name:22}{gib:16.2f}{seconds:10.2f}{update:14.2f}  {last}")


if __name__ == "__main__":
    main()
