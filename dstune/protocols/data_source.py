"""What a data source is: a place named `SCHEME://...` whose rows are no files that anybody could open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from dstune.data.files import DataFile
    from dstune.protocols.launcher import Check


class DataSource:
    """Base of every source. A subclass has its scheme as `name`, and registers with `@data_source`.

    The launching process resolves an address once: a version is chosen, checked and named, and its rows are copied to the
    cache. Ranks read the copy.
    """

    name: ClassVar[str] = ""

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """What `dstune doctor` finds of it on this machine. No address is asked."""
        yield from ()

    def resolve(self, spec: str, key: str, stage: Callable[[str], None]) -> str:
        """The address with everything that `spec` leaves open; its rows are in the cache then. key: where it came from.
        stage: told what takes long. Raises UserError."""
        raise NotImplementedError

    def files(self, spec: str, key: str) -> list[DataFile]:
        """The copy of a resolved address. Raises UserError where there is none on this machine."""
        raise NotImplementedError

    def describe(self, spec: str) -> dict[str, Any]:
        """What the data report says of a resolved address."""
        raise NotImplementedError

    def check_output(self, spec: str) -> None:
        """Before anything is computed: raises UserError where nothing can be written to an address."""

    def write(self, spec: str, rows: Path, identity: str, *, replace: bool) -> str:
        """Add the JSON lines of `rows` in one transaction, or replace everything there by them. identity: of these rows; what
        was written with it before is not written again. Returns a line on what was done. Raises UserError."""
        raise NotImplementedError
