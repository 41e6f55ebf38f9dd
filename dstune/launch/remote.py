"""A launch on hosts through another launcher, such as mpirun: checks the nodes, starts the launcher, and watches nodes and ranks.

An ssh connection to every node stays open (`node.py`). When it breaks, the node is lost; when this process ends, however it
ends, the nodes end their ranks. A stop file in the run directory asks the ranks to save.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.child_python import python_path
from dstune.core.confinement.here import readable
from dstune.core.errors import EXIT_FAILED, Problem, UserError
from dstune.core.rank_env import LAUNCH_ID
from dstune.launch import attempt, hosts, records
from dstune.launch.attempt import Follower, log_path
from dstune.launch.console import Console
from dstune.launch.hosts import Answer, Ssh
from dstune.launch.local.restarts import Restarts
from dstune.launch.on_hosts_config import OnHostsConfig
from dstune.launch.processes import end_all
from dstune.launch.remote_commands import RemotePlan, ssh_of
from dstune.launch.signals import StopFile, caught_signals
from dstune.launch.verdict import Verdict, exit_reason

POLL_SECONDS = 0.1
READY_SECONDS = 60.0
LEAVING_SECONDS = 30.0
"""How long the launcher may take to end after the run has written its result."""
LAUNCHER_LOG = "launcher.log"
LOCALHOST = "localhost"


def run(
    config: RunConfig,
    run_dir: Path,
    launch: OnHostsConfig,
    plan: Callable[[str], RemotePlan],
    console: Console,
    restarts: int = 0,
) -> int:
    """Start the ranks, wait for them, and return the exit code of the public contract. Raises UserError.

    plan: returns what to start, given the id of an attempt. restarts: how often a failed attempt is followed by another.
    """
    with caught_signals(config.run.signals) as received:
        restart_policy = Restarts(restarts, run_dir, console, received)
        while True:
            launch_id = uuid.uuid4().hex
            remote = RemoteLaunch(plan(launch_id), ssh_of(launch), run_dir, launch_id, launch.grace_seconds, console)
            verdict, starts_again = restart_policy.consider(remote.run(received), remote)
            if not starts_again:
                break
    try:
        attempt.record(run_dir, verdict, remote.plan.size)
    except OSError as error:  # the verdict below matters more than this
        console.message(f"dstune: the result cannot be written: {error}")
    attempt.explain(run_dir, verdict, console, remote.starts)
    if verdict.exit_code == EXIT_FAILED and verdict.error is None:
        remote.show_launcher_log()
    return verdict.exit_code


def on_cpu(answers: Sequence[Answer]) -> bool:
    """Return whether ranks train on CPUs: GPUs are hidden here, or no host has one."""
    are_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return are_hidden or not any(answer.facts and answer.facts["gpus"] for answer in answers)


def check_hosts(names: list[str], ssh: Ssh, run_dir: Path, interface: str | None, console: Console) -> list[Answer]:
    """Ask every host for its versions, GPUs and interfaces; warn about clocks that differ.

    Raises:
        UserError: everything that prevents the hosts from running ranks together.
    """
    console.stage(f"checking {', '.join(names)}")
    paths = [hosts.package_folder()]
    answers = hosts.ask(names, ssh, paths)
    problems = hosts.compare(answers, paths)
    reached = [answer.host for answer in answers if answer.facts is not None]
    if reached:
        problems += hosts.check_shared_folder(reached, ssh, run_dir)
    for answer in answers:
        if interface and answer.facts is not None and interface not in answer.facts["interfaces"]:
            interfaces = ", ".join(answer.facts["interfaces"])
            reason = f"{answer.host} has no such interface with an IPv4 address"
            problems.append(Problem("launch.interface", reason, f"one of {interfaces}", interface))
    if problems:
        raise UserError(problems)
    for host, seconds in hosts.common_skew(answers).items():
        console.message(f"dstune: warning: the clock of {host} is off by {seconds:+.1f} s")
    return answers


class RemoteLaunch:
    """One start of all ranks through another launcher."""

    def __init__(
        self, plan: RemotePlan, ssh: Ssh, run_dir: Path, launch_id: str, grace_seconds: float, console: Console
    ):
        self.plan, self.ssh, self.run_dir, self.id = plan, ssh, run_dir, launch_id
        self.grace_seconds, self.console = grace_seconds, console
        self.folder = run_dir / "launch"
        self.log = run_dir / "logs" / LAUNCHER_LOG
        self.starts = {rank: attempt.size(log_path(run_dir, rank)) for rank in range(plan.size)}
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.lost: list[str] = []
        self.stop = StopFile(run_dir, console)

    def run(self, received: Sequence[str]) -> Verdict:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop.remove()
        records.begin(self.run_dir, self.id, self.plan.size)
        follower = Follower(log_path(self.run_dir, 0), self.console)
        count = len(self.plan.slots)
        self.console.stage(f"starting {self.plan.size} rank(s) on {count} host{'s' * (count > 1)}")
        self._log_start = attempt.size(self.log)
        try:
            self._open_nodes()
            with files.append(self.log) as log:
                launcher = subprocess.Popen(
                    self.plan.argv,
                    env={**self.plan.env, LAUNCH_ID: self.id},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                self._watch(launcher, follower, received)
            finally:
                # SIGKILL to its session: no handler of the launcher runs, and no ssh keeps the output of ranks open.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
        finally:
            self._close_nodes()
            end_all(self.id, patience=5.0)
        follower.end()
        return self._judge(launcher.returncode)

    def _open_nodes(self) -> None:
        """Open an ssh connection to each node, whose end makes the node end its ranks. Raises UserError if one does not open."""
        environment = [f"PYTHONPATH={python_path('')}", "PYTHONSAFEPATH=1"]
        words = ["env", *environment, sys.executable, "-u", "-m", "dstune.launch.node", self.id]
        for host in self.plan.slots:
            # Without a hostfile the node is this machine, and the program runs without ssh.
            command = words if host == LOCALHOST else self.ssh.command(host, words)
            with files.append(self.log) as log:
                node = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )
            assert node.stdin is not None
            node.stdin.write(f"{json.dumps(self.plan.handoff)}\n".encode())
            node.stdin.flush()
            self.nodes[host] = node
        for host, node in self.nodes.items():
            assert node.stdout is not None
            if not readable(node.stdout, READY_SECONDS) or b"ready" not in node.stdout.readline():
                last = next(iter(attempt.last_lines(self.log, self._log_start, 1)), "no reason given")
                reason = f"dstune does not start on this host: {last}"
                fix = f"try this on that host: {sys.executable} -m dstune --version"
                raise UserError(Problem("launch.hostfile", reason, fix, host))

    def _watch(self, launcher: subprocess.Popen[bytes], follower: Follower, received: Sequence[str]) -> None:
        """Wait until the launcher has ended or must be ended, because a host was lost or because it outlives the run."""
        deadline: float | None = None
        while launcher.poll() is None:
            follower.look()
            self.stop.look(received)
            self.lost = [host for host, node in self.nodes.items() if node.poll() is not None]
            if self.lost or self.stop.forced:
                return
            if deadline is None and self._is_over():
                has_result = records.read_result(self.run_dir) is not None
                deadline = time.monotonic() + (LEAVING_SECONDS if has_result else self.grace_seconds)
            if deadline is not None and time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)

    def _is_over(self) -> bool:
        """Return whether the run has a result, or a rank failed, so that the others would wait for it forever."""
        return records.read_result(self.run_dir) is not None or bool(attempt.read_errors(self.run_dir, self.plan.size))

    def _close_nodes(self) -> None:
        """Ask every node to end its remaining processes of the launch, and wait for it."""
        for node in self.nodes.values():
            assert node.stdin is not None
            with contextlib.suppress(OSError):
                node.stdin.close()
        for node in self.nodes.values():
            try:
                node.wait(timeout=35.0)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()

    def _judge(self, code: int) -> Verdict:
        self.stop.remove()
        if self.stop.forced:
            return Verdict(EXIT_FAILED, "stopped at once by a second signal")
        if self.lost and records.read_result(self.run_dir) is None:
            names = ", ".join(self.lost)
            reason = f"{names} was lost: the connection to it broke, and the ranks elsewhere were ended"
            return Verdict(EXIT_FAILED, reason)
        return attempt.judge_files(self.run_dir, self.plan.size, f"the launcher {exit_reason(code)}")

    def last_lines(self, rank: int, count: int = attempt.TAIL_LINES) -> list[str]:
        """Return the last lines that `rank` wrote during this launch."""
        return attempt.last_lines(log_path(self.run_dir, rank), self.starts.get(rank, 0), count)

    def show_launcher_log(self) -> None:
        """Show the last lines that the launcher itself wrote."""
        self.console.message(f"last lines of {self.log}:")
        for line in attempt.last_lines(self.log, self._log_start) or ["(it wrote nothing)"]:
            self.console.message(f"  | {line}")
