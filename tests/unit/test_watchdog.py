"""A rank that makes no progress ends, in what has no steps after ten times as long; real processes, since it ends its own."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

PROGRAM = """
import time
from dstune.trainer.callbacks.watchdog import Watchdog

watchdog = Watchdog(0.3, rank=1, report=lambda error: print(f"reported: {error}", flush=True))
time.sleep(1.0)  # before the first step it does not watch
watchdog.on_progress("step 1")
"""


def ended(body: str) -> tuple[int, str, float]:
    """Exit code, what was reported, and seconds until it was."""
    command = [sys.executable, "-c", PROGRAM + body]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, time.monotonic() - began


def test_a_step_that_hangs_is_ended():
    code, reported, _ = ended("time.sleep(50)")
    assert code == 1
    assert reported.startswith("reported: rank 1 made no progress for 0.3 s (trainer.stall_seconds) in step 1: ")


@pytest.mark.ci
def test_a_save_may_take_longer_and_ends_too():
    code, reported, seconds = ended("""
with watchdog.around("saving"):
    time.sleep(1.5)  # five times as long as a step
watchdog.on_progress("step 2")
with watchdog.around("saving"):
    time.sleep(50)
""")
    assert code == 1 and seconds > 1 + 1.5 + 3
    assert reported.startswith("reported: rank 1 made no progress for 3 s (10 times trainer.stall_seconds) in saving: ")


def test_after_the_loop_nothing_is_queried():
    assert ended("watchdog.on_train_end(None, None); time.sleep(1.5)")[:2] == (0, "")


@pytest.mark.ci
def test_a_step_after_a_save_has_its_own_limit():
    code, reported, _ = ended("""
with watchdog.around("saving"):
    time.sleep(1.5)
time.sleep(50)
""")
    assert code == 1 and "for 0.3 s (trainer.stall_seconds) in step 1" in reported


def test_its_thread_ends_with_the_run():
    """A notebook trains again and again in one process."""
    body = "watchdog.close(); time.sleep(0.5); import threading; print(threading.active_count(), end='')"
    assert ended(body)[:2] == (0, "1")


AUTO = """
import time
from types import SimpleNamespace as Of
from dstune.trainer.callbacks import watchdog as module
from dstune.trainer.callbacks.watchdog import Watchdog

module.AUTO_LEAST_SECONDS = 0.6
module.AUTO_SECONDS = 4.0
watchdog = Watchdog(None, rank=1, report=lambda error: print(f"reported: {error}", flush=True), measures=MEASURES)
run = Of(state=Of(step=7))

def step(number, seconds):
    made = Of(number=number, number_in_launch=number, seconds=seconds)
    watchdog.on_micro_batch_begin(run, made, 0, {})
    watchdog.on_step_agreed(run, made)
    watchdog.between_steps(run)
"""


def limit_of(body: str, measures: bool = True) -> float:
    """After how many seconds it ended, as it says."""
    command = [sys.executable, "-c", AUTO.replace("MEASURES", str(measures)) + body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    return float(done.stdout.split("no progress for ")[1].split()[0])


@pytest.mark.ci
def test_auto_follows_the_slowest_of_the_last_steps():
    assert limit_of("[step(number, 0.05) for number in range(9)]\nstep(9, 0.08)\nstep(10, 0.01)\ntime.sleep(50)") == 1.6
    assert limit_of("[step(number, 0.001) for number in range(9)]\ntime.sleep(50)") == 0.6  # at least
    # A step that was slow long ago does not count any more.
    assert limit_of("step(5, 9.0)\n[step(9 + n, 0.001) for n in range(100)]\ntime.sleep(50)") == 0.6


@pytest.mark.ci
def test_auto_is_patient_where_nothing_is_measured():
    for body in (
        "[step(number, 0.001) for number in range(3)]\ntime.sleep(50)",  # the first steps of a launch
        "[step(number, 0.001) for number in range(9)]\nwatchdog.on_progress('the evaluation')\ntime.sleep(50)",
        "[step(number, 0.001) for number in range(9)]\nwatchdog.while_waiting(run)\ntime.sleep(50)",
    ):
        assert limit_of(body) == 4.0
    assert limit_of("[step(number, 0.001) for number in range(9)]\ntime.sleep(50)", measures=False) == 4.0


def test_after_a_save_a_step_has_the_limit_of_steps():
    body = "[step(number, 0.001) for number in range(9)]\nwith watchdog.around('saving'):\n    time.sleep(1.5)\ntime.sleep(50)"
    assert limit_of(body) == 0.6
