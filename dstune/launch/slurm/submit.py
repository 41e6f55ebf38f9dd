"""`launch=slurm`: writes the job's script, submits it, shows rank 0's output and waits, or leaves the job to SLURM."""

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
"""How often SLURM is asked: often at first and after a change, seldom later, since the controller serves everybody."""
SHARED_SECONDS = 10.0
"""How long files of the job's node may take to be seen here (attribute caches of NFS last up to a minute, but a new
file in a folder that was not listed is found at once)."""


def run(
    config: RunConfig, launch: SlurmConfig, run_dir: Path, *, console: Console, module: str = "dstune.worker"
) -> int:
    """Submit the run and wait for it, or not (`launch.wait`); the exit code of the public contract.

    module: what each rank runs with the directory as its argument.

    Raises:
        UserError: sbatch refuses, or the ranks found the user's mistake.
    """
    size = launch.size
    starts = {rank: attempt.size(log_path(run_dir, rank)) for rank in range(size)}
    follower = Follower(log_path(run_dir, 0), console)
    events = Follower(run_dir / "logs" / MESSAGES, console)
    jobs = submit(config, launch, run_dir, module)
    many = f"jobs {', '.join(jobs)}" if len(jobs) > 1 else f"job {jobs[0]}"
    console.stage(f"submitted {many}: {launch.nodes} node(s) x {launch.ranks_per_node} rank(s), {run_dir / SCRIPT}")
    if not launch.wait:
        console.message(f"dstune: look with `dstune status {run_dir}`, stop with `dstune cancel {run_dir}`")
        return EXIT_DONE
    verdict = wait(jobs, run_dir, size, [events, follower], console)
    if verdict is None:
        return EXIT_DONE
    attempt.record(run_dir, verdict, size)
    attempt.explain(run_dir, verdict, console, starts)
    return verdict.exit_code


def submit(config: RunConfig, launch: SlurmConfig, run_dir: Path, module: str = "dstune.worker") -> list[str]:
    """Write the script and submit it, as often as `launch.chain` says; the numbers of the jobs. Raises UserError."""
    queue.require("sbatch")
    script = run_dir / SCRIPT
    script.parent.mkdir(exist_ok=True)
    content = job_script(config, launch, run_dir, os.environ, module)
    files.write(script, content, mode=0o777)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    size = launch.size
    launch_id = uuid.uuid4().hex
    # Before the job can start, since it may be over before the next line is reached.
    records.begin(run_dir, launch_id, size)
    env = {**os.environ, **inherited(config, os.environ)}
    jobs: list[str] = []
    try:
        for _ in range(launch.chain):
            jobs.append(queue.submit(script, content, env, after=jobs[-1] if jobs else None))
            records.note(run_dir, launch_id, size, jobs, launch.name)
    except UserError as error:  # the launch is undone now, so no part of its chain may run
        try:
            if jobs:
                queue.cancel(jobs)
        except Unreachable as left:
            problem = Problem("launch.chain", f"its first jobs may run: {left}", f"scancel {' '.join(jobs)}")
            raise UserError([*error.problems, problem]) from None
        raise
    return jobs


def wait(
    jobs: Sequence[str], run_dir: Path, size: int, followers: Sequence[Follower], console: Console
) -> Verdict | None:
    """Wait until the last job is over. None where the terminal went away: the jobs do not need this process."""
    last_text, changed, queried, over = "", time.monotonic(), 0.0, ""
    with caught_signals() as received:
        answered = 0
        while not over:
            for follower in followers:
                follower.look()
            if "SIGHUP" in received:
                return None
            if len(received) > answered:
                answered = len(received)
                _stop(jobs, run_dir, console, received)
                queried = 0.0
            now = time.monotonic()
            if now - queried >= (ASK_SECONDS if now - changed < IMPATIENT_FOR or received else PATIENT_SECONDS):
                queried = now
                try:
                    jobs_seen = queue.ask(jobs)
                except Unreachable as error:
                    text = f"SLURM does not answer ({error}); still waiting"
                else:
                    running = [job for job in jobs_seen if not job.is_over]
                    text = str(running[0] if running else jobs_seen[-1] if jobs_seen else "the job is over")
                    over = "" if running else text
                if text != last_text and not over:
                    console.stage(text)
                    last_text, changed = text, now
            time.sleep(LOOK_SECONDS)
    deadline = time.monotonic() + SHARED_SECONDS
    while not records.result_path(run_dir).exists() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    for follower in followers:
        follower.end()
    return _judge(run_dir, size, over, jobs, received)


def _judge(run_dir: Path, size: int, over: str, jobs: Sequence[str], received: Sequence[str]) -> Verdict:
    verdict = attempt.of_files(run_dir, size, f"{over}; its output is in {run_dir}/logs/slurm-{jobs[-1]}.log")
    if records.read_result(run_dir) is None and received and verdict.error is None:
        return Verdict(EXIT_PREEMPTED, f"received {received[0]} before training began")
    return verdict


def _stop(jobs: Sequence[str], run_dir: Path, console: Console, received: Sequence[str]) -> None:
    if len(received) > 1:
        console.message("dstune: received a second signal: the job is cancelled without saving")
        try:
            queue.cancel(jobs)
        except Unreachable as error:
            console.message(f"dstune: SLURM does not answer ({error}); another signal asks it again")
        return
    message = f"received {received[0]}: saving at the end of this step; again to stop at once without saving"
    console.message(f"dstune: {message}")
    with contextlib.suppress(Unreachable):  # asked again by the next signal
        queue.ask_to_stop(jobs, run_dir)
