"""Checks that reading a table from an untrusted folder stays inside that folder. The Delta library opens every file it finds in the
log or that the log names, whatever it is: a pipe or a device has no end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.data.read_tables import within_memory
from dstune.lakehouse.address import Address
from dstune.planning.host import available_bytes

LOG = "_delta_log"
MAX_ACTIONS = 50_000_000
"""Limit of actions in a checkpoint: one for each file of a table."""
_VECTOR = ["add.deletionVector"]
_ENCODED_LENGTH = 20
"""The last characters of a relative deletion vector's name, which encode a number."""


def refuse_outside(place: Path, address: Address, key: str) -> None:
    """Raises UserError for pipes, devices, links that lead out of the folder, and deletion vectors outside it."""
    inside = place.resolve()
    for entry in _entries(place):
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(inside):
            raise UserError(outside(entry.path, address, key))
        if not entry.is_file() and not entry.is_dir():
            fix = "a table has plain files and folders: copy its rows into one"
            raise UserError(Problem(key, f"{entry.path} is a pipe, a device or a link to nothing", fix, str(address)))
    for name in _vectors(place / LOG):
        if path_inside(name, inside) is None:
            raise UserError(outside(name, address, key))


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_ODD = re.compile(r"[\x00-\x1f\x7f\\\\?#]|^ | $")
"""Characters that the library, which treats names as addresses, drops, truncates at or treats as a slash."""


def path_inside(name: str, inside: Path) -> Path | None:
    """Return the file that a log names if it certainly lies in the resolved folder `inside`; else None."""
    if _ODD.search(name) or (_ADDRESS.match(name) and not name.startswith("file:///")):
        return None
    path = Path(inside, unquote(name.removeprefix("file://")))
    return path if path.resolve().is_relative_to(inside) else None


def is_elsewhere(name: str, place: str) -> bool:
    """Return whether a log at the address `place` names a file in another kind of store, such as on this machine."""
    scheme = _ADDRESS.match(name.strip())
    return _ODD.search(name) is not None or (scheme is not None and scheme[0].lower() != f"{place.partition(':')[0]}:")


def outside(name: str, address: Address, key: str) -> Problem:
    fix = "copy the rows into a table of their own (a shallow clone has none)"
    return Problem(key, f"{name} lies outside the table's folder", fix, str(address))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry))


def _refuse_growing(checkpoint: str) -> None:
    """Raises ValueError if a checkpoint, which the library holds in memory, is small on disk but would fill most of it."""
    with pq.ParquetFile(checkpoint) as file:
        rows, size, most = file.metadata.num_rows, 0, available_bytes() / 2
        if rows > MAX_ACTIONS:
            raise ValueError(f"{checkpoint} has {rows:,} actions, more than {MAX_ACTIONS:,}")
        for batch in within_memory(file.iter_batches(batch_size=1024)):
            size += batch.nbytes
            if size > most:
                raise ValueError(f"{checkpoint} takes more than {most / 2**30:.1f} GiB of memory, half of what is free")


def _vectors(log: Path) -> Iterator[str]:
    """Yield the places of deletion vectors, or their beginnings if a number follows. Raises the error of a file that cannot be
    read."""
    for entry in _entries(log):
        actions: list[Any] = []
        try:
            if entry.name.endswith(".json"):
                with open(entry, encoding="utf-8") as lines:
                    actions = [parse_json(line) for line in lines if line.strip()]
            elif entry.name.endswith(".parquet"):
                _refuse_growing(entry.path)
                actions = pq.ParquetFile(entry.path).read(columns=_VECTOR).to_pylist()
        except FileNotFoundError:  # removed by a cleanup in the meantime
            continue
        for action in actions:
            add = action.get("add") if isinstance(action, dict) else None
            vector = add.get("deletionVector") if isinstance(add, dict) else None
            if isinstance(vector, dict) and (kind := vector.get("storageType")) in ("p", "u"):
                name = str(vector.get("pathOrInlineDv"))
                yield name if kind == "p" else name[:-_ENCODED_LENGTH]
