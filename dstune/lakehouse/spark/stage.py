"""The driver's side of a launch through Spark: one barrier stage, a connection to each of its tasks, and the verdict. When a task
is lost, Spark restarts the complete stage, and a finished stage does not say how the ranks ended. So tasks return their ranks' exit
codes as results, never as failures, and also report them over their connections; a new attempt starts only if a task was lost, and
once every task of the previous attempt has let go."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, UserError
from dstune.core.handoff import FOLDER, HANDOFF_FILE, RANK_LOGS
from dstune.lakehouse.spark import refusals
from dstune.lakehouse.spark.config import SparkConfig
from dstune.lakehouse.spark.session import session_of, wait_for_slots
from dstune.lakehouse.spark.task import LIMIT, SILENT_SECONDS, Line, run_task
from dstune.launch import attempt, records
from dstune.launch.attempt import Follower, log_path
from dstune.launch.console import Console
from dstune.launch.remote_commands import variables_of
from dstune.launch.signals import StopFile, caught_signals
from dstune.launch.verdict import Ended, Verdict, judge

POLL_SECONDS = 0.1
RANK_END_SECONDS = 5.0
"""Extra time that a task needs to end its rank once its driver is silent."""
MAX_STRANGERS = 256
"""Limit of connections that have not identified themselves; others wait until there is room."""
CROWDED_SECONDS = 1.0
"""How long each of them may stay silent while there are too many."""
HELLO_BYTES = 2**16
TOUCH_SECONDS = 5.0
JOB_SECONDS = 60.0
"""How long Spark may take to end a stage whose tasks have ended."""
MISSING_SECONDS = 30.0
"""After this time, a message names the tasks that have not begun."""
RETURN_SECONDS = 300.0
"""How long Spark may take to restart all tasks after one was lost."""


def run(
    config: RunConfig, run_dir: Path, launch: SparkConfig, console: Console, command: Sequence[str] | None = None
) -> int:
    """Start the ranks, wait for them and return the exit code. Raises UserError."""
    with session_of(launch, console) as session, caught_signals(config.run.signals) as received:
        size = wait_for_slots(session.sparkContext, launch.processes, received)
        stage = Stage(config, run_dir, launch, console, size, command)
        verdict = stage.run(session, received)
    attempt.record(run_dir, verdict, size)
    attempt.explain(run_dir, verdict, console, stage.starts)
    return verdict.exit_code


@dataclass
class Task:
    """One task of the current attempt."""

    line: Line
    hello: dict[str, Any]
    code: int | None = None
    """Exit code of its rank, once it has ended."""
    lost_at: float | None = None
    """When its connection broke before that."""


@dataclass
class Attempt:
    number: int
    tasks: dict[int, Task] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    """When it began to wait for its tasks."""
    running: bool = False
    over: bool = False
    """Whether its tasks have been told to end their ranks."""
    repeated: bool = False
    """Whether Spark lost one of its tasks and restarts the stage."""


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
        self.starts = {rank: attempt.size(log_path(run_dir, rank)) for rank in range(size)}
        self._attempt = Attempt(1)
        self._waiting: list[tuple[Line, dict[str, Any]]] = []
        """Tasks of the next attempt, which wait for the end of the current one."""
        self._strangers: dict[Line, float] = {}
        """Connections that have not identified themselves."""
        self._patience = SILENT_SECONDS + RANK_END_SECONDS + launch.grace_seconds
        """After this time, no rank can be alive whose task has lost the driver."""
        self._touched = -TOUCH_SECONDS
        self._refusal: UserError | None = None
        self._lost = ""
        """The task that was lost last."""
        self._failure = ""
        self._began = False
        """Whether any rank was started."""
        self._missing_reported = False
        self._gave_up = False
        self._stop = StopFile(self._run_dir, self._console)

    def run(self, session: Any, received: Sequence[str]) -> Verdict:
        if received:
            return Verdict(EXIT_PREEMPTED, f"received {received[0]} before training began")
        self._stop.remove()
        context = session.sparkContext
        follower = Follower(log_path(self._run_dir, 0), self._console)
        self._console.stage(f"starting {self.size} rank(s) through Spark ({context.master})")
        server, host = _listening(context.getConf())
        with server:
            records.begin(self._run_dir, self._id, self.size)
            address = (host, server.getsockname()[1])
            job = threading.Thread(target=self._work, args=(session, address), name="spark stage", daemon=True)
            job.start()
            ended: float | None = None
            try:
                while job.is_alive():
                    self._touch_run()
                    self._accept(server)
                    self._listen()
                    follower.look()
                    self._stop.look(received)
                    self._advance()
                    if self._is_over():
                        ended = ended or time.monotonic()
                        self._end_attempt()
                        if time.monotonic() - ended > (JOB_SECONDS if self._all_ended() else RANK_END_SECONDS):
                            break
            finally:
                self._end_attempt()
                if job.is_alive():
                    # Java may be gone; how the ranks ended is known without it.
                    with contextlib.suppress(Exception):
                        context.cancelJobGroup(self._id)
                    job.join(JOB_SECONDS)
                for task in self._attempt.tasks.values():
                    task.line.close()
                if not self._attempt.running or self._no_rank_left():
                    (self._run_dir / records.DRIVER).unlink(missing_ok=True)
        follower.end()
        self._stop.remove()
        if self._refusal is not None:
            raise self._refusal
        return self._judge()

    def _touch_run(self) -> None:
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            (self._run_dir / records.DRIVER).parent.mkdir(exist_ok=True)
            files.write(self._run_dir / records.DRIVER, str(self._patience))
            self._touched = time.monotonic()

    def _work(self, session: Any, address: tuple[str, int]) -> None:
        """Run the stage. Its return value is not used."""
        context = session.sparkContext
        context.setJobGroup(self._id, "ranks of dstune", interruptOnCancel=True)
        task = partial(run_task, driver=address[0], port=address[1], token=self._token, run_dir=str(self._run_dir))
        try:
            rows = session.range(0, self.size, 1, self.size)
            ranks = rows.mapInArrow(task, "rank long, code long", barrier=True)
            # After a shuffle: Spark restarts a barrier stage that lost a worker, but never the last stage of a job.
            ranks.repartition(1).collect()
        except Exception as error:  # from Java, py4j or pyspark
            self._failure = refusals.cause(str(error))

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _accept(self, server: socket.socket) -> None:
        server.settimeout(0.0)
        with contextlib.suppress(
            OSError
        ):  # nobody waits; a client disconnected; or this process can open no more files
            while len(self._strangers) < MAX_STRANGERS:
                connection, _ = server.accept()
                connection.setblocking(True)
                self._strangers[Line(connection, HELLO_BYTES)] = time.monotonic()

    def _listen(self) -> None:
        tasks = {task.line: task for task in self._attempt.tasks.values() if task.line.open or task.lost_at is None}
        lines = [*self._strangers, *tasks, *(line for line, _ in self._waiting)]
        with selectors.DefaultSelector() as selector:
            for line in lines:
                if line.open:
                    selector.register(line, selectors.EVENT_READ)
            selector.select(POLL_SECONDS)
        for line in lines:
            messages = line.receive(0.0)
            if line in self._strangers:
                self._identify(line, messages)
            elif line in tasks:
                self._note(tasks[line], messages)

    def _note(self, task: Task, messages: Sequence[dict[str, Any]]) -> None:
        """Record what a task reports about its rank, or that the task is gone."""
        ended = self._attempt.ended
        for message in messages:
            if isinstance(message.get("ended"), int):
                task.code = message["ended"]
                ended.append(Ended(task.hello["rank"], task.code, len(ended), bool(message.get("ordered"))))
            elif "failed" in message:
                reason = f"no rank can be started on {task.hello['host']}: {message['failed']}"
                fix = "give a folder that the user of the workers can write to too"
                self._refusal = UserError(Problem("run.dir", reason, fix, str(self._run_dir)))
        if not task.line.open and task.code is None and task.lost_at is None:
            task.lost_at = time.monotonic()

    def _identify(self, line: Line, messages: list[dict[str, Any]]) -> None:
        """Handle a connection that identifies itself; without the token it is dropped."""
        if not messages:
            patience = SILENT_SECONDS if len(self._strangers) < MAX_STRANGERS else CROWDED_SECONDS
            if not line.open or time.monotonic() - self._strangers[line] > patience:
                del self._strangers[line]
                line.close()
            return
        del self._strangers[line]
        hello = messages[0]
        rank = hello.get("rank")
        has_token = secrets.compare_digest(str(hello.get("token")).encode("utf-8", "replace"), self._token.encode())
        if not has_token or not isinstance(rank, int) or not 0 <= rank < self.size:
            line.close()
            return
        line.limit = LIMIT
        self._waiting.append((line, hello))

    def _advance(self) -> None:
        """Advance the attempt: gather its tasks, start it, end it; then go on to the next one if Spark restarts the stage."""
        present = self._attempt
        lost = [task for task in present.tasks.values() if task.lost_at is not None]
        again = any(hello["rank"] in present.tasks for _, hello in self._waiting)
        if (lost or again) and not present.over:
            present.repeated = True
            if present.running and lost:
                self._lost = f"the task of rank {lost[0].hello['rank']} on {lost[0].hello['host']} was lost"
                self._console.message(f"dstune: {self._lost}; the other ranks are ended")
            self._end_attempt()
        elif any(task.code not in (None, EXIT_DONE, EXIT_PREEMPTED) for task in present.tasks.values()):
            self._end_attempt()
        if present.over:
            if not present.repeated or self._is_over():
                self._dismiss_waiting()
                return
            if not self._no_rank_left():
                return
            for task in present.tasks.values():
                task.line.close()
            began = time.monotonic() if present.running else present.began
            self._attempt = present = Attempt(present.number + 1, began=began)
            if self._began:
                records.begin(self._run_dir, self._id, self.size)
        for line, hello in self._waiting:
            if line.open:
                present.tasks[hello["rank"]] = Task(line, hello)
        self._waiting = []
        if not present.running and len(present.tasks) == self.size:
            self._start(present)
        elif not present.running:
            self._report_missing(present)

    def _report_missing(self, present: Attempt) -> None:
        """Report tasks that have not begun; give up if Spark cannot restart them."""
        waited = time.monotonic() - present.began
        if waited > MISSING_SECONDS and not self._missing_reported:
            self._missing_reported = True
            begun = f"{len(present.tasks)} of {self.size} tasks have begun"
            self._console.message(f"dstune: {begun}: Spark has other work, or too few slots; waiting for the others")
        self._gave_up = self._began and waited > RETURN_SECONDS

    def _dismiss_waiting(self) -> None:
        """Dismiss tasks that Spark has restarted and whose ranks must not start."""
        for line, _ in self._waiting:
            line.send({"end": 0.0})
            line.close()
        self._waiting = []

    def _start(self, attempt: Attempt) -> None:
        """Send every task its rank's settings."""
        hellos = {rank: task.hello for rank, task in attempt.tasks.items()}
        try:
            refusals.check(hellos, self._run_dir)
            on_cpu = refusals.hides_gpus() or not any(hello["gpus"] for hello in hellos.values())
            variables, handoff = variables_of(
                self._config, self._run_dir, self._launch, self._id, os.environ, on_cpu=on_cpu
            )
        except UserError as error:
            self._refusal = error
            return
        if self._began:
            self._console.message("dstune: Spark starts the stage again; the run goes on from its newest checkpoint")
        folder = variables.pop(FOLDER, "/")
        for name in (HANDOFF_FILE, RANK_LOGS):
            variables.pop(name, None)
        for rank, task in attempt.tasks.items():
            host = hellos[rank]["host"]
            peers = sorted(other for other, hello in hellos.items() if hello["host"] == host)
            env = {**variables, **handoff.get("all", {}), **(handoff.get("first", {}) if rank == 0 else {})}
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(peers.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(peers)),
                "MASTER_ADDR": str(hellos[0]["address"]),
                "MASTER_PORT": str(hellos[0]["port"]),
            }
            env["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else ",".join(hellos[peer]["gpus"][0] for peer in peers)
            start = {
                "env": env,
                "command": self._command,
                "folder": folder,
                "mark": f"{self._id}-{attempt.number}-{rank}",
                "grace": self._launch.grace_seconds,
            }
            task.line.send({"start": start})
        attempt.running = self._began = True
        self._missing_reported = False

    def _end_attempt(self) -> None:
        self._attempt.over = True
        for task in self._attempt.tasks.values():
            if task.line.open:
                task.line.send({"end": 0.0 if self._stop.forced else self._launch.grace_seconds})
        if self._refusal is not None or self._stop.forced:
            self._dismiss_waiting()

    def _is_over(self) -> bool:
        """Return whether no further rank may be started."""
        if self._refusal is not None or self._stop.forced or self._gave_up or self._all_ended():
            return True
        present = self._attempt
        return self._stop.signal is not None and (not present.running or (present.over and self._no_rank_left()))

    def _all_ended(self) -> bool:
        present = self._attempt
        return len(present.tasks) == self.size and all(task.code is not None for task in present.tasks.values())

    def _no_rank_left(self) -> bool:
        """Return whether no rank of this attempt can be alive: each has ended, or its task lost the driver long ago."""
        patience = self._patience if self._attempt.running else 0.0
        now = time.monotonic()
        return all(
            task.code is not None or (task.lost_at is not None and now > task.lost_at + patience)
            for task in self._attempt.tasks.values()
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    def _judge(self) -> Verdict:
        if self._stop.forced:
            return Verdict(EXIT_FAILED, "stopped at once by a second signal")
        if self._stop.signal is not None and not self._began:
            return Verdict(EXIT_PREEMPTED, f"received {self._stop.signal} before training began")
        if self._all_ended():
            errors = attempt.read_errors(self._run_dir, self.size)
            verdict = judge(self._attempt.ended, errors, self._stop.signal, forced=False)
            if verdict.exit_code == EXIT_DONE and records.read_result(self._run_dir) is None:
                return Verdict(EXIT_FAILED, "the ranks ended without a result")
            return verdict
        if not self._began:
            refusals.refuse_by_cause(self._failure, self.size)
        if self._lost and records.read_result(self._run_dir) is None:
            then = f"Spark did not bring it back within {RETURN_SECONDS:.0f} s" if self._gave_up else self._failure
            return Verdict(EXIT_FAILED, "; ".join(filter(None, [self._lost, then])))
        return attempt.judge_files(self._run_dir, self.size, self._failure or "the ranks ended without a result")


def _listening(conf: Any) -> tuple[socket.socket, str]:
    """Return a server socket that listens like the driver's own (`spark.driver.bindAddress`), and the host by which workers reach
    it. Raises UserError."""
    host = str(conf.get("spark.driver.host", "127.0.0.1")).strip("[]")
    place = str(conf.get("spark.driver.bindAddress", host)).strip("[]")
    try:
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        return socket.create_server((place, 0), family=family), host
    except OSError as error:
        reason = f"the driver cannot listen there: {error.strerror or error}"
        fix = "set it to an address of this machine (SPARK_LOCAL_IP)"
        raise UserError(Problem("spark.driver.bindAddress", reason, fix, place)) from None
