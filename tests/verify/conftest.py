"""`dstune-verify` as a user starts it: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INJECT = ROOT / "tests" / "support" / "inject"


class Verified:
    """What a command printed, and how it ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]):
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
        self.report: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        self.cases: dict[str, dict[str, Any]] = {case["case"]: case for case in self.report.get("cases", [])}

    def statuses(self) -> dict[str, str]:
        return {name: case["status"] for name, case in self.cases.items()}


def run_program(
    *arguments: str,
    start: Sequence[str] = (sys.executable, "-m", "dstune_verify"),
    fault: Mapping[str, Any] | None = None,
    paths: Sequence[Path] = (),
    cwd: Path = ROOT,
    seconds: float = 240,
    **variables: str,
) -> Verified:
    """Run `dstune-verify`. fault: for `support/inject`. paths: further folders of Python modules."""
    folders = [*paths, *([INJECT] if fault else []), ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"} | variables
    if fault:
        environment["DSTUNE_FAULT"] = json.dumps(fault)
    done = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, timeout=seconds, env=environment, cwd=cwd
    )
    return Verified(done)


@pytest.fixture(scope="session")
def verify() -> Callable[..., Verified]:
    return run_program
