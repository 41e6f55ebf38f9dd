"""The steps of a SLURM job's script, which runs on the job's first node: `python -m dstune.launch.slurm.job ...`

begin RUN_DIR             before the ranks
run RUN_DIR SRUN ...      start an agent on each node, and wait for all of them
end RUN_DIR CODE          after the ranks
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstune.config.schema import PREEMPTION_SIGNALS
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, UserError
from dstune.core.paths import STOP_REASON
from dstune.core.rendezvous import leave_secret
from dstune.launch import attempt, records
from dstune.launch.agents import BATCH_NODE, ORDER
from dstune.launch.agents.status import GROUP_FILE, GroupStatus, read_group
from dstune.launch.slurm.script import NOTHING_LEFT, REQUEUE
from dstune.launch.verdict import Verdict

AFTER_SECONDS = 15.0
"""How long srun may take to end after the run is over."""
RESTART_SECONDS, LONGEST_RESTART_SECONDS = 3.0, 60.0
"""How long to wait before a node's step is restarted; the wait doubles after each step that ended as soon as it started."""
LOST_SECONDS = 15.0
"""A node that the leader has lost for this long gets a new step, because an agent that can still connect does so at once."""
SHORT_SECONDS = 10.0
"""A step that ends sooner than this failed to start, or its agent did."""


def main(argv: Sequence[str]) -> int:
    action, folder, *arguments = argv
    if action == "begin":
        return begin(Path(folder), os.environ["SLURM_JOB_ID"])
    if action == "run":
        return run_agents(Path(folder), arguments)
    return end(Path(folder), int(arguments[0]))


def run_agents(run_dir: Path, command: Sequence[str]) -> int:
    """Run an agent on each node of the job until all have ended, and return the worst exit code.

    Once the run is over, waits at most `AFTER_SECONDS` and returns 0: srun would wait for a dead node until SLURM notices, which
    takes minutes. Each node has its own job step, because srun ends a step on all nodes if one of them comes back without it,
    even with `--no-kill`. A node that comes back while it still belongs to the job gets a new step.

    command: srun, its options for one node, and the agent's command.
    """
    (run_dir / GROUP_FILE).unlink(missing_ok=True)
    srun, *words = command
    list_nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    nodes = subprocess.run(list_nodes, capture_output=True, text=True, check=True).stdout.split()
    steps = []
    for order, node in enumerate(nodes):
        log = run_dir.absolute() / "logs" / f"agent-{order}.log"
        options = [f"--nodelist={node}", f"--output={log}", "--open-mode=append"]
        variables = {ORDER: str(order), BATCH_NODE: os.environ.get("SLURMD_NODENAME", "")}
        steps.append(NodeStep(node, [srun, *options, *words], {**os.environ, **variables}))
    deadline: float | None = None
    while any(step.process.poll() is None for step in steps):
        group = read_group(run_dir)
        if deadline is None and group is not None and group.is_over:
            deadline = time.monotonic() + AFTER_SECONDS
        if deadline is None:
            for step in steps:
                step.restart_if_due(group)
        elif time.monotonic() > deadline:
            _end([step.process for step in steps])
        time.sleep(0.2)
    codes = [step.process.returncode for step in steps]
    worst = max((code if code >= 0 else 128 - code for code in codes), default=0)
    return 0 if deadline is not None else worst


class NodeStep:
    """The job step of one node, which runs the node's agent and is restarted when it fails."""

    def __init__(self, node: str, command: Sequence[str], environment: Mapping[str, str]):
        self._node, self._command, self._environment = node, command, environment
        self._pause = RESTART_SECONDS
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=self._environment)
        self._started = time.monotonic()
        self._last_connected: float | None = None
        """When the leader was last connected to the node; None if it has not been yet."""
        self._restart_at: float | None = None
        """When the step will be restarted; None while it runs."""

    def restart_if_due(self, group: GroupStatus | None) -> None:
        """Restart the step a while after it has failed or the leader has lost its node. Must be called several times a second.

        group: the state of the nodes, as the leader wrote it.
        """
        now = time.monotonic()
        if group is not None and self._node in (*group.training, *group.spare):
            self._last_connected = now
        code = self.process.poll()
        if code is None and self._last_connected is not None and now - self._last_connected > LOST_SECONDS:
            # If a node comes back before SLURM has noticed its loss, srun waits forever for the step that was lost with it.
            self.process.kill()
            self.process.wait()
        if code in (None, EXIT_DONE):
            return
        if self._restart_at is None:
            is_short = now - self._started < SHORT_SECONDS
            self._pause = min(LONGEST_RESTART_SECONDS, 2 * self._pause) if is_short else RESTART_SECONDS
            self._restart_at = now + self._pause
        elif now >= self._restart_at:
            self._start()


