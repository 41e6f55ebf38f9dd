"""The driver's side of a launch through Spark: one barrier stage, a connection to each of its tasks, and the verdict.

Spark starts a barrier stage again as a whole when one of its tasks is lost, and returns from one without saying what became of
the ranks. So the tasks give themselves their ranks' exit codes as results, never as failures; a new attempt starts when every
task of the one before has let go; and how the run ended is read from the run directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, UserError
from dstune.core.handoff import FOLDER, HANDED, RANK_LOGS
from dstune.core.paths import STOP_FILE
from dstune.launch import attempt, records
from dstune.launch.attempt import Follower, log_path
from dstune.launch.console import Console
from dstune.launch.remote_commands import variables_of
from dstune.launch.signals import caught_signals
from dstune.launch.spark.config import SparkConfig
from dstune.launch.spark.task import SILENT_SECONDS, Line, digest_of, run_task
from dstune.launch.verdict import Verdict, how

POLL_SECONDS = 0.1
SETTLE_SECONDS = 5.0
"""What a task needs beyond the silence of its driver to end its rank."""
ALIVE = Path("launch") / "spark-driver"
"""A file that is touched while a driver lives, and removed when its ranks have ended."""
TOUCH_SECONDS = 5.0
JOB_SECONDS = 60.0
"""How long Spark may take to end a stage whose tasks have ended."""


def run(
    config: RunConfig, run_dir: Path, launch: SparkConfig, console: Console, command: Sequence[str] | None = None
) -> int:
    """Start the ranks and wait for them; the exit code of the public contract. Raises UserError."""
    with session_of(launch, console) as session, caught_signals(config.run.signals) as received:
        context = session.sparkContext
        size = launch.processes or max(
            1, context.defaultParallelism // int(context.getConf().get("spark.task.cpus", "1"))
        )
        stage = Stage(config, run_dir, launch, console, size, command)
        verdict = stage.run(session, received)
    attempt.record(run_dir, verdict, size)
    attempt.explain(run_dir, verdict, console, stage.starts)
    return verdict.exit_code


@contextlib.contextmanager
def session_of(launch: SparkConfig, console: Console) -> Iterator[Any]:
    """The active session, which stays; else one that ends with the launch. Raises UserError."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        if not hasattr(active, "sparkContext") or not _has_context(active):
            reason = "the session is one of Spark Connect, which shows no tasks and devices"
            fix = "a cluster with dedicated (single user) access, or spark-submit"
            raise UserError(Problem("launch", reason, fix, "spark"))
        if launch.master and launch.master != active.sparkContext.master:
            reason = f"a session with another master is active: {active.sparkContext.master}"
            raise UserError(Problem("launch.master", reason, "leave it out", launch.master))
        yield active
        return
    console.stage("starting Spark")
    builder = SparkSession.builder.appName("dstune").config("spark.ui.showConsoleProgress", "false")
    if launch.master or "SPARK_MASTER" not in os.environ:
        builder = builder.master(launch.master or f"local[{launch.processes or 2}]")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # of Java, py4j or pyspark
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            Problem("launch.master", f"Spark does not start: {first}", "look at its log above", str(launch.master))
        ) from None
    try:
        yield session
    finally:
        session.stop()


def _has_context(session: Any) -> bool:
    try:
        return session.sparkContext is not None
    except Exception:  # Spark Connect raises one of its own
        return False


@dataclass
class Task:
    """One task of the present attempt."""

    line: Line
    hello: dict[str, Any]
    code: int | None = None
    """Of its rank, when it has ended."""


@dataclass
class Attempt:
    number: int
    tasks: dict[int, Task] = field(default_factory=dict)
    running: bool = False
    over: bool = False
    """Its tasks were told to end their ranks."""


