#!/usr/bin/env python3
"""How the memory of this machine changes while a judged program tries to hold memory outside of its limit.

usage: python benchmarks/judged_memory.py

Each program of `tests/security/test_judged_programs.py` runs in the sandbox and keeps what it got for two seconds. Meanwhile,
/proc/meminfo is read every 10 ms. What counts is all memory that is neither free, nor of files, nor of processes: shared memory
(memfd, System V, POSIX, tmpfs) and the kernel's own. The buffers of sockets and pipes have no line of their own there, so that
they are what the other lines leave. Other processes of the machine change these numbers too, so the smallest growth of three runs
counts, and a program that only sleeps is the control. Exit code 1: more than 64 MiB above the control.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from dstune.grading import sandbox
from tests.security.test_judged_programs import HOLDERS, LIMITS, OF_THE_KERNEL, START

KEPT_SECONDS = 2
RUNS = 3
MOST_MIB = 64
OTHERS = ("MemFree", "Buffers", "Cached", "SwapCached", "SReclaimable", "AnonPages")


def held_mib() -> float:
    """Return the machine's memory that is shared or the kernel's own, in MiB. `Cached` includes what is shared."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name: int(value.split()[0]) for name, value in lines.items()}
    return (kib["MemTotal"] + kib["Shmem"] - sum(kib[field] for field in OTHERS)) / 1024


def growth(source: str) -> tuple[float, str]:
    """Return by how many MiB the machine's memory grows at most while a program runs, and what the program printed."""
    outcomes: list[sandbox.Outcome] = []
    start = START.replace("    os._exit(0)", f"    import time; time.sleep({KEPT_SECONDS}); os._exit(0)")
    program = threading.Thread(target=lambda: outcomes.append(sandbox.run_program(start + source, "", LIMITS)))
    before = most = held_mib()
    program.start()
    while program.is_alive():
        most = max(most, held_mib())
        time.sleep(0.01)
    return most - before, outcomes[0].failure or f"{outcomes[0].output.strip()} MiB"


def smallest_growth(source: str) -> tuple[float, str]:
    return min(growth(source) for _ in range(RUNS))


def main() -> int:
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}\n"
    )
    control = smallest_growth("report()")[0]
    print("| program | the machine's memory grows by, MiB | the program says that it holds |\n| --- | --- | --- |")
    print(f"| sleeps | {control:.0f} | |", flush=True)
    worst = 0.0
    for name, source in (HOLDERS | OF_THE_KERNEL).items():
        mib, says = smallest_growth(source)
        worst = max(worst, mib)
        print(f"| {name} | {mib:.0f} | {says} |", flush=True)
    return int(worst > control + MOST_MIB)


if __name__ == "__main__":
    sys.exit(main())
