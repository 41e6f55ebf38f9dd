"""Becomes the launching process of a trial: `python -m dstune.sweep.trial SWEEP_PID CORES ARGUMENT...` is
`dstune train ARGUMENT...` on these cores (`0,1`, or `all`), asked to save and stop when the sweep dies, however it dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str]) -> NoReturn:
    sweep, cores, *arguments = argv
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h; outlives the exec below
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(sweep):  # it died before the call above
            sys.exit(1)
    if cores != "all":
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    os.execv(sys.executable, [sys.executable, "-m", "dstune", "train", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
