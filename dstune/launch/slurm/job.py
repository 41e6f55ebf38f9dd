"""What the script of a SLURM job does before and after its ranks, on the job's first node:
`python -m dstune.launch.slurm.job begin|end RUN_DIR [CODE]`; `... run RUN_DIR COMMAND ...` waits for its agents.
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
from dstune.launch.agents import AGENT, BATCH_NODE, ORDER
from dstune.launch.agents.status import GROUP_FILE, GroupStatus, read_group
from dstune.launch.slurm.script import NOTHING_LEFT, REQUEUE
from dstune.launch.verdict import Verdict

AFTER_SECONDS = 15.0
"""How long srun may take to end after the run is over."""
AGAIN_SECONDS, LONGEST_AGAIN_SECONDS = 3.0, 60.0
"""When the step of a node is started again; twice as long after each that ended as soon as it started."""
LOST_SECONDS = 15.0
"""A node that the leader has been without for so long gets another step: an agent that can still connect does so at once."""
SHORT_SECONDS = 10.0
"""A step that ends sooner could not be started, or its agent could not."""


def main(argv: Sequence[str]) -> int:
    action, folder, *arguments = argv
    if action == "begin":
        return begin(Path(folder), os.environ["SLURM_JOB_ID"])
    if action == "run":
        return run_agents(Path(folder), arguments)
    return end(Path(folder), int(arguments[0]))


def run_agents(run_dir: Path, command: Sequence[str]) -> int:
    """Run an agent on each node of the job until all have ended, or until some time after the run is over: srun waits for a
    node that has died until SLURM notices, which takes minutes.

    command: srun, its options for one node, and the agent's command. Each node has a step of its own, since srun ends a step on
    all nodes when one of them comes back without it, whatever `--no-kill` says. A node that comes back while it is still part
    of the job gets another step. Returns the worst exit code.
    """
    (run_dir / GROUP_FILE).unlink(missing_ok=True)
    srun, *words = command
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    nodes = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()
    steps = []
    for order, node in enumerate(nodes):
        log = run_dir.absolute() / "logs" / f"agent-{order}.log"
        options = [f"--nodelist={node}", f"--output={log}", "--open-mode=append"]
        launch = ".".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
        marks = {AGENT: f"{launch}:{node}", ORDER: str(order), BATCH_NODE: os.environ.get("SLURMD_NODENAME", "")}
        steps.append(NodeStep(node, [srun, *options, *words], {**os.environ, **marks}))
    deadline: float | None = None
    while any(step.process.poll() is None for step in steps):
        group = read_group(run_dir)
        if deadline is None and group is not None and group.is_over:
            deadline = time.monotonic() + AFTER_SECONDS
        if deadline is None:
            for step in steps:
                step.look_after(group)
        elif time.monotonic() > deadline:
            _end([step.process for step in steps])
        time.sleep(0.2)
    codes = [step.process.returncode for step in steps]
    worst = max((code if code >= 0 else 128 - code for code in codes), default=0)
    return 0 if deadline is not None else worst


class NodeStep:
    """The step of one node of the job."""

    def __init__(self, node: str, command: Sequence[str], environment: Mapping[str, str]):
        self._node, self._command, self._environment = node, command, environment
        self._pause = AGAIN_SECONDS
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=self._environment)
        self._started = time.monotonic()
        self._seen: float | None = None
        """When the leader last had the node; None before it had it."""
        self._again: float | None = None
        """When it is started again; None while it runs."""

    def look_after(self, group: GroupStatus | None) -> None:
        """Start the step again a while after it has failed, or after the leader has lost its node. Call it often, while others
        run.

        group: what the leader says. srun waits for ever for a step that ended with its node, where the node comes back
        before SLURM has noticed.
        """
        now = time.monotonic()
        if group is not None and self._node in (*group.training, *group.spare):
            self._seen = now
        code = self.process.poll()
        if code is None and self._seen is not None and now - self._seen > LOST_SECONDS:
            self.process.kill()
            self.process.wait()
        if code in (None, EXIT_DONE):
            return
        if self._again is None:
            is_short = now - self._started < SHORT_SECONDS
            self._pause = min(LONGEST_AGAIN_SECONDS, 2 * self._pause) if is_short else AGAIN_SECONDS
            self._again = now + self._pause
        elif now >= self._again:
            self._start()


def _end(steps: Sequence[subprocess.Popen[bytes]]) -> None:
    for ask in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for step in steps:
            ask(step)
        until = time.monotonic() + AFTER_SECONDS
        while any(step.poll() is None for step in steps) and time.monotonic() < until:
            time.sleep(0.1)


def begin(run_dir: Path, job: str) -> int:
    """Note that this job runs now. `NOTHING_LEFT` for a job of a chain whose run has ended already."""
    launch_before = records.read_launch(run_dir)
    jobs = launch_before.jobs if launch_before else []
    result = records.read_result(run_dir)
    if job in jobs[1:] and result is not None and not _continues(result):
        print(f"dstune: {result.get('status')}: {result.get('reason') or 'nothing is left to do'}")
        return NOTHING_LEFT
    size = launch_before.processes if launch_before else int(os.environ.get("SLURM_NTASKS", "1"))
    leave_secret(run_dir)
    records.begin(run_dir, launch_before.id if launch_before else job, size, jobs if job in jobs else [job], "slurm")
    return EXIT_DONE


def end(run_dir: Path, code: int) -> int:
    """Judge how the ranks ended; leave the result and the report. `REQUEUE` where the run goes on in another job."""
    from dstune.report.command import leave_behind

    launch = records.read_launch(run_dir)
    reason = f"srun ended with exit code {code}"
    verdict = attempt.of_files(run_dir, launch.processes if launch else 1, reason)
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
    """Do what the job's script does at its end, on another node: the one that ran the script is lost, and SLURM ends a job
    with `--no-kill` for no lost node. A job whose script still runs ends before this begins."""
    time.sleep(2 * AFTER_SECONDS + SHORT_SECONDS)
    job = os.environ["SLURM_JOB_ID"]
    words = ["scontrol", "requeue", job] if end(run_dir, code) == REQUEUE else ["scancel", job]
    print(f"dstune: the node with the script of job {job} is lost: {' '.join(words)}", flush=True)
    try:
        failed: int | None = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
    except OSError as error:  # a container has none of SLURM's programs
        failed = error.errno
    if failed:
        print(f"dstune: that was not possible, and the job keeps its nodes: scancel {job}", file=sys.stderr, flush=True)


def _early_signal(code: int) -> str:
    """Return the name of the preemption signal that ended srun: a rank that is still importing dies of it, and has lost nothing.
    Empty for every other end, SIGTERM included: srun sends it to the other ranks when one has failed, and a job that fails at
    its start must not be requeued for ever."""
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(code - 128, "")
    return name if name in PREEMPTION_SIGNALS and name != "SIGTERM" else ""


def _continues(result: dict[str, object]) -> bool:
    """Return whether the run was interrupted by the clock, not by somebody's wish."""
    return result.get("status") == "preempted" and STOP_REASON not in str(result.get("reason"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