def _end(steps: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate the steps, and kill those that still run after `AFTER_SECONDS`."""
    for end_process in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for step in steps:
            end_process(step)
        deadline = time.monotonic() + AFTER_SECONDS
        while any(step.poll() is None for step in steps) and time.monotonic() < deadline:
            time.sleep(0.1)


def begin(run_dir: Path, job: str) -> int:
    """Record that this job runs now, and return 0; `NOTHING_LEFT` for a job of a chain whose run has already ended."""
    launch = records.read_launch(run_dir)
    jobs = launch.jobs if launch else []
    result = records.read_result(run_dir)
    if job in jobs[1:] and result is not None and not _continues(result):
        print(f"dstune: {result.get('status')}: {result.get('reason') or 'nothing is left to do'}")
        return NOTHING_LEFT
    size = launch.processes if launch else int(os.environ.get("SLURM_NTASKS", "1"))
    leave_secret(run_dir)
    records.begin(run_dir, launch.id if launch else job, size, jobs if job in jobs else [job], "slurm")
    return EXIT_DONE


def end(run_dir: Path, code: int) -> int:
    """Judge how the ranks ended, write the result and the report, and return the exit code; `REQUEUE` to continue in a new job.

    code: exit code of srun.
    """
    from dstune.report.command import leave_behind

    launch = records.read_launch(run_dir)
    reason = f"srun ended with exit code {code}"
    verdict = attempt.judge_files(run_dir, launch.processes if launch else 1, reason)
    if verdict.reason == reason and (name := _early_signal(code)):
        verdict = Verdict(EXIT_PREEMPTED, f"received {name} before training began")
    attempt.record(run_dir, verdict, launch.processes if launch else 1)
    leave_behind(run_dir, print)
    if isinstance(verdict.error, UserError):
        print(f"dstune: {verdict.error}", file=sys.stderr)
    elif verdict.exit_code == EXIT_FAILED:
        print(f"dstune: {verdict.reason}", file=sys.stderr)
    result = records.read_result(run_dir) or {}
    return REQUEUE if verdict.exit_code == EXIT_PREEMPTED and _continues(result) else verdict.exit_code


def end_without_script(run_dir: Path, code: int) -> None:
    """End the job on behalf of its script, after the node that ran the script was lost.

    SLURM itself does not end a job with `--no-kill` when a node is lost.
    """
    time.sleep(
        2 * AFTER_SECONDS + SHORT_SECONDS
    )  # if the script still runs after all, it ends the job within this time
    job = os.environ["SLURM_JOB_ID"]
    words = ["scontrol", "requeue", job] if end(run_dir, code) == REQUEUE else ["scancel", job]
    print(f"dstune: the node with the script of job {job} is lost: {' '.join(words)}", flush=True)
    try:
        code_of_slurm: int | None = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
    except OSError as error:  # a container does not have SLURM's programs
        code_of_slurm = error.errno
    if code_of_slurm:
        text = f"dstune: `{' '.join(words)}` failed, and the job keeps its nodes; end it by hand: scancel {job}"
        print(text, file=sys.stderr, flush=True)


def _early_signal(code: int) -> str:
    """Return the name of the preemption signal that ended srun, or an empty string for any other end.

    A rank that is still importing dies of such a signal, without having lost anything. SIGTERM does not count: srun sends it to
    the other ranks when one has failed, and a job that fails at its start must not be requeued forever.
    """
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(code - 128, "")
    return name if name in PREEMPTION_SIGNALS and name != "SIGTERM" else ""


def _continues(result: dict[str, object]) -> bool:
    """Return whether the run was preempted, and not stopped by a user."""
    return result.get("status") == "preempted" and STOP_REASON not in str(result.get("reason"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
