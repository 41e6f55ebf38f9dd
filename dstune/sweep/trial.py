"""Starts a trial: `python -m dstune.sweep.trial SWEEP_PID CORES ARGUMENT...` becomes `dstune train ARGUMENT...`.

CORES are the CPU cores that the trial may use (`0,1`, or `all`). If the sweep dies, however it dies, the kernel sends the trial
SIGTERM, so that it saves and stops.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str]) -> NoReturn:
    sweep_pid, cores, *arguments = argv
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h; outlives the exec below
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(sweep_pid):  # the sweep died before the call above
            sys.exit(1)
    if cores != "all":
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    os.execv(sys.executable, [sys.executable, "-m", "dstune", "train", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
