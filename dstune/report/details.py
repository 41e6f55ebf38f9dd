"""Tables of evaluation results beyond plain metrics: entity types, slices, watched rows, swapped terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstune.report import numbers
from dstune.report.run_files import RunFiles, section

WATCHED = {"guard": "What was not to be forgotten", "ood": "Another domain"}
"""Parts of the data that are measured before and after training."""


@dataclass(frozen=True)
class Table:
    title: str
    lead: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    """A name and its values, as text."""


def details(run: RunFiles) -> list[Table]:
    return list(_tables(run.result))


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    if by_type := section(result, "by_type"):
        yield _table("By type", "", by_type)
    for column, entry in section(result, "slices").items():
        lead = ""
        if entry.get("worst") is not None:
            metric = str(entry.get("metric")).replace("_", " ")
            lead = f"By {metric} the worst is {entry['worst']}, {numbers.number(entry['gap'])} from the best."
        yield _table(f"By {column}", lead, section(entry, "values"))
    for part, title in WATCHED.items():
        if entry := section(result, part):
            yield _table(title, f"Rows of data.{part}, before and after training.", entry)
    if changes := section(result, "counterfactual"):
        rows = {"all": {name: value for name, value in changes.items() if name != "by_term"}}
        lead = "What changes in held-out rows where nothing but these terms does."
        yield _table("Swapped terms", lead, rows | section(changes, "by_term"))


def _table(title: str, lead: str, rows: dict[str, dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    table_rows = [(str(name), [_cell(values.get(column)) for column in columns]) for name, values in rows.items()]
    return Table(title, lead, [column.replace("_", " ") for column in columns], table_rows)


def _cell(value: Any) -> str:
    return "" if value is None else numbers.number(value)
