"""Eight trials (learning rate x LoRA rank) by three routes: each to its end one after the other, two at a time, and two at a
time with Optuna's ASHA ending those that fall behind.

    python benchmarks/sweep.py [--only one|two|pruned] [--folder FOLDER]

MiniLM on film reviews, a few thousand tokens a trial. One after the other a trial has all cores (two ranks), two at a time
each has half of them (one rank). What is compared is the time of the whole command and the best trial that it found. A route
whose sweep is in FOLDER is taken as it is, so that the three can be measured at different times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

COMMON = (
    "experiment=sentiment",
    "method=lora",
    "run.name=benchmark",
    "data.max_rows=1000",
    "data.max_length=64",
    "trainer.max_steps=24",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=16",
    "evaluate.every=4",
    "evaluate.max_rows=96",
    "evaluate.at_start=false",
    "run.export=none",
    "optimizer.lr=1e-5,1e-4,1e-3,1e-2",
    "method.rank=4,16",
)
ROUTES = {
    "one": ("launch.processes=2",),
    "two": ("launch.processes=1", "sweep.parallel=2"),
    "pruned": (
        *("launch.processes=1", "sweep.parallel=2", "hydra/sweeper=optuna", "sweep.sampler=grid"),
        *("sweep.pruner=asha", "sweep.reduction_factor=2"),
    ),
}
TITLES = {
    "one": "one after the other, each to its end",
    "two": "two at a time, each to its end",
    "pruned": "two at a time, Optuna with ASHA",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROUTES, help="measure this route alone")
    parser.add_argument("--folder", type=Path, help="where the sweeps are kept (a temporary folder when not given)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    for route in ROUTES:
        if options.only in (None, route) and not (folder / f"{route}.json").exists():
            measure(route, folder)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "optuna"))
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}")
    print("| route | seconds | steps trained | ended early | best loss | best trial |\n|---|---|---|---|---|---|")
    for route in ROUTES:
        if (folder / f"{route}.json").exists():
            summary = json.loads((folder / f"{route}.json").read_text())
            print(
                f"| {TITLES[route]} | {summary['seconds']:.0f} | {summary['steps']} | {summary['pruned']} | {summary['loss']:.4f} "
                f"| {summary['best']} |"
            )


def measure(route: str, folder: Path) -> None:
    sweep = folder / route
    command = [sys.executable, "-m", "dstune", "train", "--multirun", *COMMON, *ROUTES[route], f"sweep.dir={sweep}"]
    began = time.perf_counter()
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    result = json.loads(done.stdout)
    steps = [json.loads((Path(trial["run"]) / "result.json").read_text())["steps"] for trial in result["trials"]]
    summary = {
        "seconds": seconds,
        "steps": sum(steps),
        "pruned": sum(trial["status"] == "pruned" for trial in result["trials"]),
        "loss": result["best"]["objective"]["loss"],
        "best": ", ".join(f"{key}={value:g}" for key, value in result["best"]["values"].items()),
    }
    (folder / f"{route}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
