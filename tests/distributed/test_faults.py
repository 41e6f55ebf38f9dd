"""Every fault of tests/support/faults.py: no hang, no process left, the exit code, rank and cause named, the curve goes on."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from support.faults import FAULTS
from support.struck import Fault, Scene, check, play

SHORT = ("disk error in a save",)
"""Run by `make test` too; the others by `make test-slow`. Killed ranks, signals and a full disk are in test_runs.py and
test_survival.py."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return Scene(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory) -> bool:
    folder = tmp_path_factory.mktemp("mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def marked(fault: Fault):
    marks = [] if fault.name in SHORT else [pytest.mark.slow]
    return pytest.param(fault, id=fault.name.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("fault", [marked(fault) for fault in FAULTS])
def test_a_run_survives(scene: Scene, can_mount: bool, fault: Fault):
    if fault.disk and not can_mount:
        pytest.skip("a small disk is a tmpfs: run as root, with mount installed")
    outcome = play(scene, fault)
    assert check(fault, outcome) == [], outcome
