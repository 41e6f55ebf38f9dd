"""The verbs that look after a run from another shell: `status`, `cancel`, `checkpoints`."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dstune.checkpoint import store
from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, Problem, UserError
from dstune.core.paths import STOP_FILE
from dstune.launch import records
from dstune.launch.agents.status import GroupStatus, read_group
from dstune.launch.queues import UnfinishedJobs, queue_of
from dstune.launch.rundir import run_directory
from dstune.protocols.launcher import Unreachable
from dstune.tracking.trials import is_sweep, read_records

TWICE_SECONDS = 0.5
"""Time between two signals, so that they count as two (see `signals.TWICE_SECONDS`)."""

JOB_SECONDS = 1.0
"""Time between two queries of the queue while a job ends."""


@dataclass(frozen=True)
class Status:
    """The state and progress of a run."""

    state: str
    """`running`; `pending` in a queue; completed, stopped, preempted or failed as in result.json; `dead` (the launcher ended
    without a result); `elsewhere` (launched on another machine, and only that machine knows the state)."""
    reason: str
    step: int
    loss: float | None
    age_seconds: float | None
    """Seconds since the last row of metrics.jsonl was written."""
    launcher: records.LaunchRecord | None
    checkpoint: Path | None
    group: GroupStatus | None = None
    """The nodes of a run that has agents."""

    def to_json(self, run_dir: Path) -> dict[str, Any]:
        launcher = self.launcher
        return {
            "run": str(run_dir),
            "state": self.state,
            "reason": self.reason,
            "step": self.step,
            "loss": self.loss,
            "age_seconds": self.age_seconds,
            "pid": launcher and launcher.pid,
            "host": launcher and launcher.host,
            "processes": launcher and launcher.processes,
            "jobs": launcher.jobs if launcher else [],
            "checkpoint": self.checkpoint and str(self.checkpoint),
            **({"nodes": asdict(self.group)} if self.group else {}),
        }


def status_of(run_dir: Path, unfinished_jobs: UnfinishedJobs | None = None) -> Status:
    """Return the status of the run in `run_dir`, from its files, its process and its queue.

    unfinished_jobs: of this and other runs; the queue is queried when not given.
    """
    launcher = records.read_launch(run_dir)
    result = records.read_result(run_dir)
    last = records.read_metrics(run_dir).last
    reason = ""
    unfinished_jobs = unfinished_jobs or UnfinishedJobs([launcher] if launcher else [])
    jobs, unreachable = unfinished_jobs.of(launcher)
    if jobs:
        state, reason = ("pending" if jobs[0].is_waiting else "running"), str(jobs[0])
    elif unreachable:
        state, reason = "elsewhere", unreachable
    elif launcher is not None and not launcher.jobs and launcher.process(run_dir) is not None:
        state = "running"
    elif result is not None:
        state, reason = str(result.get("status")), str(result.get("reason") or "")
    elif launcher is not None and not launcher.is_here and not launcher.jobs:
        state, reason = "elsewhere", f"ask on {launcher.host}"
    else:
        who = "its job" if launcher is not None and launcher.jobs else "the process that launched it"
        state, reason = "dead", f"{who} ended without a result"
    age = None
    if last:
        age = round(time.time() - (run_dir / "metrics.jsonl").stat().st_mtime, 1)
    step, loss, checkpoint = int(last.get("step", 0)), last.get("loss"), store.newest(run_dir)
    return Status(state, reason, step, loss, age, launcher, checkpoint, read_group(run_dir))


def status(argv: list[str]) -> int:
    """Run `dstune status RUN [--json]` and return the exit code. Raises UserError."""
    arguments = _parser("status", "Show the state and progress of a run.").parse_args(argv)
    run_dir = run_directory(arguments.run)
    run_status = status_of(run_dir)
    if arguments.json:
        print(json.dumps(run_status.to_json(run_dir)))
        return EXIT_DONE
    facts = [f"{run_dir}: {run_status.state}" + (f" ({run_status.reason})" if run_status.reason else "")]
    if run_status.state == "running" and run_status.launcher is not None and not run_status.launcher.jobs:
        facts.append(
            f"process {run_status.launcher.pid} on {run_status.launcher.host}, {run_status.launcher.processes} rank(s)"
        )
    if run_status.group is not None and not run_status.group.is_over and run_status.state in ("running", "elsewhere"):
        facts.append(str(run_status.group))
    loss = "" if run_status.loss is None else f", loss {run_status.loss:.4f}"
    facts.append(
        f"step {run_status.step}{loss}"
        + ("" if run_status.age_seconds is None else f", {run_status.age_seconds:.0f} s ago")
    )
    facts.append(f"newest checkpoint {run_status.checkpoint.name}" if run_status.checkpoint else "no checkpoint yet")
    print("\n  ".join(facts))
    return EXIT_DONE


def cancel(argv: list[str]) -> int:
    """Run `dstune cancel RUN|SWEEP [--now] [--json]`: ask it to save and stop, and wait until it has. Raises UserError."""
    parser = _parser("cancel", "Ask a run to save at the end of this step and stop; wait until it has.")
    parser.add_argument("--now", action="store_true", help="stop at once, without saving")
    arguments = parser.parse_args(argv)
    if is_sweep(arguments.run):
        return _cancel_sweep(arguments.run, now=arguments.now, as_json=arguments.json)
    run_dir = run_directory(arguments.run)
    launcher = records.read_launch(run_dir)
    if launcher is not None and launcher.jobs:
        return _cancel_jobs(launcher, run_dir, now=arguments.now, as_json=arguments.json)
    if launcher is not None and not launcher.is_here and records.read_result(run_dir) is None:
        group = read_group(run_dir)
        if group is not None and not group.is_over and not arguments.now:
            return _cancel_group(run_dir, as_json=arguments.json)
        reason = f"the run was launched on {launcher.host}, and can only be stopped from there"
        raise UserError(Problem("RUN", reason, f"run `dstune cancel` on {launcher.host}", str(run_dir)))
    process = launcher.process(run_dir) if launcher is not None else None
    if process is not None:
        if not arguments.json:
            print(f"stopping process {process.pid}" + ("" if arguments.now else " after a save"), flush=True)
        _stop(process, arguments.now)
    after = status_of(run_dir)
    if arguments.json:
        print(json.dumps(after.to_json(run_dir)))
    elif process is None:
        print(f"{run_dir} is not running ({after.state})")
    else:
        print(f"{run_dir}: {after.state}" + (f" ({after.reason})" if after.reason else ""))
    return EXIT_DONE


def _cancel_group(run_dir: Path, *, as_json: bool) -> int:
    """Stop a run that another machine started on several nodes, through a stop file, since they share the run directory."""
    files.write(run_dir / STOP_FILE, "")
    while (group := read_group(run_dir)) is not None and not group.is_over:
        time.sleep(JOB_SECONDS)
    after = status_of(run_dir)
    print(json.dumps(after.to_json(run_dir)) if as_json else f"{run_dir}: {after.state}")
    return EXIT_DONE


def _cancel_sweep(sweep: Path, *, now: bool, as_json: bool) -> int:
    """Ask the process of a sweep to stop its trials, and wait until it has."""
    launcher = records.read_launch(sweep)
    process = launcher.process(sweep) if launcher is not None else None
    if launcher is not None and not launcher.is_here:
        reason = f"the sweep was started on {launcher.host}, and can only be stopped from there"
        raise UserError(Problem("RUN", reason, f"run `dstune cancel` on {launcher.host}", str(sweep)))
    if process is not None:
        _stop(process, now)
    statuses = [record.status for record in read_records(sweep)]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    if as_json:
        print(json.dumps({"sweep": str(sweep), "trials": counts}))
    else:
        counts_text = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trials"
        print(f"{sweep}: {counts_text}" if process is not None else f"{sweep} is not running ({counts_text})")
    return EXIT_DONE


def _cancel_jobs(launcher: records.LaunchRecord, run_dir: Path, *, now: bool, as_json: bool) -> int:
    """Stop a run in a queue: a waiting job leaves the queue, a running one saves first (unless `now`)."""
    jobs, queue = launcher.jobs, queue_of(launcher)
    queue.require(cancel=True)
    try:
        while alive := queue.alive(jobs):
            if now:
                queue.cancel([job.id for job in alive])
            else:
                queue.ask_to_stop(jobs, run_dir)
            time.sleep(JOB_SECONDS)
    except Unreachable as error:
        fix = "run it on a login node of the cluster"
        raise UserError(Problem("RUN", f"{queue.name} does not answer here: {error}", fix, str(run_dir))) from None
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    if records.read_result(run_dir) is None:
        latest = records.read_launch(run_dir)
        status = "failed" if now and store.newest(run_dir) is None else "preempted"
        records.write_result(run_dir, status, "cancelled", latest.processes if latest else len(jobs))
    after = status_of(run_dir)
    if as_json:
        print(json.dumps(after.to_json(run_dir)))
    else:
        print(f"{run_dir}: {after.state}" + (f" ({after.reason})" if after.reason else ""))
    return EXIT_DONE


def _stop(process: psutil.Process, now: bool) -> None:
    try:
        process.send_signal(signal.SIGTERM)
        if now:
            time.sleep(TWICE_SECONDS)
            process.send_signal(signal.SIGTERM)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied as error:
        problem = Problem("RUN", "the run belongs to another user", "ask its owner", str(error.pid))
        raise UserError(problem) from None


def checkpoints(argv: list[str]) -> int:
    """Run `dstune checkpoints RUN [--verify] [--prune KEEP] [--json]`; return 1 if a file is damaged. Raises UserError."""
    parser = _parser("checkpoints", "List, verify or prune the checkpoints of a run.")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    parser.add_argument("--prune", type=int, metavar="KEEP", help="keep the newest KEEP and the best, remove the rest")
    arguments = parser.parse_args(argv)
    run_dir = run_directory(arguments.run)
    removed: list[Path] = []
    if arguments.prune is not None:
        if arguments.prune < 1:
            raise UserError(
                Problem("--prune", "at least one checkpoint must be kept", "--prune 1", str(arguments.prune))
            )
        from dstune.config.run_links import refuse_links

        refuse_links(run_dir)
        lock = records.acquire_lock(run_dir)  # refused while the run trains, since it saves and prunes by itself
        try:
            removed = store.prune(run_dir, arguments.prune)
        finally:
            os.close(lock)
    infos = store.listing(run_dir)
    committed, best = [info for info in infos if info.committed], store.best(run_dir)
    damaged: dict[Path, list[str]] = {}
    for info in committed if arguments.verify else ():
        with suppress(FileNotFoundError):  # a running launch may have pruned it meanwhile
            damaged[info.path] = store.damaged_files(info.path)
    if arguments.json:
        rows = [
            {
                "path": str(info.path),
                "step": info.step,
                "committed": info.committed,
                "bytes": info.bytes,
                "best": info.path == best,
                "weights_only": info.weights_only,
                **({"damaged": damaged.get(info.path, [])} if arguments.verify else {}),
            }
            for info in infos
        ]
        print(json.dumps({"checkpoints": rows, "removed": [str(path) for path in removed]}))
    else:
        for path in removed:
            print(f"removed {path.name}")
        for info in infos:
            notes = (
                ["best"] * (info.path == best)
                + ["weights only"] * info.weights_only
                + ["incomplete, not usable"] * (not info.committed)
            )
            if info.path in damaged:
                notes.append(f"damaged: {', '.join(damaged[info.path])}" if damaged[info.path] else "verified")
            print(f"{info.path.name}  {info.bytes / 1e6:10.1f} MB  {', '.join(notes)}".rstrip())
        if not infos:
            print(f"{run_dir} has no checkpoints")
    return EXIT_FAILED if any(damaged.values()) else EXIT_DONE


def _parser(verb: str, description: str) -> VerbParser:
    parser = VerbParser(prog=f"dstune {verb}", description=description)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, for example runs/NAME/DATE_TIME")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
