"""Runs SLURM's commands: submits, queries and cancels jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.paths import STOP_FILE, STOP_REASON
from dstune.launch import records
from dstune.protocols.launcher import FAIL, PASS, SKIP, Check, Queue, Unreachable

FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}
FINAL |= {"DEADLINE", "REVOKED"}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
SECONDS = 60
"""Limit of a command."""
MOST_IDS = 1000
"""Job ids on a command line."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str
    """PENDING, RUNNING, COMPLETING, ... as squeue names it."""
    reason: str
    """Why it waits; for a job that does not wait, its nodes."""

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    def __str__(self) -> str:
        if self.is_waiting:
            return f"job {self.id} waits in the queue ({self.reason})"
        if self.is_over:
            return f"job {self.id} ended as {self.state}"
        return f"job {self.id} is {self.state.lower()} on {self.reason}"


def submit(content: str, env: Mapping[str, str], after: str | None = None) -> str:
    """Submit a job and return its number.

    content: the text of the job script; its file may have been changed since it was written, and is removed with a refused run.
    after: the number of a job whose end this job waits for.

    Raises:
        UserError: there is no sbatch here, it does not answer, or it refuses the job; the message has sbatch's own words.
    """
    require("sbatch")
    dependency = [f"--dependency=afterany:{after}"] if after else []
    command = ["sbatch", "--parsable", *dependency]
    try:
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=SECONDS, env=dict(env))
    except subprocess.TimeoutExpired:
        reason = f"sbatch did not answer within {SECONDS} s; the job may be in the queue nevertheless"
        fix = "if `squeue --me` lists it, remove it with `scancel JOB`; then start again"
        raise UserError(Problem("launch=slurm", reason, fix)) from None
    if done.returncode != 0:
        errors = [line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines()]
        options = [line.removeprefix("#SBATCH ") for line in content.splitlines() if line.startswith("#SBATCH ")]
        requested = " ".join(option for option in options if not option.startswith("--output"))
        fix = f"change the keys of launch; the job requested {requested}"
        raise UserError(Problem("launch=slurm", f"sbatch refuses the job: {'; '.join(errors) or 'no reason'}", fix))
    number = done.stdout.strip().split(";")[0]
    if not SlurmQueue.job.fullmatch(number):
        reason = f"sbatch printed no job number, but: {number[:80]}"
        raise UserError(Problem("launch=slurm", reason, "look at what sbatch prints on this machine"))
    return number


def ask(ids: Sequence[str]) -> list[Job]:
    """Return the jobs among `ids` that SLURM still knows, in the same order.

    Raises:
        Unreachable: squeue does not answer, which says nothing about the jobs.
    """
    answers = [_list(ids[start : start + MOST_IDS]) for start in range(0, len(ids), MOST_IDS)]
    # A task of an array has two ids: ARRAY_TASK, and a job number of its own. Until the tasks start, all of them have the
    # array's number as their job number, and the last one keeps it.
    by_task_id: dict[str, Job] = {}
    by_job_number: dict[str, Job] = {}
    for line in chain.from_iterable(answers):
        if line.count("|") < 4:
            continue  # a notice that the site prints
        task_id, job_number, state, fields = line.split("|", 3)
        reason, _, nodes = fields.rpartition("|")
        job = Job(task_id, state, reason if state in WAITING else nodes or reason)
        by_task_id.setdefault(task_id, job)
        if job_number not in by_job_number or by_job_number[job_number].is_waiting > job.is_waiting:
            by_job_number[job_number] = job
    jobs = [(number, by_task_id.get(number) or by_job_number.get(number)) for number in ids]
    return [replace(job, id=number) for number, job in jobs if job is not None]


def _list(ids: Sequence[str]) -> list[str]:
    """Return squeue's lines about `ids`. Raises Unreachable."""
    done = _squeue("--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%A|%T|%r|%N")
    if done.returncode == 0:
        return done.stdout.splitlines()
    is_crash = done.returncode < 0
    if is_crash or "invalid job id" in done.stderr.lower():
        # squeue leaves out numbers that it does not know, but refuses the only one, or all for one that is no number to it.
        return list(chain.from_iterable(_list([number]) for number in ids)) if len(ids) > 1 else []
    raise Unreachable(done.stderr.strip())


def alive(ids: Sequence[str]) -> list[Job]:
    """Return the jobs among `ids` that wait or run. Raises Unreachable."""
    return [job for job in ask(ids) if not job.is_over]


def named(name: str) -> list[str]:
    """Return the numbers of this user's unfinished jobs with a name. Raises Unreachable."""
    done = _squeue("--me", f"--name={name}", "--format=%A")
    if done.returncode != 0:
        raise Unreachable(done.stderr.strip())
    return [number for number in done.stdout.split() if SlurmQueue.job.fullmatch(number)]


def _squeue(*options: str) -> subprocess.CompletedProcess[str]:
    try:
        command = ["squeue", "--noheader", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"squeue: {error}") from None


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs. Raises Unreachable."""
    try:
        subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        reason = (
            f"scancel did not answer within {SECONDS} s; `squeue --me` shows whether it has removed {', '.join(ids)}"
        )
        raise Unreachable(reason) from None


def require(program: str) -> None:
    """Raise UserError if SLURM's client program is not installed."""
    if shutil.which(program) is None:
        fix = "run this command on a login node of the cluster, or choose launch=local or launch=hostfile"
        raise UserError(Problem("launch=slurm", f"there is no {program} on this machine", fix))


def ask_to_stop(jobs: Sequence[str], run_dir: Path) -> None:
    """Ask running jobs to save and end, and remove waiting ones from the queue. Raises Unreachable."""
    for job in alive(jobs):
        if job.is_waiting:
            cancel([job.id])
        elif not (run_dir / STOP_FILE).exists() and not _has_stopped(run_dir):
            files.write(run_dir / STOP_FILE, "")


def _has_stopped(run_dir: Path) -> bool:
    """Return whether the run has ended because of an earlier request to stop."""
    return STOP_REASON in str((records.read_result(run_dir) or {}).get("reason"))


def probe(*, needed: bool) -> Check:
    """Check that SLURM's controller answers, and report its version and partitions."""
    from dstune.launch.checks import programs

    check = programs("slurm", ("sbatch", "srun", "squeue"), "slurm-client", needed=needed)
    if check.status != PASS:
        return check
    command = ["sinfo", "--noheader", "--format=%P %a %l %D nodes %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", "no answer within 20 s")
    if done.returncode != 0:
        message = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        return Check(
            "slurm",
            FAIL if needed else SKIP,
            f"SLURM's controller does not answer: {message}",
            "run this command on a login node",
        )
    return Check("slurm", PASS, "; ".join(" ".join(line.split()) for line in done.stdout.splitlines()[:8]))


class SlurmQueue(Queue):
    """SLURM as a queue of jobs."""

    name = "SLURM"
    job = re.compile(r"\d{1,10}(_\d{1,8})?")
    """The number of a job, or of a task of an array. squeue (24.11) crashes on a task number of 14 digits."""
    variables = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})

    def require(self, *, cancel: bool = False) -> None:
        require("scancel" if cancel else "sbatch")

    def alive(self, ids: Sequence[str]) -> list[Job]:
        return alive(ids)

    def named(self, name: str) -> list[str]:
        return named(name)

    def cancel(self, ids: Sequence[str]) -> None:
        cancel(ids)

    def ask_to_stop(self, ids: Sequence[str], run_dir: Path) -> None:
        ask_to_stop(ids, run_dir)
