"""A launch on hosts: checks them, keeps an agent running on each over ssh, and shows the output of rank 0 and the leader.

The ssh connection to each host stays open. When it breaks, the agent there ends its ranks; so all ranks end when this process
ends, however it ends. A stop file in the run directory asks the ranks to save.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core import files
from dstune.core.child_python import python_path
from dstune.core.confinement.here import readable
from dstune.core.errors import EXIT_FAILED, Problem, UserError
from dstune.launch import attempt, records
from dstune.launch.agents.leader import MESSAGES
from dstune.launch.agents.status import GROUP_FILE, read_group
from dstune.launch.agents.task import Task
from dstune.launch.attempt import Follower, log_path
from dstune.launch.console import Console
from dstune.launch.hostfile.commands import host_tasks
from dstune.launch.hosts import Ssh
from dstune.launch.remote import LAUNCHER_LOG, check_hosts, on_cpu
from dstune.launch.remote_commands import ssh_of
from dstune.launch.signals import StopFile, caught_signals
from dstune.launch.verdict import Verdict
from dstune.protocols.launcher import LaunchRequest

if TYPE_CHECKING:
    from dstune.launch.hostfile import Hostfile

POLL_SECONDS = 0.1
READY_SECONDS = 60.0
REOPEN_SECONDS = 3.0
"""Time between two attempts to reach a lost host."""
LEAVING_SECONDS = 15.0
"""How long agents may take to exit after the run is over; the agent of a lost host never does."""
ENDING_SECONDS = 35.0
"""How long agents may take to end their ranks when they are asked to exit."""


def run(launcher: Hostfile, request: LaunchRequest, launch_id: str) -> int:
    """Train on the hosts, and return the exit code of the public contract. Raises UserError."""
    launch, config, run_dir, console = launcher.config, request.run, request.run_dir, request.console
    if shutil.which("ssh") is None:
        fix = "install it (Debian: apt-get install openssh-client)"
        raise UserError(Problem("launch=hostfile", "there is no ssh on this machine", fix))
    slots = launcher.slots()
    answers = check_hosts(list(slots), ssh_of(launch), run_dir, launch.interface, console)
    tasks = host_tasks(
        config,
        run_dir,
        slots,
        launch_id=launch_id,
        parent=os.environ,
        on_cpu=on_cpu(answers),
        command=request.command or ["dstune.worker"],
        saves=request.saves,
    )
    hosts = AgentsOnHosts(tasks, ssh_of(launch), run_dir, console)
    with caught_signals(config.run.signals) as received:
        verdict = hosts.run(received)
    attempt.record(run_dir, verdict, hosts.size)
    attempt.explain(run_dir, verdict, console, hosts.starts)
    return verdict.exit_code


class AgentsOnHosts:
    """The agents of one launch, from the first ssh connection to the end of the last agent."""

    def __init__(self, tasks: Sequence[Task], ssh: Ssh, run_dir: Path, console: Console):
        self.tasks, self.ssh, self.run_dir, self.console = tasks, ssh, run_dir, console
        self.size = sum(task.ranks for task in tasks[: tasks[0].settings.nodes])
        """Ranks that train while all nodes are there."""
        self.starts = {rank: attempt.size(log_path(run_dir, rank)) for rank in range(self.size)}
        self.stop = StopFile(run_dir, console)
        self._log = run_dir / "logs" / LAUNCHER_LOG
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._opened: dict[str, float] = {}

    def run(self, received: Sequence[str]) -> Verdict:
        self.stop.remove()
        records.begin(self.run_dir, self.tasks[0].launch, self.size)
        (self.run_dir / "launch").mkdir(exist_ok=True)
        (self.run_dir / GROUP_FILE).unlink(missing_ok=True)
        followers = [
            Follower(path, self.console) for path in (self.run_dir / "logs" / MESSAGES, log_path(self.run_dir, 0))
        ]
        count = len(self.tasks)
        self.console.stage(f"starting agents on {count} host{'s' * (count > 1)}")
        try:
            self._open_all()
            self._watch(followers, received)
        finally:
            self._close()
        for follower in followers:
            follower.end()
        self.stop.remove()
        if self.stop.forced:
            return Verdict(EXIT_FAILED, "stopped at once by a second signal")
        return attempt.judge_files(self.run_dir, self.size, f"the agents ended without a result; see {self._log}")

    def _open_all(self) -> None:
        """Start the agents of all hosts and wait until they are ready. Raises UserError if a host does not start its agent."""
        log_start = attempt.size(self._log)
        for task in self.tasks:
            self._open(task)
        for host, agent in self._agents.items():
            assert agent.stdout is not None
            if not readable(agent.stdout, READY_SECONDS) or b"ready" not in agent.stdout.readline():
                last = next(iter(attempt.last_lines(self._log, log_start, 1)), "no reason given")
                reason = f"dstune does not start on this host: {last}"
                fix = f"try this on that host: {sys.executable} -m dstune --version"
                raise UserError(Problem("launch.hostfile", reason, fix, host))

    def _open(self, task: Task) -> None:
        environment = [f"PYTHONPATH={python_path('')}", "PYTHONSAFEPATH=1"]
        words = ["env", *environment, sys.executable, "-u", "-m", "dstune.launch.agents"]
        with files.append(self._log) as log:
            agent = subprocess.Popen(
                self.ssh.command(task.node, words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert agent.stdin is not None
        with contextlib.suppress(OSError):  # ssh may have ended already, which whoever waits for the agent notices
            agent.stdin.write(f"{json.dumps(asdict(task))}\n".encode())
            agent.stdin.flush()
        self._agents[task.node], self._opened[task.node] = agent, time.monotonic()

    def _watch(self, followers: Sequence[Follower], received: Sequence[str]) -> None:
        """Wait until the run is over and its agents have left, or a second signal asks for the end at once."""
        deadline: float | None = None
        while True:
            for follower in followers:
                follower.look()
            self.stop.look(received)
            if self.stop.forced:
                return
            if deadline is None and (group := read_group(self.run_dir)) is not None and group.is_over:
                deadline = time.monotonic() + LEAVING_SECONDS
            ended = [task for task in self.tasks if self._agents[task.node].poll() is not None]
            if len(ended) == len(self.tasks) and (
                deadline or all(self._agents[task.node].returncode == 0 for task in ended)
            ):
                return
            if deadline is not None and time.monotonic() > deadline:
                return
            for task in ended if deadline is None else ():
                agent = self._agents[task.node]
                if agent.returncode != 0 and time.monotonic() - self._opened[task.node] > REOPEN_SECONDS:
                    self._close_pipes(agent)
                    self._open(task)
            time.sleep(POLL_SECONDS)

    def _close(self) -> None:
        """Ask every agent to end its remaining ranks and exit, and wait for it."""
        for agent in self._agents.values():
            assert agent.stdin is not None
            with contextlib.suppress(OSError):
                agent.stdin.close()
        deadline = time.monotonic() + ENDING_SECONDS
        for agent in self._agents.values():
            try:
                agent.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
            self._close_pipes(agent)

    def _close_pipes(self, agent: subprocess.Popen[bytes]) -> None:
        for pipe in (agent.stdin, agent.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
