"""Copies of tables in the cache: `tables/KEY/rows.parquet` and its metadata, for each version, columns and predicate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.core.paths import cache_root
from dstune.data import cache
from dstune.data.files import DataFile
from dstune.lakehouse.address import Address
from dstune.lakehouse.tables import check_files, check_predicate, files_of, open_table, scan

ROWS, META = "rows.parquet", "table.json"
FORMAT = 1
EXPANSION = 6
"""Approximate growth of columns from a file to memory."""


def resolve(
    place: str, address: Address, key: str, stage: Callable[[str], None], options: Mapping[str, str] | None = None
) -> Address:
    """Copy the rows into the cache if needed, and return the resolved address. Raises UserError."""
    table, address = open_table(place, address, key, options)
    check_predicate(table, address, key)
    listed = files_of(table, address, key)
    listing = xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())
    if record := describe(address):
        if record["files"] != listing:  # a copy of the table with another history has replaced it
            reason = f"version {address.version} of this table has other files than when its rows were read"
            raise UserError(Problem(key, reason, f"if it shall be read anew: rm -r {_folder(address)}", str(address)))
        return address
    size = check_files(listed, place, address, key)
    stage(f"reading version {address.version} of {address.location} ({size / 1e6:.0f} MB)")

    def make(folder: Path) -> None:
        from dstune.lakehouse.ordered import ORDER, write_ordered

        scratch = folder / "pieces"
        scratch.mkdir()
        written = write_ordered(scan(table, address, key), folder / ROWS, scratch, size * EXPANSION)
        shutil.rmtree(scratch)
        if not written.rows:
            reason = f"no row fulfils {address.where}" if address.where else "the table has no rows"
            raise UserError(Problem(key, reason, "another version or predicate", str(address)))
        record = {
            "table": f"{address.scheme}://{address.location}",
            "id": address.table_id,
            "version": address.version,
            "columns": list(address.columns),
            "where": address.where,
            "rows": written.rows,
            "digest": written.digest,
            "order": ORDER,
            "files": listing,
        }
        (folder / META).write_text(json.dumps(record, indent=1))

    cache.entry(cache_root() / "tables", _name(address), make)
    return address


def files(address: Address, key: str) -> list[DataFile]:
    """Return the cached files. Raises UserError if this machine has none."""
    record = describe(address)
    if not record:
        reason = "its rows are not on this machine" if address.is_resolved else "its version is not resolved yet"
        fix = "`dstune train` reads them where it is started; ranks on other nodes need a DSTUNE_CACHE that all nodes share"
        raise UserError(Problem(key, reason, fix, str(address)))
    label = f"{address.scheme}://{address.location}@{address.version}"
    return [DataFile(_folder(address) / ROWS, label=label, digest=str(record["digest"]))]


def describe(address: Address) -> dict[str, Any]:
    """Return the metadata of the cached rows; empty if there are none."""
    return object_in(_folder(address) / META) if address.is_resolved else {}


def is_here(address: Address) -> bool:
    return bool(describe(address))


def _folder(address: Address) -> Path:
    return cache_root() / "tables" / _name(address)


def _name(address: Address) -> str:
    identity = [
        FORMAT,
        address.scheme,
        address.location,
        address.table_id,
        address.version,
        address.columns,
        address.where,
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
