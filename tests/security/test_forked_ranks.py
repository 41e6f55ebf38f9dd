"""Who may ask a fork server for ranks, and what of one run a later one can read."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from support.command import wait_until
from support.forks import ARGV, asking_fixture  # noqa: F401 (a fixture)

from dstune.core.rank_env import LAUNCH_ID
from dstune.launch.local import fork_server

SECOND = 61_002
"""A user who is not this one."""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_gets_no_fork(asking, tmp_path) -> None:
    rank = asking()
    assert rank.ask()[2] == 7

    def tried() -> str:
        """What a process of another user gets."""
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.setgroups([])
                os.setresgid(SECOND, SECOND, SECOND)
                os.setresuid(SECOND, SECOND, SECOND)
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                    connection.settimeout(20)
                    connection.connect(str(rank.folder / fork_server.SOCKET))
                    connection.send(json.dumps({"argv": ["x"]}).encode())
                    os.write(writing, b"answer: " + connection.recv(1000))
            except OSError as error:
                os.write(writing, type(error).__name__.encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(writing)
        with os.fdopen(reading) as said:
            return said.read()

    assert tried() == "PermissionError"
    rank.folder.chmod(0o711)
    (rank.folder / fork_server.SOCKET).chmod(0o777)
    assert tried() in ("answer: ", "ConnectionResetError", "BrokenPipeError")
    rank.folder.chmod(0o700)
    assert rank.ask()[2] == 7


def test_a_folder_that_others_may_enter_is_not_used(asking) -> None:
    rank = asking()
    rank.folder.chmod(0o755)
    assert str(rank.folder) in rank.declines()


def test_the_server_has_no_secret_and_other_processes_see_a_fork_as_the_rank(asking) -> None:
    rank = asking()
    process = rank.fork("sleep")
    found = psutil.Process(process.pid)
    assert list(filter(None, found.cmdline())) == [*ARGV, "sleep"]
    assert found.environ()[LAUNCH_ID] == "mark" and found.environ()["MINE_TOKEN"] == "secret-of-one"
    for other in (rank.process, found.parent()):
        raw = Path(f"/proc/{other.pid}/environ").read_bytes() + Path(f"/proc/{other.pid}/cmdline").read_bytes()
        assert b"secret-of-one" not in raw and b"mark" not in raw
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL
