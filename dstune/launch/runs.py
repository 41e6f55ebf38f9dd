"""The verb `dstune runs`: lists the runs below a folder, or the trials of a sweep, in the terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.text import one_line
from dstune.launch import records
from dstune.launch.manage import status_of
from dstune.launch.queues import UnfinishedJobs
from dstune.report.numbers import duration
from dstune.report.run_files import RUN_FILE, find_runs
from dstune.tracking.trials import Record, best_first, is_sweep, objectives_of, ranked, read_records, valid_seconds

MOST_CHARACTERS = 200
"""Of a cell; a stranger's status may have megabytes."""
DAMAGED = (UserError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What reading a damaged run directory raises."""


@dataclass(frozen=True)
class Listed:
    """A run or trial in the list."""

    run: str
    """Its directory."""
    status: str
    reason: str
    step: int
    metrics: dict[str, float]
    """Metrics of the last evaluation; `training loss` if there was none."""
    measured: int | None
    """The step of that evaluation."""
    seconds: float | None
    began: float | None
    """Start time in seconds since the epoch."""
    values: dict[str, Any]
    """For a trial, its value of each key that the sweep varies."""


def main(argv: list[str]) -> int:
    """Run `dstune runs [DIR...] [--sort METRIC] [--json]`. Raises UserError; returns the exit code."""
    arguments = _parser().parse_args(argv)
    listed_runs = [run for folder in arguments.folders for run in listed(folder)]
    if arguments.sort:
        metric_names = dict.fromkeys(name for run in listed_runs for name in run.metrics)
        if arguments.sort not in metric_names:
            fix = f"one of {', '.join(metric_names)}" if metric_names else "give runs that have evaluated"
            raise UserError(Problem("--sort", "none of these runs has such a metric", fix, arguments.sort))
        listed_runs.sort(key=lambda run: best_first(run.metrics.get(arguments.sort), arguments.sort))
    if arguments.json:
        print(json.dumps({"runs": [asdict(run) for run in listed_runs]}))
    else:
        print(as_text(listed_runs, arguments.folders, arguments.sort))
    return EXIT_DONE


def _parser() -> VerbParser:
    parser = VerbParser(prog="dstune runs", description="List the runs below a folder, or the trials of a sweep.")
    parser.add_argument(
        "folders", metavar="DIR", type=Path, nargs="*", default=[Path("runs")], help="folder with runs (default runs)"
    )
    parser.add_argument(
        "--sort",
        metavar="METRIC",
        help="sort by this held-out metric, the best first (default: the newest first; for a sweep, the best by its objective)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def listed(folder: Path) -> list[Listed]:
    """Return the runs below `folder`, the newest first, or all trials of a sweep, the best first. Raises UserError."""
    if is_sweep(folder):
        trials = ranked(read_records(folder), objectives_of(folder)[0])
        jobs = _unfinished_jobs([folder / record.name for record in trials])
        return [_list_trial(folder, record, jobs) for record in trials]
    paths = find_runs([folder])
    jobs = _unfinished_jobs(paths)
    runs = [_list_directory(path, jobs) for path in paths]
    return sorted(runs, key=lambda run: -(run.began or 0.0))


def _unfinished_jobs(paths: Iterable[Path]) -> UnfinishedJobs:
    launch_records = []
    for path in paths:
        with suppress(*DAMAGED):  # the run is listed as unreadable
            launch_records.append(records.read_launch(path))
    return UnfinishedJobs([record for record in launch_records if record is not None])


def _list_directory(path: Path, jobs: UnfinishedJobs, record: Record | None = None) -> Listed:
    """List a run directory, as unreadable if its files are damaged: another user's files must not hide the other runs."""
    try:
        return _list_run(path, jobs, record)
    except DAMAGED as error:
        reason = f"its files cannot be read: {one_line(str(error) or type(error).__name__)}"
        return Listed(str(path), "unreadable", reason, 0, {}, None, None, None, dict(record.values) if record else {})


def _list_run(path: Path, jobs: UnfinishedJobs, record: Record | None = None) -> Listed:
    status = status_of(path, jobs)
    logged, result = records.read_metrics(path), records.read_result(path) or {}
    metrics = {name: value for name, value in (logged.eval_last or {}).items() if isinstance(value, (int, float))}
    metrics = {name: value for name, value in metrics.items() if name not in ("rows", "targets", "tokens")}
    measured = logged.eval_step if metrics else None
    if not metrics and status.loss is not None:
        metrics = {"training loss": status.loss}
    return Listed(
        run=str(path),
        status=status.state,
        reason=status.reason,
        step=status.step,
        metrics=metrics,
        measured=measured,
        seconds=valid_seconds(result.get("seconds")),
        began=valid_seconds(status.launcher.started) if status.launcher else None,
        values=dict(record.values) if record else {},
    )


def _list_trial(sweep: Path, record: Record, jobs: UnfinishedJobs) -> Listed:
    path = sweep / record.name
    if (path / RUN_FILE).is_file():
        return _list_directory(path, jobs, record)
    return Listed(str(path), record.status, record.reason, 0, {}, None, record.seconds, None, dict(record.values))


def as_text(listed_runs: list[Listed], folders: list[Path], first: str | None = None) -> str:
    """Return the runs as a table with up to three metrics: `first` before all, then the loss, then those that most runs have."""
    counts: dict[str, int] = {}
    for run in listed_runs:
        for name in run.metrics:
            counts[name] = counts.get(name, 0) + 1
    metric_columns = sorted(counts, key=lambda name: (name != first, name != "loss", -counts[name]))[:3]
    keys = list(dict.fromkeys(key for run in listed_runs for key in run.values))
    parent = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.absolute() for folder in folders]))
    # The last evaluation of a run that has trained since is of an earlier step.
    step_columns = ["measured at"] * any(run.measured not in (None, run.step) for run in listed_runs)
    heading = ["run", "status", "step", *step_columns, *metric_columns, *keys, "time", "began"]
    rows = [
        [
            _relative_to(parent, run.run),
            run.status,
            str(run.step),
            *(["-" if run.measured is None else f"step {run.measured}"] * len(step_columns)),
            *(cell(run.metrics.get(name, "-")) for name in metric_columns),
            *(cell(run.values.get(key)) for key in keys),
            duration(run.seconds),
            "" if run.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began)),
        ]
        for run in listed_runs
    ]
    return f"{parent}\n{table(heading, rows)}"


def _relative_to(folder: Path, run: str) -> str:
    path = Path(run)
    is_inside = path.is_relative_to(folder) and path != folder
    return str(path.relative_to(folder)) if is_inside else run


def cell(value: object) -> str:
    """Return a metric or a setting as the text of a cell of `table`."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a table as text, with columns as wide as their widest cell, and one line for each row."""
    rows = [
        [one_line(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …") for text in row]
        for row in rows
    ]
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (heading, *rows))
    return "\n".join(line.rstrip() for line in lines)
