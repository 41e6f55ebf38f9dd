"""Who may ask a fork server for ranks, and what of one run a later one can read."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from pathlib import Path

import psutil
import pytest
from support.command import wait_until
from support.forks import ARGV, asking_fixture  # noqa: F401 (a fixture)
from support.memory_of_a_rank import planted_in

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


def test_a_rank_finds_no_secret_of_an_earlier_one_in_its_memory(asking) -> None:
    """Twenty secrets of runs that were started, were declined, or whose request was broken; its own shows that it can search."""

    sizes = iter(range(0, 40_000, 1_000))

    def planted() -> str:
        """A secret in a text of another size each time, so that the next request does not overwrite it by chance."""
        return "planted-" + secrets.token_hex(16) + "x" * next(sizes)

    rank = asking()
    for _ in range(3):
        rank.ask(planted(), HF_TOKEN=planted(), DSTUNE_TRUST_KEY=planted(), HTTPS_PROXY=f"http://me:{planted()}@proxy")
    for _ in range(2):
        rank.declines(PYTHONHASHSEED="1", HF_TOKEN=planted(), WANDB_API_KEY=planted())
    for _ in range(4):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(20)
            connection.connect(str(rank.folder / fork_server.SOCKET))
            connection.send(json.dumps({"env": {"HF_TOKEN": planted()}, "imports": 3}).encode())
            connection.recv(1000)
    assert not planted_in(rank.process.pid), "each later rank is a copy of that memory"
    own = "planted-" + secrets.token_hex(16)
    with (rank.tmp_path / "log").open("ab") as log:
        argv = [*ARGV[:-1], "support.memory_of_a_rank"]
        process = rank.server.start(argv, rank.env | {"HF_TOKEN": own}, stdout=None, stderr=log)
    assert process is not None and process.stdout is not None, rank.messages
    with process.stdout:
        found = json.loads(process.stdout.readline())
    wait_until(lambda: process.poll() is not None)
    assert found == [own], f"{len(found) - 1} secrets of others"
    assert rank.process.pid, "one server did all of that"


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 10_000, "[]", "3", "\ud800"])
def test_a_request_that_is_none_ends_nothing(asking, text: str) -> None:
    rank = asking()
    assert rank.ask()[2] == 7
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(rank.folder / fork_server.SOCKET))
        connection.send(text.encode("utf-8", "surrogatepass"))
        assert b"cold" in connection.recv(1000)
    assert rank.ask()[2] == 7
    assert not rank.messages
