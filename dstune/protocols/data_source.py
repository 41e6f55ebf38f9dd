"""Defines a data source: rows behind an address, or held by a program, instead of in files that can be opened directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dstune.data.files import DataFile
    from dstune.protocols.launcher import Check


class DataSource:
    """Base of every source. Subclasses register with `@data_source`, and implement the protocols of their abilities:

    - `ReadsAddresses`: `data.train=NAME://...`
    - `WritesAddresses`: `dstune predict --output NAME://...`
    - `HoldsRows`: `dstune.train(train=rows)` for rows of its own class

    Import libraries inside methods: every command that gets an address imports all sources.
    """

    name: ClassVar[str] = ""
    """The scheme of its addresses."""

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """Yield the lines of `dstune doctor` about this source. Contacts no address."""
        yield from ()


@runtime_checkable
class ReadsAddresses(Protocol):
    """A source whose addresses (`NAME://...`) stand for rows.

    The launching process resolves an address once: it chooses, checks and names a version, and copies its rows to the cache unless
    they already are files. Ranks read these files.
    """

    def resolve(self, spec: str, key: str, stage: Callable[[str], None]) -> str:
        """Return a complete address, which always stands for the rows that `spec` stands for now.

        key: the key with the address, such as `data.train`. stage: called with a text before work that takes long. Raises
        UserError.
        """
        ...

    def files(self, spec: str, key: str) -> list[DataFile]:
        """Return the files with the rows of a resolved address. Raises UserError if they are not on this machine."""
        ...

    def describe(self, spec: str) -> dict[str, Any]:
        """Return the entries of the data report about a resolved address."""
        ...


@runtime_checkable
class WritesAddresses(Protocol):
    """A source that predictions can be written to."""

    def check_output(self, spec: str) -> None:
        """Raise UserError if an address cannot be written to. Called before anything is computed."""
        ...

    def write(self, spec: str, rows: Path, identity: str, *, replace: bool) -> str:
        """Append the JSON lines of the file `rows` in one transaction, or replace all existing rows by them.

        identity: identifies these rows; rows that were already written with it are not written again. Returns a line that says what
        was done. Raises UserError.
        """
        ...


@runtime_checkable
class HoldsRows(Protocol):
    """A source for rows that a Python program holds, in an object of a class that dstune does not know."""

    def holds(self, rows: Any) -> bool:
        """Return whether `rows` is such an object, without importing a library."""
        ...

    def save(self, rows: Any, file: Path, key: str) -> int:
        """Write `rows` to `file` as Parquet, in an order that depends only on their content; return their number.

        key: the argument that `rows` came from. Raises UserError if the rows cannot be read.
        """
        ...
