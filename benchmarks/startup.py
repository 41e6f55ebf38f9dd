"""Seconds of the commands that answer on a login node, warm: `python benchmarks/startup.py`.

Each command runs once unmeasured and then `--runs` times; the median is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

DSTUNE = str(Path(sys.executable).with_name("dstune"))
COMMANDS = {
    "python -c pass (floor)": [sys.executable, "-c", "pass"],
    "dstune --help": [DSTUNE, "--help"],
    "dstune train --help": [DSTUNE, "train", "--help"],
    "dstune train --cfg job": [DSTUNE, "train", "--cfg", "job"],
    "dstune train with a wrong key": [DSTUNE, "train", "optimizer.learning_rate=1"],
    "python -c 'import torch' (for comparison)": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, hydra-core {version('hydra-core')}, medians of {options.runs} runs")
    print("| command | median s | min s | max s |\n|---|---|---|---|")
    for name, command in COMMANDS.items():
        seconds(command)
        times = [seconds(command) for _ in range(options.runs)]
        print(f"| `{name}` | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
