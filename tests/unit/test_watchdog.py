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
