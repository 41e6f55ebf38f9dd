"""What the first row of each data file and this machine's hardware can tell before any rank starts.

A rank finds the same, but only after 10 s of imports, and in a run directory that was made for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.data_schema import OnBadRow
from dstune.config.multi_task import tasks_of
from dstune.config.schema import Precision, RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.files import TABLES
from dstune.data.formats import check_mapped
from dstune.data.rows import RowError, check_columns, check_task, normalise, recognise
from dstune.protocols import ROW_FORMATS, method_of, task_of

SAME_COLUMNS = (".csv", ".tsv", *TABLES)
"""Endings of files whose rows all have the columns of the first one."""

WHOLE_FILE_BYTES = 1 << 26
"""A JSON array is read as a whole, so one larger than this is left to the ranks."""


def hardware_problems(config: RunConfig, gpus: int) -> Iterator[Problem]:
    """What `gpus` devices cannot compute."""
    if config.trainer.precision is Precision.fp16 and not gpus:
        reason = "fp16 is trained on GPUs only, and there is none here: a CPU has no fp16 kernels for several layers"
        yield Problem("trainer.precision", reason, "trainer.precision=fp32", "fp16")
    if not gpus:
        yield from method_of(config.method).check_cpu(config)


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """What the tasks of the run miss on this machine."""
    tasks = (config.task, *tasks_of(config).values())
    for task in {task.name: task for task in tasks}.values():
        yield from task_of(task).preflight(config)


def first_row_problems(config: RunConfig, part: str, key: str, *, trains: bool = True) -> list[Problem]:
    """What is wrong with the first rows of the files of `data.train`, `data.validation` or `data.test` (`part`), whose
    files are there. With `data.on_bad_row=skip` only columns that fit no format count.

    key: what problems name as the source of the rows. trains: whether they are to be trained on.
    """
    try:
        check_columns(config.data.columns)
        files = sources.of_part(config.data, part, key)
    except UserError as error:
        return error.problems
    found: list[Problem] = []
    format_of_part: str | None = None
    for file in files:
        if file.ending == ".json" and file.path.stat().st_size > WHOLE_FILE_BYTES:
            continue
        try:
            row = next(iter(sources.read(file)), None)
            if row is None or row.fields is None:  # no rows at all, or a broken one: the ranks list all of them
                continue
            format_of_part = format_of_part or recognise(
                row.fields, config.data.columns, config.data.format, config.task, row.place
            )
            check_task(format_of_part, row.fields, config.data.columns, config.data.format, config.task, row.place)
            if trains and key == "data.train" and len(files) == 1 and file.ending in SAME_COLUMNS:
                columns = ROW_FORMATS[format_of_part]().expand(row.fields)
                check_mapped(columns, config.data.columns, str(file))
            _check_row(config, row, format_of_part)
        except UserError as error:
            found += [problem for problem in error.problems if problem not in found]
    return found


def _check_row(config: RunConfig, row: sources.RawRow, format_of_part: str) -> None:
    """Raises UserError where the row cannot be used and bad rows are not to be skipped."""
    assert row.fields is not None
    try:
        normalise(row.fields, format_of_part, config.data.columns, config.task)
    except RowError as error:
        if config.data.on_bad_row is OnBadRow.error:
            fix = "fix the file, or set data.on_bad_row=skip to drop and count such rows"
            raise UserError(Problem(row.place, str(error), fix)) from None
