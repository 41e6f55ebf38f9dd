"""`delta://PATH`: a Delta table in a folder, or at an address of an object store."""

from __future__ import annotations

from dataclasses import replace

from dstune.lakehouse.address import Address
from dstune.lakehouse.source import Table
from dstune.lakehouse.tables import place_of
from dstune.protocols import data_source


@data_source
class Delta(Table):
    name = "delta"

    def locate(self, address: Address, key: str, *, to_write: bool = False) -> tuple[Address, str, dict[str, str]]:
        place = place_of(address, key, to_write=to_write)
        return address if to_write else replace(address, location=place), place, {}
