"""The verb `dstune report`, and the report that every run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.report import sweep_page
from dstune.report.page import REPORT_FILE, write
from dstune.report.run_files import RUN_FILE, find_runs
from dstune.tracking.trials import is_sweep, objectives_of, ranked, read_records


def main(argv: list[str]) -> int:
    """Run `dstune report RUN [RUN...] [--output FILE] [--json]`. Raises UserError; returns the exit code."""
    arguments = _parser().parse_args(argv)
    alone = arguments.runs[0] if len(arguments.runs) == 1 and is_sweep(arguments.runs[0]) else None
    # All trials of a sweep may have failed before there was a run.
    runs = _trials(alone) if alone else find_runs(arguments.runs)
    target = arguments.output or _default_target(arguments.runs, runs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if alone:
            sweep_page.write(alone, target)
        else:
            write(runs, target)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise UserError(Problem("--output", reason, "give a file in a folder of yours", str(target))) from None
    if arguments.json:
        print(json.dumps({"report": str(target), "runs": [str(run) for run in runs]}))
    else:
        print(target)
    return EXIT_DONE


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="dstune report",
        description="One self-contained HTML page about a run, a sweep, or several runs side by side.",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="run directory, or a folder that holds runs (a sweep)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"where to write it (default {REPORT_FILE} in the directory of the run, or of the first folder given)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: report, runs")
    return parser


def _trials(sweep: Path) -> list[Path]:
    paths = [sweep / record.name for record in ranked(read_records(sweep), objectives_of(sweep)[0])]
    return [path for path in paths if (path / RUN_FILE).is_file()]


def _default_target(folders: list[Path], runs: list[Path]) -> Path:
    """Choose where the page goes. Several runs named one by one get it where the command was given: it belongs to none of them."""
    if len(folders) > 1:
        return Path(REPORT_FILE)
    return (runs[0] if len(runs) == 1 and not is_sweep(folders[0]) else folders[0]) / REPORT_FILE


def leave_behind(run_dir: Path, message: Callable[[str], None]) -> None:
    """Write the report of a run or sweep that has ended. Any failure is only reported, since it must not fail the run."""
    try:
        if is_sweep(run_dir):
            sweep_page.write(run_dir, run_dir / REPORT_FILE)
        else:
            write([run_dir], run_dir / REPORT_FILE)
    except Exception as error:  # the run is over, and its files may hold anything
        message(f"dstune: no {REPORT_FILE} was written: {type(error).__name__}: {error}")
