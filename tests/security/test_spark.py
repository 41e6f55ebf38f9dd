"""Strangers on the network of a launch through Spark, and in its run directory."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.command import wait_until
from support.configs import run_config

from dstune.core.errors import UserError
from dstune.launch.console import Console
from dstune.launch.spark import stage
from dstune.launch.spark.config import SparkConfig
from dstune.launch.spark.task import _supervise


@pytest.mark.parametrize(
    "sent", ['{"token": "\u00e9"}', '{"token": "\\ud800"}', "[" * 60_000, "nothing", "[]", "1" * 5000]
)
def test_what_a_stranger_sends_does_not_end_the_driver(sent: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as stranger,
    ):
        made._accept(server)
        stranger.sendall(sent.encode() + b"\n")
        stranger.shutdown(socket.SHUT_WR)
        wait_until(lambda: made._listen() or not made._strangers, timeout=10)
    assert not made._waiting


def test_a_task_writes_its_log_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="link"):
        _supervise(None, {"env": {}, "command": [], "folder": "/", "mark": "m", "grace": 0}, 0, tmp_path)
    assert not (tmp_path / "precious").exists()
