"""`delta://PATH`: a Delta table in a folder, or at an address of an object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.data.files import DataFile
from dstune.data.lakehouse import _copies
from dstune.data.lakehouse._address import parse
from dstune.data.lakehouse._tables import place_of, refuse_parts, require_library
from dstune.protocols import data_source
from dstune.protocols.data_source import DataSource


@data_source
class Delta(DataSource):
    name = "delta"

    def resolve(self, spec: str, key: str, stage: Callable[[str], None]) -> str:
        address = parse(spec, key)
        if _copies.is_here(address):  # the very version, of the very table: it may be gone by now
            return spec
        require_library(key, spec)
        place = place_of(address, key)
        return str(_copies.resolve(place, replace(address, location=place), key, stage))

    def files(self, spec: str, key: str) -> list[DataFile]:
        return _copies.files(parse(spec, key), key)

    def describe(self, spec: str) -> dict[str, Any]:
        return _copies.describe(parse(spec, "data"))

    def check_output(self, spec: str) -> None:
        require_library("--output", spec)
        address = parse(spec, "--output")
        refuse_parts(address)
        place_of(address, "--output", to_write=True)

    def write(self, spec: str, rows: Path, identity: str, *, replace: bool) -> str:
        from dstune.data.lakehouse._writing import write_rows

        address = parse(spec, "--output")
        return write_rows(place_of(address, "--output", to_write=True), address, rows, identity, replace=replace)
