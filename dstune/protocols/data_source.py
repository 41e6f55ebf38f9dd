"""What a data source is: rows that are no files which anybody could open, by an address or held by a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dstune.data.files import DataFile
    from dstune.protocols.launcher import Check


class DataSource:
    """Base of every source; it registers with `@data_source`. What it can do is what it has the methods of:

    - `ReadsAddresses`: `data.train=NAME://...`
    - `WritesAddresses`: `dstune predict --output NAME://...`
    - `HoldsRows`: `dstune.train(train=rows)` for rows of a class of its own

    Import libraries within methods: every command that is given an address imports the sources.
    """

    name: ClassVar[str] = ""
    """The scheme of its addresses."""

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """Yield what `dstune doctor` finds of it on this machine. Asks no address."""
        yield from ()


@runtime_checkable
class ReadsAddresses(Protocol):
    """A source whose addresses (`NAME://...`) stand for rows.

    The launching process resolves an address once: a version is chosen, checked and named, and its rows are copied to the
    cache, or are files already. Ranks read these files.
    """

    def resolve(self, spec: str, key: str, stage: Callable[[str], None]) -> str:
        """Return the address with everything that `spec` leaves open, which stands for the same rows ever after.

        key: where the address came from, such as `data.train`. stage: told what takes long. Raises UserError.
        """
        ...

    def files(self, spec: str, key: str) -> list[DataFile]:
        """Return the files with the rows of a resolved address. Raises UserError where they are not on this machine."""
        ...

    def describe(self, spec: str) -> dict[str, Any]:
        """Return what the data report says of a resolved address."""
        ...


@runtime_checkable
class WritesAddresses(Protocol):
    """A source that predictions can be written to."""

    def check_output(self, spec: str) -> None:
        """Raise UserError, before anything is computed, where nothing can be written to an address."""
        ...

    def write(self, spec: str, rows: Path, identity: str, *, replace: bool) -> str:
        """Add the JSON lines of `rows` in one transaction, or replace everything there by them.

        identity: of these rows; what was written with it before is not written again. Returns a line on what was done. Raises
        UserError.
        """
        ...


@runtime_checkable
class HoldsRows(Protocol):
    """A source whose rows a Python program holds, as an object of a class that dstune does not know."""

    def holds(self, rows: Any) -> bool:
        """Return whether `rows` is such an object. Imports no library for the question."""
        ...

    def save(self, rows: Any, file: Path, key: str) -> int:
        """Write `rows` to `file` as Parquet, in an order that their content decides; return their number.

        key: the argument that `rows` came from. Raises UserError where they cannot be had.
        """
        ...
