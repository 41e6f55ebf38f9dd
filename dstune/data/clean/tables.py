"""Clean complete tables: first each row alone, then rows against each other.

This takes one byte of memory a row, 45 during the search for equal rows and 48 more during the search for near duplicates;
texts, hashes and keys are read from disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dstune.config.data_schema import CleanConfig, Duplicates, Found, Unwanted
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.clean.cleaner import STEPS, Cleaner
from dstune.data.clean.near import SIGNATURE_NUMBERS, NearCopies, open_signatures
from dstune.data.clean.report import MAX_EXAMPLES, NAMES, Report
from dstune.data.clean.rows import near_text
from dstune.data.control import ControlTokens
from dstune.data.ingest import ROW_SCHEMA, Table, numbers_on_disk
from dstune.data.parallel import map_rows

Chosen = tuple[Table, np.ndarray]
"""A table, and the indices of some of its rows, int64."""

ROWS_AT_ONCE = 10_000
"""The signatures of this many rows take 10 MB."""


def active_steps(config: CleanConfig) -> list[str]:
    """Return the steps that `config` enables, in the order of `STEPS`."""
    is_enabled = {
        "unicode": config.unicode,
        "control_tokens": True,
        "secrets": config.secrets is not Found.keep,
        "personal_data": config.personal_data is not Found.keep,
        "refusals": config.refusals is not Unwanted.keep,
        "toxicity": config.toxicity is not Unwanted.keep,
        "empty": True,
        "too_short": config.min_characters > 0,
        "too_long": config.max_characters is not None,
        "languages": bool(config.languages),
        "duplicates": config.duplicates is not Duplicates.keep,
        "near_duplicates": config.duplicates is Duplicates.near,
        "leaks": config.leaks,
    }
    return [step for step in STEPS if is_enabled[step]]


class Cleaning:
    """Cleans the tables of one run and counts what each step did.

    tokenizer: of transformers; rows are searched for its control tokens. work: folder for temporary files.
    Raises UserError (at creation) if a setting needs a package that is missing, or names an unknown language.
    """

    def __init__(self, config: RunConfig, tokenizer: Any, work: Path):
        self._config = config.data.clean
        self._workers = config.data.workers
        self._work = work
        self._cleaner = Cleaner(self._config, ControlTokens(tokenizer), config.data.split.seed)
        self._signatures: dict[int, np.ndarray] = {}
        self.reports: dict[str, Report] = {}

    def rows(self, part: str, table: Table) -> Table:
        """Return `table` with cleaned texts; its `kept` says which rows are left.

        Duplicates are removed only from the training rows, which may be split afterwards. In a validation or test file they are
        only counted (`flagged`), because its metrics describe the file as given.
        """
        report = self.reports[part] = Report(active_steps(self._config))
        if part != "train":
            for step in ("near_duplicates", "leaks"):
                report.counts.pop(step, None)
        if not len(table.hashes):
            return table
        mapped = map_rows(
            table.data.select_columns(["row"]),
            self._cleaner,
            self._cleaner.features,
            self._work / f"{part}.clean.arrow",
            workers=self._workers,
            doing=f"cleaning the {part} rows",
        )
        results = mapped.data.table
        self._count(results, table, report)
        is_kept = np.array(pc.equal(results["removed"], ""))
        keys, text_keys = (
            numbers_on_disk(results[name], self._work / f"{part}.{name}s") for name in ("key", "text_key")
        )
        if results["row"].null_count < len(mapped):
            table = _rewritten(table, results, self._work / f"{part}.cleaned.arrow")
        table = replace(table, kept=is_kept, text_keys=text_keys)
        if self._config.duplicates is not Duplicates.keep:
            self._duplicates(table, keys, report, remove=part == "train")
        if self._config.duplicates is Duplicates.near:
            file = self._work / f"{part}.signatures"
            _write_signatures(results["signature"], file)
            self._signatures[id(table)] = open_signatures(file, len(mapped))
            if part == "train":
                self._near_duplicates(table, report)
        return table

    def without_leaks(self, train: Chosen, held_out: Sequence[Chosen]) -> np.ndarray:
        """Return the row indices of `train` whose text does not occur in the held-out rows, in order."""
        table, rows = train
        if not self._config.leaks or not held_out:
            return rows
        report = self.reports["train"]
        assert table.text_keys is not None
        keys = np.unique(np.concatenate([_text_keys(held_table)[numbers] for held_table, numbers in held_out]))
        training_keys = table.text_keys[rows]
        # `np.isin` would sort all of them, which takes 80 bytes a row.
        leaked = np.searchsorted(keys, training_keys, "right") > np.searchsorted(keys, training_keys, "left")
        for row in rows[leaked][:MAX_EXAMPLES]:
            other = next(
                (held_table, at[0])
                for held_table, numbers in held_out
                if len(at := _equal(held_table, numbers, table, row))
            )
            self._example(report, "leaks", table, row, f"as {other[0].place(other[1])}")
        report.add("leaks", "removed", int(leaked.sum()))
        rows = rows[~leaked]
        if self._config.duplicates is Duplicates.near and len(rows):
            rows = self._near_leaks(table, rows, held_out, report)
        return rows

    def refuse_nothing_left(self, tables: dict[str, Table]) -> None:
        """Check that cleaning left rows in every part. Raises UserError with a problem for each empty part."""
        problems = []
        for part, table in tables.items():
            if table.kept is None or table.kept.any():
                continue
            counts = self.reports[part].counts
            why = ", ".join(f"{NAMES[step]} {count['removed']}" for step, count in counts.items() if count["removed"])
            key = next((f"data.clean.{KEYS[step]}" for step, count in counts.items() if count["removed"]), "data.clean")
            reason = f"cleaning leaves no {part} row ({why})"
            problems.append(Problem(where=key, reason=reason, fix="relax it, or look at the rows"))
        if problems:
            raise UserError(problems)

    # One table

    def _count(self, results: pa.Table, table: Table, report: Report) -> None:
        for kind in ("removed", "changed", "flagged"):
            column = results[kind]
            for counted in pc.value_counts(column):
                steps = [step for step in counted["values"].as_py().split(",") if step]
                for step in steps:
                    report.add(step, kind, counted["counts"].as_py())
                if any(report.wants_example(step) for step in steps):
                    rows = np.flatnonzero(pc.equal(column, counted["values"]).to_numpy())[:MAX_EXAMPLES]
                    for step, row in product(steps, rows.tolist()):
                        notes = results["note"][row].as_py()
                        self._example(report, step, table, row, json.loads(notes).get(step, "") if notes else "")

    def _example(self, report: Report, step: str, table: Table, row: int, note: str) -> None:
        if report.wants_example(step):
            report.example(step, table.place(row), self._cleaner.excerpt(_row(table, row)), note)

    def _duplicates(self, table: Table, keys: np.ndarray, report: Report, *, remove: bool) -> None:
        assert table.kept is not None
        rows = np.flatnonzero(table.kept)
        _, first = np.unique(keys[rows], return_index=True)  # the index of the first among equal rows
        is_copy = np.ones(len(rows), dtype=bool)
        is_copy[first] = False
        copy_rows = rows[is_copy]
        report.add("duplicates", "removed" if remove else "flagged", len(copy_rows))
        for row in copy_rows[:MAX_EXAMPLES]:
            original = rows[np.flatnonzero(keys[rows] == keys[row])[0]]
            self._example(report, "duplicates", table, row, f"as {table.place(original)}")
        if remove:
            table.kept[copy_rows] = False

    def _near_duplicates(self, table: Table, report: Report) -> None:
        is_kept = table.kept
        assert is_kept is not None
        groups = np.zeros(len(is_kept), dtype=np.int32)
        if table.labels is not None:  # nearly the same text with a different label is a different example
            groups = np.unique(table.labels, return_inverse=True)[1].astype(np.int32)

        def allowed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return is_kept[first] & is_kept[second] & (groups[first] == groups[second])

        texts = _Texts([(table, np.arange(len(is_kept)))])
        search = NearCopies(self._signatures[id(table)], texts, allowed, self._config.near_threshold)
        original = search.find()
        copies = np.flatnonzero(original >= 0)
        report.add("near_duplicates", "removed", len(copies))
        for row in copies[:MAX_EXAMPLES]:
            self._example(report, "near_duplicates", table, row, f"near {table.place(original[row])}")
        is_kept[copies] = False

    # Training rows against those held out

    def _near_leaks(self, table: Table, rows: np.ndarray, held_out: Sequence[Chosen], report: Report) -> np.ndarray:
        parts = [*held_out, (table, rows)]
        file = self._work / "leaks.signatures"
        with file.open("wb") as stream:
            for held_table, numbers in parts:
                for start in range(0, len(numbers), ROWS_AT_ONCE):
                    stream.write(self._signatures[id(held_table)][numbers[start : start + ROWS_AT_ONCE]].tobytes())
        held_out_count = sum(len(numbers) for _, numbers in held_out)

        def allowed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return (first < held_out_count) & (second >= held_out_count)

        texts = _Texts(parts)
        search = NearCopies(
            open_signatures(file, held_out_count + len(rows)), texts, allowed, self._config.near_threshold
        )
        original = search.find()[held_out_count:]
        leaked = original >= 0
        report.add("leaks", "removed", int(leaked.sum()))
        for position in np.flatnonzero(leaked)[:MAX_EXAMPLES]:
            held_table, number = texts.find(int(original[position]))
            self._example(report, "leaks", table, rows[position], f"near {held_table.place(number)}")
        return rows[~leaked]


KEYS = {
    "unicode": "unicode",
    "empty": "unicode",
    "too_short": "min_characters",
    "too_long": "max_characters",
    "languages": "languages",
    "secrets": "secrets",
    "personal_data": "personal_data",
    "duplicates": "duplicates",
    "near_duplicates": "duplicates",
}
"""The key of `data.clean` that makes a step remove rows."""


class _Texts:
    """The texts by which the rows of several tables are compared, numbered consecutively."""

    def __init__(self, parts: Sequence[Chosen]):
        self._parts = parts
        self._starts = np.cumsum([0, *(len(numbers) for _, numbers in parts)])

    def find(self, position: int) -> tuple[Table, int]:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        table, numbers = self._parts[part]
        return table, int(numbers[position - self._starts[part]])

    def __call__(self, position: int) -> str:
        return near_text(_row(*self.find(position)))


def _row(table: Table, number: int) -> dict[str, Any]:
    return json.loads(table.data.data.table["row"][int(number)].as_py())


def _text_keys(table: Table) -> np.ndarray:
    assert table.text_keys is not None, "a table that was not cleaned"
    return table.text_keys


def _equal(other: Table, numbers: np.ndarray, table: Table, row: int) -> np.ndarray:
    """Return those of the rows `numbers` of `other` that have the same text as `row` of `table`."""
    return numbers[_text_keys(other)[numbers] == _text_keys(table)[row]]


def _rewritten(table: Table, results: pa.Table, target: Path) -> Table:
    """Write the table to `target` with the changed rows and hashes of `results` in place of the old ones, and return it."""
    start = 0
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, ROW_SCHEMA) as writer:
        for batch in table.data.data.table.to_batches():
            changed = results.slice(start, len(batch)).combine_chunks()
            start += len(batch)
            rows, hashes = (changed[name].combine_chunks() for name in ("row", "hash"))
            columns = {field.name: batch[field.name] for field in ROW_SCHEMA}
            columns["row"] = pc.coalesce(rows, columns["row"])
            columns["hash"] = pc.if_else(pc.is_valid(rows), hashes, columns["hash"])
            writer.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))
    data = datasets.Dataset.from_file(str(target))
    return replace(table, data=data, hashes=numbers_on_disk(data.data.table["hash"], Path(f"{target}.hashes")))


def _write_signatures(column: pa.ChunkedArray, file: Path) -> None:
    with file.open("wb") as stream:
        for chunk in _slices(column):
            joined = b"".join(chunk.to_pylist())
            assert len(joined) == 4 * SIGNATURE_NUMBERS * len(chunk)
            stream.write(joined)


def _slices(column: pa.ChunkedArray) -> Iterable[pa.ChunkedArray]:
    for start in range(0, len(column), ROWS_AT_ONCE):
        yield column.slice(start, ROWS_AT_ONCE)
