"""A table in a folder that somebody else made reads nothing but that folder.

The library opens what it finds in the log, and what the log names, whatever it is: a pipe or a device has no end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.data.lakehouse._address import Address

LOG = "_delta_log"
_VECTOR = ["add.deletionVector"]


def refuse_outside(place: Path, address: Address, key: str) -> None:
    """Raises UserError for pipes, devices, links that lead out of the folder, and deletion vectors outside of it."""
    inside = place.resolve()
    for entry in _entries(place):
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(inside):
            raise UserError(outside(entry.path, address, key))
        if not entry.is_file() and not entry.is_dir():
            fix = "a table has plain files and folders: copy its rows into one"
            raise UserError(Problem(key, f"{entry.path} is a pipe, a device or a link to nothing", fix, str(address)))
    for name in _vectors(place / LOG):
        path = Path(place, unquote(name).removeprefix("file://"))
        if not path.resolve().is_relative_to(inside):
            raise UserError(outside(name, address, key))


def outside(name: str, address: Address, key: str) -> Problem:
    fix = "copy the rows into a table of their own (a shallow clone has none)"
    return Problem(key, f"{name} lies outside the table's folder", fix, str(address))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry))


def _vectors(log: Path) -> Iterator[str]:
    """Places of deletion vectors that are named as a whole. Raises what says that a file of the log cannot be read."""
    for entry in _entries(log):
        actions: list[Any] = []
        try:
            if entry.name.endswith(".json"):
                with open(entry, encoding="utf-8") as lines:
                    actions = [parse_json(line) for line in lines if line.strip()]
            elif entry.name.endswith(".parquet"):
                actions = pq.ParquetFile(entry.path).read(columns=_VECTOR).to_pylist()
        except FileNotFoundError:  # cleaned up since
            continue
        for action in actions:
            add = action.get("add") if isinstance(action, dict) else None
            vector = add.get("deletionVector") if isinstance(add, dict) else None
            if isinstance(vector, dict) and vector.get("storageType") == "p":
                yield str(vector.get("pathOrInlineDv"))
