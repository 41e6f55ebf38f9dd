"""A task of the barrier stage: it starts one rank, and ends it when the driver asks or is gone. The task first connects to the
driver. The rank's variables come over this connection, so they appear neither in Spark's configuration nor in its event log or UI;
the connection also tells each side whether the other one is alive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

PING_SECONDS = 3.0
SILENT_SECONDS = 20.0
"""The other side counts as gone if nothing came from it for this long."""
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
NOT_INHERITED_PREFIXES = ("PYSPARK_", "SPARK_", "TORCHELASTIC_", "PYTHON_WORKER_", "PYTHON_UDF_")
LIMIT = 2**24


class Line:
    """Messages over a connection, one JSON object per line."""

    def __init__(self, connection: socket.socket, limit: int = LIMIT):
        self._connection, self._rest, self.limit = connection, b"", limit
        self._received_at = self._sent_at = time.monotonic()
        self._readable = select.poll()  # select() accepts only the first 1024 files of a process
        self._readable.register(connection, select.POLLIN)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open = True

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        self._sent_at = time.monotonic()
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """Return the messages that arrived within `seconds`; `open` is False once the other side is gone."""
        if self.open and time.monotonic() - self._sent_at > PING_SECONDS:
            self.send({"ping": True})
        messages: list[dict[str, Any]] = []
        try:
            if self.open and self._readable.poll(seconds * 1000):
                data = self._connection.recv(2**16)
                self._received_at = time.monotonic()
                self.open = bool(data) and len(self._rest) < self.limit
                *lines, self._rest = (self._rest + data).split(b"\n")
                messages = [message for line in lines if isinstance(message := json.loads(line), dict)]
        except (OSError, ValueError, RecursionError):
            self.open = False
        if time.monotonic() - self._received_at > SILENT_SECONDS:
            self.open = False
        return [message for message in messages if "ping" not in message]

    def close(self) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self._connection.close()


def digest_of(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def run_task(batches: Iterable[Any], *, driver: str, port: int, token: str, run_dir: str) -> Iterator[Any]:
    """Run a rank in a Spark task (the function of `mapInArrow`); yields one row with its number and exit code."""
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    for _ in batches:
        pass
    context = BarrierTaskContext.get()
    resources = context.resources().get("gpu")
    rank = context.partitionId()
    code = serve(rank, list(resources.addresses) if resources else [], (driver, port), token, Path(run_dir))
    yield pa.RecordBatch.from_pylist([{"rank": rank, "code": code}])


def serve(rank: int, gpus: list[str], driver: tuple[str, int], token: str, run_dir: Path) -> int:
    """Run the rank that the driver assigns to this task and return its exit code. A task that the driver no longer needs ends with
    0: the driver knows what it was told."""
    from dstune import __version__
    from dstune.core.errors import EXIT_FAILED, UserError
    from dstune.launch.commands import count_gpus

    line = Line(socket.create_connection(driver, timeout=SILENT_SECONDS))
    address = line._connection.getsockname()[0]
    hello = {
        "token": token,
        "rank": rank,
        "host": socket.gethostname(),
        "address": address,
        "port": free_port(address),
        "gpus": gpus,
        "unused": 0 if gpus else count_gpus(os.environ),
        "sees": digest_of(run_dir / "run.yaml"),
        "dstune": __version__,
        "python": sys.version.split()[0],
    }
    line.send(hello)
    start: dict[str, Any] | None = None
    while start is None and line.open:
        for message in line.receive(1.0):
            if "end" in message:
                line.close()
                return 0
            start = message.get("start", start)
    if start is None:
        return 0
    try:
        code, ordered = _supervise(line, start, rank, run_dir)
    except (OSError, UserError) as error:
        code, ordered = EXIT_FAILED, False
        why = f"{error.filename or run_dir}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        line.send({"failed": why})
    line.send({"ended": code, "ordered": ordered})
    while line.open and not any("end" in message for message in line.receive(1.0)):
        pass  # the driver has read it
    line.close()
    return code


def _supervise(line: Line, start: dict[str, Any], rank: int, run_dir: Path) -> tuple[int, bool]:
    """Start the rank and wait for its end. Returns its exit code, and whether the driver ordered the end. Raises OSError; UserError
    if its log is a link."""
    from dstune.core import files
    from dstune.core.rank_env import LAUNCH_ID, LAUNCHER_PID
    from dstune.launch.processes import Guard, end_all

    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith(NOT_INHERITED_PREFIXES)
    }
    mark = str(start["mark"])
    environment = {**inherited, **start["env"], LAUNCH_ID: mark, LAUNCHER_PID: str(os.getpid())}
    python_path = [
        *environment.get("PYTHONPATH", "").split(os.pathsep),
        *inherited.get("PYTHONPATH", "").split(os.pathsep),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, python_path)))
    folder = start["folder"] if os.path.isdir(start["folder"]) else "/"
    log_path = run_dir / "logs" / f"rank-{rank}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with files.append(log_path) as log, Guard(mark) as guard:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        log.write(f"=== rank {rank} on {socket.gethostname()}, {started} ===\n".encode())
        command = [sys.executable, "-u", "-m", *start["command"]]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        guard.watch(process.pid)
        deadline: float | None = None
        try:
            while process.poll() is None:
                ordered = [float(message["end"]) for message in line.receive(0.1) if "end" in message]
                if not line.open:
                    ordered.append(float(start["grace"]))
                if ordered:
                    if deadline is None:
                        process.send_signal(signal.SIGTERM)
                    until = time.monotonic() + min(ordered)
                    deadline = until if deadline is None else min(deadline, until)
                if deadline is not None:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
        finally:
            end_all(mark, [process.pid])
        return process.wait(), deadline is not None
