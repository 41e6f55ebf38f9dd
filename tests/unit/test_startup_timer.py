"""Where the time to the first step goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from dstune.core.rank_env import LAUNCHER_PID
from dstune.trainer.callbacks.startup_timer import StartupTimer

PROGRAM = """
import json, os, time
from dstune.trainer.callbacks.startup_timer import StartupTimer
timer = StartupTimer(os.environ)
time.sleep(0.2)
timer.mark("a")
timer.mark("b")
time.sleep(0.1)
timer.end("a")
time.sleep(0.1)
timer.mark("c")
print(json.dumps(timer.seconds))
"""


def test_the_parts_add_up_to_the_time_since_the_command() -> None:
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {LAUNCHER_PID: str(os.getpid())},
        capture_output=True,
        text=True,
        check=True,
    )
    taken = time.monotonic() - before
    seconds = json.loads(done.stdout)
    assert list(seconds) == ["command", "imports", "a", "b"]
    assert seconds["a"] == pytest.approx(0.3, abs=0.1) and seconds["b"] < 0.1
    assert seconds["imports"] + seconds["a"] + seconds["b"] == pytest.approx(taken, abs=0.4)
    with open("/proc/uptime") as uptime, open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        own_age = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    assert seconds["command"] == pytest.approx(own_age - taken, abs=0.3)


@pytest.mark.parametrize("launcher", ["", "not a number", "999999999"])
def test_without_a_command_it_begins_with_the_process(launcher: str) -> None:
    assert list(StartupTimer({LAUNCHER_PID: launcher}).seconds) == ["imports"]
    assert StartupTimer().seconds == {}
