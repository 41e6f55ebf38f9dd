"""Starts the ranks of a run on this machine, watches them, and returns the exit code of the public contract.

Every rank has its own session, so Ctrl-C in the terminal reaches only this process, which then asks the ranks once to save. When
one rank dies, this process ends the others. Whatever happens, no process of the launch is left behind.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.disk import is_disk_full
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, DstuneError, Stalled, TrainingFailed
from dstune.core.paths import SIGNAL_FILE
from dstune.core.rank_env import GROUP_SECRET, LAUNCH_ID, STORE
from dstune.launch import attempt, records
from dstune.launch.commands import LaunchPlan
from dstune.launch.console import Console, copy
from dstune.launch.local import warm
from dstune.launch.local.config import LocalConfig
from dstune.launch.local.restarts import Restarts
from dstune.launch.processes import Guard, end_all, is_stopped
from dstune.launch.signals import caught_signals
from dstune.launch.verdict import Ended, Verdict, judge

POLL_SECONDS = 0.05
LEFTOVER_SECONDS = 2.0
"""How long processes that outlive their rank (W&B's service) may take to end by themselves."""
STACKS_SECONDS = 0.5
"""How long the other ranks may take to print their stacks after one of them stalled."""


def run(
    config: RunConfig,
    run_dir: Path,
    launch: LocalConfig,
    *,
    plan: LaunchPlan,
    console: Console,
    lock: int | None = None,
    saves: bool = True,
) -> int:
    """Train `config` in `run_dir`, which holds its `run.yaml`, and return the exit code.

    plan: command lines and environments of the ranks. lock: descriptor of the run directory's lock, which stays held until the
    last rank has ended even if this process is killed. saves: whether ranks that are asked to stop have something to save.

    Raises:
        UserError: a rank raised one.
    """
    grace = launch.grace_seconds
    with (
        caught_signals(config.run.signals) as received,
        warm.fork_server(
            warm.rank_imports(config), console.message, warm=launch.warm, restarts=launch.restarts
        ) as server,
    ):
        restarts = Restarts(launch.restarts, run_dir, console, received)
        while True:
            current_launch = Launch(plan, run_dir, grace, console, received, lock, saves, server)
            try:
                verdict = current_launch.run()
            except OSError as error:
                if not is_disk_full(error):
                    raise
                reason = f"the ranks cannot be started: {error}"
                verdict = Verdict(EXIT_FAILED, reason, error=TrainingFailed(reason))
            if verdict.exit_code == EXIT_DONE and records.read_result(run_dir) is None:
                verdict = Verdict(EXIT_FAILED, "the ranks ended without a result", current_launch.ended[0])
            verdict, starts_again = restarts.consider(verdict, current_launch)
            if not starts_again:
                break
        try:
            attempt.record(run_dir, verdict, plan.size)
        except OSError as error:  # the verdict below matters more than this
            console.message(f"dstune: the result cannot be written: {error}")
            if verdict.exit_code == EXIT_DONE:
                verdict = Verdict(EXIT_FAILED, "the run directory cannot be written to")
    attempt.explain(run_dir, verdict, console, current_launch.log_starts)
    return verdict.exit_code


class Launch:
    """One start of the ranks on this machine, from the start of the first process to the end of the last.

    These are all ranks of the run; the subclass in `dstune.launch.agents.ranks` starts those of one node among several.
    """

    first_rank = 0
    """Number of the first rank on this machine."""
    ends_others = False
    """Whether a rank or node elsewhere is gone, so that the ranks here would wait for it forever; set from another thread."""

    def __init__(
        self,
        plan: LaunchPlan,
        run_dir: Path,
        grace_seconds: float,
        console: Console,
        received: list[str],
        lock: int | None,
        saves: bool = True,
        server: warm.ForkServer | None = None,
    ):
        """received: signals that ask the run to stop; a handler appends to it. server: forks the ranks; if None, each rank is a new
        process that does its own imports. The other parameters are those of `run`."""
        self.id = uuid.uuid4().hex
        self.plan = plan
        self.run_dir = run_dir
        self.logs = run_dir / "logs"
        self.grace_seconds = grace_seconds
        self.console = console
        self.received = received
        self.lock = lock
        self.saves = saves
        self.server = server
        self.ranks: list[subprocess.Popen[bytes] | warm.ForkedProcess] = []
        self.ended: list[Ended] = []
        self.errors: dict[int, DstuneError] = {}
        self.log_starts: dict[int, int] = {}
        self.stop_signal: str | None = None
        self.forced = False
        self.stopped: set[int] = set()
        self.folder: Path | None = None
        """The temporary folder of the running start, where ranks leave errors that the disk of the run does not take."""

    @property
    def world_size(self) -> int:
        """Number of ranks on all machines."""
        return self.plan.size

    def run(self) -> Verdict:
        records.begin(self.run_dir, self.id, self.plan.size)
        return self.run_ranks()

    def run_ranks(self) -> Verdict:
        """Start the ranks of this machine, wait until all of them have ended, and return the verdict."""
        self._forget_signal()
        with ExitStack() as stack:
            stack.callback(self._forget_signal)
            guard = stack.enter_context(Guard(self.id, [] if self.lock is None else [self.lock]))
            try:
                output = self._start(stack, guard)
                self._watch()
            except BaseException:
                self._kill()
                raise
            self._end_leftovers()  # first, so that no other process holds rank 0's output open
            if output is not None:
                output.join(timeout=5.0)
            self.errors = attempt.read_errors(self.run_dir, self.world_size, self.folder)  # while that folder is there
        self.console.close()
        disconnected = attempt.disconnected(self.ended, self.last_lines)
        return judge(self.ended, self.errors, self.stop_signal, self.forced, self.stopped, disconnected)

    def _forget_signal(self) -> None:
        with contextlib.suppress(OSError):  # such as in a read-only directory; the verdict must still be reported
            (self.logs / SIGNAL_FILE).unlink()

    def variables(self, stack: ExitStack) -> dict[str, str]:
        """Return the variables that all ranks of this start share: its mark, the file of the store where they meet, and the secret
        that proves that they belong together."""
        # The folder's mode is 0700: no other user can pose as a rank, or read which ranks have joined.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dstune-", ignore_cleanup_errors=True))
        self.folder = Path(folder)
        return {LAUNCH_ID: self.id, STORE: str(self.folder / "store"), GROUP_SECRET: secrets.token_hex(32)}

    def shows_output(self, rank: int) -> bool:
        """Return whether the output of `rank` goes to the console too."""
        return rank == 0

    def _start(self, stack: ExitStack, guard: Guard) -> threading.Thread | None:
        """Start every rank; return the thread that copies rank 0's output to the console, if that is shown."""
        self.console.stage(f"starting {self.plan.size} rank{'s' * (self.plan.size > 1)}")
        output: threading.Thread | None = None
        shared = self.variables(stack)
        for rank, (argv, env) in enumerate(zip(self.plan.argv, self.plan.env, strict=True), self.first_rank):
            log = stack.enter_context(files.append(self._log_path(rank)))
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            log.write(f"=== rank {rank} of {self.world_size} on {socket.gethostname()}, {started} ===\n".encode())
            log.flush()
            self.log_starts[rank] = log.tell()
            stdout = None if self.shows_output(rank) else log
            process = self._start_rank(argv, {**env, **shared}, stdout, log)
            self.ranks.append(process)
            guard.watch(process.pid)
            if process.stdout is not None:
                stack.enter_context(process.stdout)
                arguments = (process.stdout.fileno(), self.console, log)
                output = threading.Thread(target=copy, args=arguments, name="output of rank 0", daemon=True)
                output.start()
        return output

    def _start_rank(
        self, argv: Sequence[str], env: Mapping[str, str], stdout: IO[bytes] | None, stderr: IO[bytes]
    ) -> subprocess.Popen[bytes] | warm.ForkedProcess:
        """Start a rank. stdout: None for a pipe."""
        if self.server is not None:
            forked = self.server.start(argv, env, stdout=stdout, stderr=stderr, interrupted=self._is_ending)
            if forked is not None:
                return forked
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def _is_ending(self) -> bool:
        return bool(self.received) or self.ends_others

    def _watch(self) -> None:
        while len(self.ended) < len(self.ranks):
            self._obey_signals()
            if self._note_ends() or self.ends_others:
                self._end_others()
                return
            time.sleep(POLL_SECONDS)

    def _obey_signals(self) -> None:
        """Act on the first request to stop (ask the ranks to save) and on the second (end them at once)."""
        if len(self.received) == 1 and self.stop_signal is None:
            self.stop_signal = self.received[0]
            with contextlib.suppress(OSError):  # such as on a full disk; the ranks then report SIGTERM
                files.write(self.logs / SIGNAL_FILE, self.stop_signal)
            for process in self.ranks:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            action = (
                "saving at the end of this step; again to stop at once without saving" if self.saves else "stopping"
            )
            self.console.message(f"dstune: received {self.stop_signal}: {action}")
        if len(self.received) > 1 and not self.forced:
            self.stop_signal, self.forced = self.received[0], True
            self._kill()  # before anything that writes, which would block if the disk does not answer
            self.console.message("dstune: received a second signal: stopping at once")

    def _note_ends(self, signalled_to_end: bool = False) -> bool:
        """Record the ranks that have ended since the last call, and return whether one of them failed."""
        noted_ranks = {end.rank for end in self.ended}
        new_ends = [
            Ended(rank, code, len(self.ended), signalled_to_end)
            for rank, process in enumerate(self.ranks, self.first_rank)
            if rank not in noted_ranks and (code := process.poll()) is not None
        ]
        self.ended += new_ends
        return any(end.code not in (EXIT_DONE, EXIT_PREEMPTED) for end in new_ends)

    def _end_others(self) -> None:
        """End the other ranks after one died, since they wait for it in a collective.

        They get SIGTERM and `grace_seconds` to end by themselves, then SIGKILL.
        """
        self._note_ends()
        if any(isinstance(error, Stalled) for error in attempt.read_errors(self.run_dir, self.world_size).values()):
            self._ask_for_stacks()
            self._kill()  # they wait for each other, so none of them ends by itself
            return
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_seconds
        while len(self.ended) < len(self.ranks) and time.monotonic() < deadline and not self.forced:
            time.sleep(POLL_SECONDS)
            self._obey_signals()
            self._note_ends(signalled_to_end=True)
        if len(self.ended) < len(self.ranks):
            self._kill()

    def _ask_for_stacks(self) -> None:
        """Ask all ranks to print their stacks after one stalled (`trainer/callbacks/watchdog.py`); wake suspended ones for it."""
        for rank, process in enumerate(self.ranks, self.first_rank):
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT)
                if is_stopped(process.pid):
                    self.stopped.add(rank)
                    process.send_signal(signal.SIGCONT)  # SIGQUIT is delivered before the process continues
        time.sleep(STACKS_SECONDS)
        self._note_ends(signalled_to_end=True)

    def _kill(self) -> None:
        end_all(self.id, self._sessions())
        deadline = time.monotonic() + 1.0
        while any(process.poll() is None for process in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._note_ends(signalled_to_end=True)
        started = range(self.first_rank, self.first_rank + len(self.ranks))
        for rank in {*started} - {end.rank for end in self.ended}:  # stuck in the kernel
            self.ended.append(Ended(rank, -signal.SIGKILL, len(self.ended), signalled_to_end=True))

    def _end_leftovers(self) -> None:
        stuck = end_all(self.id, self._sessions(), polite_seconds=LEFTOVER_SECONDS)
        if stuck:
            self.console.message(f"dstune: {stuck} process(es) of this run are stuck in the kernel and cannot be ended")

    def _sessions(self) -> list[int]:
        return [process.pid for process in self.ranks]

    def _log_path(self, rank: int) -> Path:
        return attempt.log_path(self.run_dir, rank)

    def last_lines(self, rank: int, count: int = attempt.TAIL_LINES) -> list[str]:
        """Return the last lines that `rank` wrote during this launch."""
        return attempt.last_lines(self._log_path(rank), self.log_starts[rank], count)
