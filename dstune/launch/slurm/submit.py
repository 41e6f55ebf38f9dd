"""`launch=slurm`: writes and submits the job's script, then shows rank 0's output until the job ends, or returns at once."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, Problem, UserError
from dstune.core.paths import STOP_FILE
from dstune.launch import attempt, records
from dstune.launch.agents.leader import MESSAGES
from dstune.launch.attempt import Follower, log_path
from dstune.launch.commands import inherited
from dstune.launch.console import Console
from dstune.launch.signals import caught_signals
from dstune.launch.slurm import jobs as queue
from dstune.launch.slurm.config import SlurmConfig
from dstune.launch.slurm.script import SCRIPT, job_script
from dstune.launch.verdict import Verdict
from dstune.protocols.launcher import Unreachable

LOOK_SECONDS = 0.2
ASK_SECONDS, PATIENT_SECONDS, IMPATIENT_FOR = 1.0, 10.0, 60.0
"""Time between two queries of SLURM: the first for IMPATIENT_FOR seconds after the start and after each change, then the second,
because the controller serves everybody."""
SHARED_SECONDS = 10.0
"""How long files of the job's node may take to appear here. (NFS caches attributes for up to a minute, but a new file in a folder
that was not listed before appears at once.)"""


def run(
    config: RunConfig, launch: SlurmConfig, run_dir: Path, *, console: Console, module: str = "dstune.worker"
) -> int:
    """Submit the run, wait for it if `launch.wait`, and return the exit code of the public contract.

    module: each rank runs it, with the run directory as its argument.

    Raises:
        UserError: sbatch refuses the job, or a rank raised one.
    """
    size = launch.size
    starts = {rank: attempt.size(log_path(run_dir, rank)) for rank in range(size)}
    follower = Follower(log_path(run_dir, 0), console)
    messages_follower = Follower(run_dir / "logs" / MESSAGES, console)
    jobs = submit(config, launch, run_dir, module)
    job_list = f"jobs {', '.join(jobs)}" if len(jobs) > 1 else f"job {jobs[0]}"
    console.stage(f"submitted {job_list}: {launch.nodes} node(s) x {launch.ranks_per_node} rank(s), {run_dir / SCRIPT}")
    if not launch.wait:
        console.message(f"dstune: follow it with `dstune status {run_dir}`, stop it with `dstune cancel {run_dir}`")
        return EXIT_DONE
    verdict = wait(jobs, run_dir, size, [messages_follower, follower], console)
    if verdict is None:
        return EXIT_DONE
    attempt.record(run_dir, verdict, size)
    attempt.explain(run_dir, verdict, console, starts)
    return verdict.exit_code


def submit(config: RunConfig, launch: SlurmConfig, run_dir: Path, module: str = "dstune.worker") -> list[str]:
    """Write the script, submit it `launch.chain` times, and return the ids of the jobs. Raises UserError."""
    queue.require("sbatch")
    script = run_dir / SCRIPT
    script.parent.mkdir(exist_ok=True)
    content = job_script(config, launch, run_dir, os.environ, module)
    files.write(script, content, mode=0o777)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    size = launch.size
    launch_id = uuid.uuid4().hex
    # Before submission, since the job may be over before the next line runs.
    records.begin(run_dir, launch_id, size)
    env = {**os.environ, **inherited(config, os.environ)}
    jobs: list[str] = []
    try:
        for _ in range(launch.chain):
            jobs.append(queue.submit(content, env, after=jobs[-1] if jobs else None))
            records.note(run_dir, launch_id, size, jobs, launch.name)
    except UserError as error:  # the launch fails, so no job of its chain may run
        try:
            if jobs:
                queue.cancel(jobs)
        except Unreachable as unreachable:
            reason = f"its first jobs could not be cancelled and may run: {unreachable}"
            problem = Problem("launch.chain", reason, f"scancel {' '.join(jobs)}")
            raise UserError([*error.problems, problem]) from None
        raise
    return jobs


def wait(
    jobs: Sequence[str], run_dir: Path, size: int, followers: Sequence[Follower], console: Console
) -> Verdict | None:
    """Wait until the last job is over, and return the verdict; None if the terminal was closed, which the jobs survive."""
    last_text, changed, queried, end_text = "", time.monotonic(), 0.0, ""
    with caught_signals() as received:
        handled_signals = 0
        while not end_text:
            for follower in followers:
                follower.look()
            if "SIGHUP" in received:
                return None
            if len(received) > handled_signals:
                handled_signals = len(received)
                _stop(jobs, run_dir, console, received)
                queried = 0.0
            now = time.monotonic()
            if now - queried >= (ASK_SECONDS if now - changed < IMPATIENT_FOR or received else PATIENT_SECONDS):
                queried = now
                try:
                    reported_jobs = queue.ask(jobs)
                except Unreachable as error:
                    text = f"SLURM does not answer ({error}); still waiting"
                else:
                    unfinished_jobs = [job for job in reported_jobs if not job.is_over]
                    current_jobs = unfinished_jobs[:1] or reported_jobs[-1:]
                    text = str(current_jobs[0]) if current_jobs else "the job is over"
                    end_text = "" if unfinished_jobs else text
                if text != last_text and not end_text:
                    console.stage(text)
                    last_text, changed = text, now
            time.sleep(LOOK_SECONDS)
    deadline = time.monotonic() + SHARED_SECONDS
    while not records.result_path(run_dir).exists() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    for follower in followers:
        follower.end()
    return _judge(run_dir, size, end_text, jobs, received)


def _judge(run_dir: Path, size: int, end_text: str, jobs: Sequence[str], received: Sequence[str]) -> Verdict:
    verdict = attempt.judge_files(run_dir, size, f"{end_text}; its output is in {run_dir}/logs/slurm-{jobs[-1]}.log")
    if records.read_result(run_dir) is None and received and verdict.error is None:
        return Verdict(EXIT_PREEMPTED, f"received {received[0]} before training began")
    return verdict


def _stop(jobs: Sequence[str], run_dir: Path, console: Console, received: Sequence[str]) -> None:
    if len(received) > 1:
        console.message("dstune: received a second signal: the job is cancelled without saving")
        try:
            queue.cancel(jobs)
        except Unreachable as error:
            console.message(f"dstune: SLURM does not answer ({error}); send the signal again to repeat the request")
        return
    message = f"received {received[0]}: saving at the end of this step; again to stop at once without saving"
    console.message(f"dstune: {message}")
    with contextlib.suppress(Unreachable):  # the next signal repeats the request
        queue.ask_to_stop(jobs, run_dir)
