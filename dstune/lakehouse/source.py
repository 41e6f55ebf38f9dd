"""The data source shared by `delta://` and `uc://`: both lead to a Delta table, and differ in how its place is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.data.files import DataFile
from dstune.lakehouse import copies
from dstune.lakehouse.address import Address, parse
from dstune.lakehouse.tables import refuse_parts, require_library
from dstune.protocols.data_source import DataSource


class Table(DataSource):
    def locate(self, address: Address, key: str, *, to_write: bool = False) -> tuple[Address, str, dict[str, str]]:
        """Return the address to record, the table's place, and the reader's options for opening it. Raises UserError."""
        raise NotImplementedError

    def resolve(self, spec: str, key: str, stage: Callable[[str], None]) -> str:
        address = parse(spec, key)
        if copies.is_here(address):  # the exact version of this table, which may no longer exist
            return spec
        require_library(key, spec)
        address, place, options = self.locate(address, key)
        return str(copies.resolve(place, address, key, stage, options))

    def files(self, spec: str, key: str) -> list[DataFile]:
        return copies.files(parse(spec, key), key)

    def describe(self, spec: str) -> dict[str, Any]:
        return copies.describe(parse(spec, "data"))

    def check_output(self, spec: str) -> None:
        require_library("--output", spec)
        address = parse(spec, "--output")
        refuse_parts(address)
        self.locate(address, "--output", to_write=True)

    def write(self, spec: str, rows: Path, identity: str, *, replace: bool) -> str:
        from dstune.lakehouse.writing import write_rows

        address, place, options = self.locate(parse(spec, "--output"), "--output", to_write=True)
        return write_rows(place, address, rows, identity, replace=replace, options=options)