class Stage:
    """One launch: a barrier stage and all attempts that Spark makes at it."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        launch: SparkConfig,
        console: Console,
        size: int,
        command: Sequence[str] | None,
    ):
        self._config, self._run_dir, self._launch, self._console = config, run_dir.absolute(), launch, console
        self.size = size
        self._command = list(command) if command is not None else ["dstune.worker", str(self._run_dir)]
        self._id, self._token = uuid.uuid4().hex, secrets.token_hex(32)
        self.starts = {rank: _size(log_path(run_dir, rank)) for rank in range(size)}
        self._attempt = Attempt(1)
        self._waiting: list[tuple[Line, dict[str, Any]]] = []
        """Tasks of the next attempt, which have to wait for the end of the present one."""
        self._strangers: dict[Line, float] = {}
        """Connections that have not said who they are."""
        self._not_before = 0.0
        self._touched = -TOUCH_SECONDS
        self._codes: dict[int, int] = {}
        self._refusal: UserError | None = None
        self._failure = ""
        self._stop_signal: str | None = None
        self._forced = False

    def run(self, session: Any, received: Sequence[str]) -> Verdict:
        self._wait_for_former(received)
        (self._run_dir / STOP_FILE).unlink(missing_ok=True)
        records.begin(self._run_dir, self._id, self.size)
        context = session.sparkContext
        address = str(context.getConf().get("spark.driver.host", "127.0.0.1"))
        follower = Follower(log_path(self._run_dir, 0), self._console)
        self._console.stage(f"starting {self.size} rank(s) through Spark ({context.master})")
        with socket.create_server((address, 0)) as server:
            job = threading.Thread(
                target=self._work, args=(session, server.getsockname()), name="spark stage", daemon=True
            )
            job.start()
            ended: float | None = None
            try:
                while job.is_alive():
                    self._touch()
                    self._accept(server)
                    self._listen()
                    follower.look()
                    self._obey(received)
                    self._advance()
                    if self._refusal is not None or self._forced or self._all_ended():
                        ended = ended or time.monotonic()
                        self._end_attempt()
                        if time.monotonic() - ended > JOB_SECONDS:
                            break
            finally:
                self._end_attempt()
                context.cancelJobGroup(self._id)
                job.join(JOB_SECONDS)
                for task in self._attempt.tasks.values():
                    task.line.close()
                if not self._attempt.running or self._all_ended():
                    (self._run_dir / ALIVE).unlink(missing_ok=True)
        follower.end()
        (self._run_dir / STOP_FILE).unlink(missing_ok=True)
        if self._refusal is not None:
            raise self._refusal
        return self._judge()

    def _wait_for_former(self, received: Sequence[str]) -> None:
        """Where a driver died, its ranks end by themselves: wait until none of them can be there any more."""
        patience = SILENT_SECONDS + SETTLE_SECONDS + self._launch.grace_seconds
        with contextlib.suppress(FileNotFoundError):
            left = min(patience, (self._run_dir / ALIVE).stat().st_mtime + patience - time.time())
            if left > 0:
                self._console.message(
                    f"dstune: the driver before this one died: {left:.0f} s until its ranks have ended"
                )
            deadline = time.monotonic() + left
            while time.monotonic() < deadline and not received:
                time.sleep(POLL_SECONDS)

    def _touch(self) -> None:
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            (self._run_dir / ALIVE).parent.mkdir(exist_ok=True)
            (self._run_dir / ALIVE).touch()
            self._touched = time.monotonic()

    def _work(self, session: Any, address: tuple[str, int]) -> None:
        """The stage. Nothing of what it returns is used."""
        context = session.sparkContext
        context.setJobGroup(self._id, "ranks of dstune", interruptOnCancel=True)
        task = partial(run_task, driver=address[0], port=address[1], token=self._token, run_dir=str(self._run_dir))
        try:
            rows = session.range(0, self.size, 1, self.size)
            ranks = rows.mapInArrow(task, "rank long, code long", barrier=True)
            # Behind a shuffle: Spark starts a barrier stage again that lost a worker, but never the last stage of a job.
            ranks.repartition(1).collect()
        except Exception as error:  # of Java, py4j or pyspark
            self._failure = _cause(str(error))

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _accept(self, server: socket.socket) -> None:
        server.settimeout(0.0)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                connection, _ = server.accept()
                connection.setblocking(True)
                self._strangers[Line(connection)] = time.monotonic()

    def _listen(self) -> None:
        tasks = {task.line: task for task in self._attempt.tasks.values() if task.line.open}
        held = [line for line, _ in self._waiting if line.open]
        lines = [*self._strangers, *tasks, *held]
        if not lines:
            time.sleep(POLL_SECONDS)
            return
        with selectors.DefaultSelector() as selector:
            for line in lines:
                selector.register(line, selectors.EVENT_READ)
            selector.select(POLL_SECONDS)
        for line in lines:
            messages = line.receive(0.0)
            if line in self._strangers:
                self._meet(line, messages)
                continue
            for message in messages:
                if line in tasks and isinstance(message.get("ended"), int):
                    tasks[line].code = message["ended"]
                    self._codes.setdefault(self._rank_of(line), message["ended"])

    def _rank_of(self, line: Line) -> int:
        return next(rank for rank, task in self._attempt.tasks.items() if task.line is line)

    def _meet(self, line: Line, messages: list[dict[str, Any]]) -> None:
        """A connection says who it is; one that does not know the token is nobody."""
        if not messages:
            if not line.open or time.monotonic() - self._strangers[line] > SILENT_SECONDS:
                del self._strangers[line]
                line.close()
            return
        del self._strangers[line]
        hello = messages[0]
        rank = hello.get("rank")
        known = isinstance(hello.get("token"), str) and secrets.compare_digest(hello["token"], self._token)
        if not known or not isinstance(rank, int) or not 0 <= rank < self.size:
            line.close()
            return
        self._waiting.append((line, hello))

    def _advance(self) -> None:
        """Bring the attempt on: its tasks together, its start, its end; then the next one."""
        present = self._attempt
        lost = [rank for rank, task in present.tasks.items() if not task.line.open and task.code is None]
        again = [hello["rank"] for line, hello in self._waiting if hello["rank"] in present.tasks]
        if present.tasks and (lost or again) and not present.over:
            if present.running and lost:
                self._console.message(f"dstune: the task of rank {lost[0]} was lost; the other ranks are ended")
                # What the lost one started ends by itself, but nobody can say when.
                self._not_before = time.monotonic() + SILENT_SECONDS + SETTLE_SECONDS + self._launch.grace_seconds
            self._end_attempt()
        if present.over and all(not task.line.open or task.code is not None for task in present.tasks.values()):
            for task in present.tasks.values():
                task.line.close()
            if self._waiting and time.monotonic() > self._not_before and not self._forced and self._refusal is None:
                self._attempt = present = Attempt(present.number + 1)
                self._codes.clear()
                records.begin(self._run_dir, self._id, self.size)
                self._console.message(
                    "dstune: Spark starts the stage again; the run goes on from its newest checkpoint"
                )
        if present.over:
            return
        for line, hello in self._waiting:
            if line.open:
                present.tasks[hello["rank"]] = Task(line, hello)
        self._waiting = []
        if len(present.tasks) == self.size and not present.running:
            self._start(present)
        failed = [rank for rank, task in present.tasks.items() if task.code not in (None, EXIT_DONE, EXIT_PREEMPTED)]
        if failed:
            self._end_attempt()

    def _start(self, present: Attempt) -> None:
        """Tell every task what its rank is."""
        hellos = {rank: task.hello for rank, task in present.tasks.items()}
        try:
            self._check(hellos)
            on_cpu = not any(hello["gpus"] for hello in hellos.values())
            plain, unseen = variables_of(self._config, self._launch, self._id, os.environ, on_cpu=on_cpu)
        except UserError as error:
            self._refusal = error
            return
        folder = plain.pop(FOLDER, "/")
        for name in (HANDED, RANK_LOGS):
            plain.pop(name, None)
        for rank, task in present.tasks.items():
            host = hellos[rank]["host"]
            peers = sorted(other for other, hello in hellos.items() if hello["host"] == host)
            env = {**plain, **unseen.get("all", {}), **(unseen.get("first", {}) if rank == 0 else {})}
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(peers.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(peers)),
                "MASTER_ADDR": str(hellos[0]["address"]),
                "MASTER_PORT": str(hellos[0]["port"]),
            }
            if any(hellos[peer]["gpus"] for peer in peers):
                env["CUDA_VISIBLE_DEVICES"] = ",".join(hellos[peer]["gpus"][0] for peer in peers)
            elif on_cpu:
                env["CUDA_VISIBLE_DEVICES"] = ""
            start = {
                "env": env,
                "command": self._command,
                "folder": folder,
                "mark": f"{self._id}-{present.number}-{rank}",
                "grace": self._launch.grace_seconds,
            }
            task.line.send({"start": start})
        present.running = True

    def _check(self, hellos: dict[int, dict[str, Any]]) -> None:
        """Raises UserError where the tasks cannot run ranks of this run together."""
        problems = []
        expected = digest_of(self._run_dir / "run.yaml")
        if blind := sorted({hello["host"] for hello in hellos.values() if hello["sees"] != expected}):
            reason = f"it is not there on {', '.join(blind)}: the workers do not share this file system"
            fix = "give a run.dir that all workers and the driver share"
            problems.append(Problem("run.dir", reason, fix, str(self._run_dir)))
        if others := sorted({hello["dstune"] for hello in hellos.values()} - {__version__}):
            fix = f"install dstune {__version__} on the workers"
            problems.append(Problem("launch", f"the workers have dstune {', '.join(others)}", fix, "spark"))
        bare = [rank for rank, hello in hellos.items() if not hello["gpus"]]
        if bare and len(bare) < len(hellos):
            reason = f"the tasks of ranks {', '.join(map(str, bare))} have no GPU, and others have"
            problems.append(Problem("launch", reason, "set spark.task.resource.gpu.amount=1", "spark"))
        if problems:
            raise UserError(problems)

    def _end_attempt(self) -> None:
        self._attempt.over = True
        for task in self._attempt.tasks.values():
            if task.line.open:
                task.line.send({"end": True})
        if self._refusal is not None or self._forced:
            for line, _ in self._waiting:
                line.send({"end": True})

    def _all_ended(self) -> bool:
        present = self._attempt
        return len(present.tasks) == self.size and all(task.code is not None for task in present.tasks.values())

    # -- the end ------------------------------------------------------------------------------------------------------

    def _obey(self, received: Sequence[str]) -> None:
        if received and self._stop_signal is None:
            self._stop_signal = received[0]
            files.write(self._run_dir / STOP_FILE, "")
            then = "saving at the end of this step; again to stop at once without saving"
            self._console.message(f"dstune: received {self._stop_signal}: {then}")
        if len(received) > 1 and not self._forced:
            self._forced = True
            self._console.message("dstune: received a second signal: stopping at once")

    def _judge(self) -> Verdict:
        if self._forced:
            return Verdict(EXIT_FAILED, "stopped at once by a second signal")
        bad = [(rank, code) for rank, code in self._codes.items() if code not in (EXIT_DONE, EXIT_PREEMPTED)]
        bad.sort(key=lambda end: end[1] > 0)
        otherwise = f"rank {bad[0][0]} {how(bad[0][1])}" if bad else "the ranks ended without a result"
        if not self._codes:
            otherwise = self._failure or otherwise
            if "SPARK-24819" in otherwise or "more slots" in otherwise:
                reason = "Spark has fewer slots than ranks, and all have to run at once"
                raise UserError(Problem("launch.processes", reason, "fewer ranks, or a larger cluster", str(self.size)))
            if "No module named 'dstune" in otherwise:
                fix = "pip install dstune on the workers too (a cluster library on Databricks)"
                raise UserError(Problem("launch", "the workers have no dstune", fix, "spark"))
        return attempt.of_files(self._run_dir, self.size, otherwise)


def _cause(text: str) -> str:
    """The line of a long error of Spark that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "SPARK-24819" in line or "No module named" in line or "Error:" in line]
    return f"the stage of Spark failed: {(telling or lines or ['no reason given'])[0][:300]}"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
