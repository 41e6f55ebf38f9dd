"""Checks the first row of each data file and this machine's hardware before any rank starts.

A rank would report the same problems, but only after 10 s of imports, and in a run directory that nobody needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from dstune.config.data_schema import OnBadRow
from dstune.config.multi_task import tasks_of
from dstune.config.schema import Precision, RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.bad_rows import FIRST_ROWS, BadRows, reason_for_row
from dstune.data.files import TABLES, DataFile
from dstune.data.formats import check_mapped
from dstune.data.rows import RowError, check_columns, check_task, normalise, recognise
from dstune.protocols import ROW_FORMATS, method_of, task_of
from dstune.protocols.method_options import HasRequirements
from dstune.protocols.task_options import NeedsPackages

SAME_COLUMNS = (".csv", ".tsv", *TABLES)
"""Endings of files whose rows all have the columns of the first one."""

WHOLE_FILE_BYTES = 1 << 26
"""A JSON array must be read completely, so one larger than this is left to the ranks."""

SCANNED_ROWS = 100_000
"""Rows that are read once a first row is bad, to list the other bad ones too."""


def hardware_problems(config: RunConfig, gpus: int) -> Iterator[Problem]:
    """Yield problems of a configuration that `gpus` GPUs cannot train."""
    if config.trainer.precision is Precision.fp16 and not gpus:
        reason = "fp16 is trained on GPUs only, and there is none here: a CPU has no fp16 kernels for several layers"
        yield Problem("trainer.precision", reason, "trainer.precision=fp32", "fp16")
    method = method_of(config.method)
    if not gpus and isinstance(method, HasRequirements):
        yield from method.check_cpu(config)


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what the tasks of the run need and this machine does not have."""
    tasks = (config.task, *tasks_of(config).values())
    for task in map(task_of, {task.name: task for task in tasks}.values()):
        if isinstance(task, NeedsPackages):
            yield from task.preflight(config)


def first_row_problems(config: RunConfig, part: str, key: str, *, trains: bool = True) -> list[Problem]:
    """Return what is wrong with the first rows of the files of a `part`: "train", "validation" or "test". The files must exist.

    With `data.on_bad_row=skip`, only columns that match no format are problems.

    key: the key that problems name as the source of the rows. trains: whether the run trains on the rows.
    """
    try:
        check_columns(config.data.columns)
        files = sources.of_part(config.data, part, key)
    except UserError as error:
        return error.problems
    problems: list[Problem] = []
    format_of_part: str | None = None
    any_bad = False
    for file in files:
        if file.ending == ".json" and file.path.stat().st_size > WHOLE_FILE_BYTES:
            continue
        try:
            row = next(iter(sources.read(file)), None)
            if row is None or row.fields is None:  # no rows at all, or a broken one: the ranks list all of them
                continue
            if format_of_part is None:
                format_of_part, is_first = _recognise(config, file)
                any_bad |= not is_first
                if not is_first:
                    continue
            check_task(format_of_part, row.fields, config.data.columns, config.data.format, config.task, row.place)
            if trains and key == "data.train" and len(files) == 1 and file.ending in SAME_COLUMNS:
                columns = ROW_FORMATS[format_of_part]().expand(row.fields)
                check_mapped(columns, config.data.columns, str(file))
            normalise(row.fields, format_of_part, config.data.columns, config.task)
        except RowError:
            any_bad = True
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if any_bad and not problems and format_of_part and config.data.on_bad_row is OnBadRow.error:
        return _bad_rows(config, files, format_of_part)
    return problems


def _recognise(config: RunConfig, file: DataFile) -> tuple[str, bool]:
    """Return the format of the first row that has a format of the task, and whether that is the first row of the file.

    Raises UserError, as `recognise` does for the first row, if none of the first rows has one.
    """
    first: UserError | None = None
    for row in islice(sources.read(file), FIRST_ROWS):
        if row.fields is None:
            continue
        try:
            format_name = recognise(row.fields, config.data.columns, config.data.format, config.task, row.place)
        except UserError as error:
            first = first or error
            if reason_for_row(error, row.place) is None:
                break
        else:
            return format_name, first is None
    assert first is not None
    raise first


def _bad_rows(config: RunConfig, files: list[DataFile], name: str) -> list[Problem]:
    """Return the problems of the first bad rows, and the number of bad rows, among the first `SCANNED_ROWS` of the files."""
    bad = BadRows(OnBadRow.error)
    for row in islice(chain.from_iterable(map(sources.read, files)), SCANNED_ROWS):
        try:
            if row.fields is None:
                raise RowError(row.error)
            normalise(row.fields, name, config.data.columns, config.task)
        except RowError as error:
            bad.add(row.place, str(error))
    try:
        bad.raise_if_any()
    except UserError as error:
        return error.problems
    return []
