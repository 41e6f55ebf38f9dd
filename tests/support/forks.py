"""A command that asks a fork server without the imports of ranks (`support.light_fork_server`) for ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dstune.core.rank_env import LAUNCH_ID, LAUNCHER_PID
from dstune.launch.local import warm
from dstune.launch.local.warm import FORK_SERVER, ForkServer
from support.command import ROOT, wait_until

ARGV = [sys.executable, "-u", "-m", "support.what_a_rank_has"]


class Asking:
    """A command that starts ranks: warm where it can, else cold."""

    def __init__(self, folder: Path, tmp_path: Path, imports: tuple[str, ...] = ("support.slow_import",)):
        self.folder, self.tmp_path = folder, tmp_path
        self.messages: list[str] = []
        self.server = ForkServer(folder, imports, self.messages.append)
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "PYTHONSAFEPATH": "1",
            "RANK": "0",
            LAUNCH_ID: "mark",
            LAUNCHER_PID: str(os.getpid()),
            "MINE_TOKEN": "secret-of-one",
        }

    def fork(self, *words: str, **variables: str) -> warm.ForkedProcess | None:
        with (self.tmp_path / "log").open("ab") as log:
            return self.server.start([*ARGV, *words], self.env | variables, stdout=None, stderr=log)

    def ask(self, *words: str, **variables: str) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Return what the rank has in common with other ranks, what is its own, and its exit code. Fails where it is not forked."""
        process = self.fork(*words, **variables)
        assert process is not None, self.messages
        return outcome(process)

    def start_cold(self, *words: str, **variables: str) -> tuple[dict[str, Any], dict[str, Any], int]:
        with (self.tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                [*ARGV, *words],
                env=self.env | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        return outcome(process)

    def declines(self, **variables: str) -> str:
        """Return why the rank starts cold."""
        count_before = len(self.messages)
        assert self.fork(**variables) is None
        assert len(self.messages) == count_before + 1 and "\n" not in self.messages[-1]
        return self.messages[-1]

    @property
    def process(self) -> psutil.Process:
        """The server."""
        assert self.server._server is not None
        return psutil.Process(self.server._server.pid)


def outcome(process: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    line = process.stdout.readline()
    wait_until(lambda: process.poll() is not None, timeout=20)
    process.stdout.close()
    common_facts, own_facts = json.loads(line)
    assert own_facts["pid"] == process.pid
    return common_facts, own_facts, process.returncode


@pytest.fixture(name="asking")
def asking_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asking]]:
    monkeypatch.setattr(warm, "SERVER", "support.light_fork_server")
    with warm.offer() as variables:

        def make(*imports: str) -> Asking:
            return Asking(Path(variables[FORK_SERVER]), tmp_path, imports or ("support.slow_import",))

        yield make


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
