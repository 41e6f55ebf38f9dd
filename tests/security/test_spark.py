"""Strangers on the network of a launch through Spark, and in its run directory."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
from pathlib import Path

import pytest
from support.command import wait_until
from support.configs import run_config

from dstune.core.errors import UserError
from dstune.lakehouse.spark import stage
from dstune.lakehouse.spark.config import SparkConfig
from dstune.lakehouse.spark.task import _supervise
from dstune.launch.console import Console


@pytest.mark.parametrize(
    "sent", ['{"token": "\u00e9"}', '{"token": "\\ud800"}', "[" * 60_000, "nothing", "[]", "1" * 5000]
)
def test_what_a_stranger_sends_does_not_end_the_driver(sent: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as stranger:
        made._accept(server)
        stranger.sendall(sent.encode() + b"\n")
        stranger.shutdown(socket.SHUT_WR)
        wait_until(lambda: made._listen() or not made._strangers, timeout=10)
    assert not made._waiting


def test_many_strangers_keep_no_task_out(tmp_path: Path) -> None:
    """Nor do they take the driver's files and memory."""
    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)

    def met() -> bool:
        made._accept(server)
        assert len(made._strangers) <= stage.MAX_STRANGERS
        made._listen()
        return bool(made._waiting)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server, contextlib.ExitStack() as crowd:
        for _ in range(stage.MAX_STRANGERS + 50):
            crowd.enter_context(socket.create_connection(server.getsockname()))
        task = crowd.enter_context(socket.create_connection(server.getsockname()))
        task.sendall(json.dumps({"token": made._token, "rank": 1}).encode() + b"\n")
        wait_until(met, timeout=15)
        loud = crowd.enter_context(socket.create_connection(server.getsockname()))
        loud.setblocking(False)

        def shout() -> None:
            for _ in range(10_000):
                with contextlib.suppress(BlockingIOError):
                    loud.send(b"x" * 2**16)
                made._accept(server)
                made._listen()

        with pytest.raises(ConnectionError):
            shout()


def test_a_connection_that_cannot_be_accepted_ends_no_launch(tmp_path: Path) -> None:
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)

    class Full(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(errno.EMFILE, "Too many open files")

    with Full() as server:
        made._accept(server)
    assert not made._strangers


def test_a_task_writes_its_log_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="link"):
        _supervise(None, {"env": {}, "command": [], "folder": "/", "mark": "m", "grace": 0}, 0, tmp_path)
    assert not (tmp_path / "precious").exists()
