"""Read the rows of many shards as one endless stream that can be resumed at the beginning of any block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import xxhash

from dstune.data import sources

HEAD_BYTES = 1 << 16
"""Number of bytes of a shard that are hashed to recognise it: a stream is too long to be read for that."""

MAX_NAMES = 3
"""Maximum number of shards that a message names for each kind of change."""

SHARDS_SEED = 1
"""Makes the order of shards independent of other orders from the run's seed."""


@dataclass(frozen=True)
class Position:
    """The position of the next row in the stream."""

    passes: int = 0
    """Number of complete passes over all shards before it."""
    shard: int = 0
    """Index of its shard in the order of this pass."""
    row: int = 0
    """Number of rows before it in its shard."""
    mark: dict[str, Any] | None = None
    """How the shard finds the row without reading those before it, if its format allows that."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Shard(Protocol):
    """A part of the stream that is read from its start to its end."""

    def rows(self, row: int, mark: dict[str, Any] | None) -> Iterator[sources.RawRow]:
        """Yield the rows after the first `row` rows."""

    def mark(self) -> dict[str, Any] | None:
        """Return the mark (`Position.mark`) of the row after the one that `rows` yielded last."""

    def share(self, position: Position) -> float:
        """Return the share of the shard before `position`, from 0 to 1; 0 if it is unknown without reading."""

    def name(self) -> str:
        """Return the shard's name in messages."""

    def identity(self) -> str:
        """Return a text that changes with the shard's content, without reading all of it."""


class FileShard:
    """A file as a shard.

    To resume, a line of a JSONL file is found by its byte, a row of a Parquet file by its row group; in any other file the
    preceding rows are read and skipped.
    """

    def __init__(self, file: sources.DataFile):
        self._file = file
        self._reader: sources.Lines | None = None

    def rows(self, row: int, mark: dict[str, Any] | None) -> Iterator[sources.RawRow]:
        if sources.has_lines(self._file):
            self._reader = sources.Lines(self._file, **(mark or {}))
            yield from self._reader
        else:
            yield from sources.read(self._file, skip=row)

    def mark(self) -> dict[str, Any] | None:
        return None if self._reader is None else {"offset": self._reader.offset, "line": self._reader.line}

    def share(self, position: Position) -> float:
        return position.mark["offset"] / self._file.path.stat().st_size if position.mark else 0.0

    def name(self) -> str:
        return f"{self._file.path.name}!{self._file.member}" if self._file.member else self._file.path.name

    def identity(self) -> str:
        with self._file.path.open("rb") as stream:
            head = xxhash.xxh3_64_hexdigest(stream.read(HEAD_BYTES))
        return f"{self._file.path.name} {self._file.member} {self._file.path.stat().st_size} {head}"


class Stream:
    """The rows of `shards`, pass after pass, each pass with the shards in a different order.

    The order is a function of (seed, pass), so the same position always gives the same rows.
    """

    def __init__(self, shards: list[Shard], seed: int):
        self._shards = shards
        self._seed = seed
        self.position = Position()
        """Where the next block begins."""

    def take(self, begin: Position, count: int) -> Iterator[tuple[int, sources.RawRow]]:
        """Yield up to `count` rows from `begin`, each with the number of its shard; fewer at the end of a pass.

        Afterwards `position` is after the last of them. No row is yielded only if a complete pass has none.
        """
        row_count, self.position = 0, begin
        passes_limit = begin.passes + 2
        while row_count < count and self.position.passes < passes_limit:
            place = self.position
            number = self.order(place.passes)[place.shard]
            shard = self._shards[number]
            for row_end, raw in enumerate(shard.rows(place.row, place.mark), start=place.row + 1):
                row_count += 1
                yield number, raw
                if row_count == count:
                    self.position = replace(place, row=row_end, mark=shard.mark())
                    return
            if place.shard + 1 < len(self._shards):
                self.position = Position(place.passes, place.shard + 1)
            else:
                self.position = Position(place.passes + 1)
                if row_count:
                    return

    def order(self, number: int) -> list[int]:
        """Return the shards of pass `number` in their order."""
        generator = np.random.MT19937(np.random.SeedSequence([self._seed, number, SHARDS_SEED]))
        return np.random.RandomState(generator).permutation(len(self._shards)).tolist()

    def share(self, position: Position) -> float:
        """Return the number of passes up to `position`, counted by shards: 1.5 is the middle of the second pass."""
        inside = self._shards[self.order(position.passes)[position.shard]].share(position)
        return position.passes + (position.shard + inside) / len(self._shards)

    def shards(self) -> list[list[str]]:
        """Return the name and the identity of each shard."""
        return [[shard.name(), shard.identity()] for shard in self._shards]

    def identity(self) -> str:
        """Return the digest of the shards' identities; the folder that they are in does not matter."""
        return identity_of(self.shards())


def identity_of(shards: list[list[str]]) -> str:
    """Return the digest of the identities in `shards`, each given by its name and identity."""
    return xxhash.xxh3_128_hexdigest("\n".join(identity for _, identity in shards).encode())


def difference(before: list[list[str]], now: list[list[str]]) -> str:
    """Describe how the shards differ; empty if they do not. Each is given by its name and identity."""
    if before == now:
        return ""
    old, new = dict(before), dict(now)
    names_by_change = {
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "changed": [name for name in old if name in new and old[name] != new[name]],
    }
    changes = [
        f"{change}: {', '.join(names[:MAX_NAMES])}{' ...' * (len(names) > MAX_NAMES)}"
        for change, names in names_by_change.items()
        if names
    ]
    return "; ".join(changes) or f"{len(before)} files then, {len(now)} in this order now"
