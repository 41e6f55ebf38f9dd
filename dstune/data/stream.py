"""Rows of many shards as one endless stream that can be entered where any block of it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import xxhash

from dstune.data import sources

HEAD_BYTES = 1 << 16
"""How much of a shard is hashed to know it again: a stream is too long to be read for that."""

MAX_NAMES = 3
"""Names of shards in a message, of each kind."""

SHARDS_SEED = 1
"""Keeps the order of shards apart from the other orders that the run's seed gives."""


@dataclass(frozen=True)
class Position:
    """Where in the stream the next row is."""

    passes: int = 0
    """Whole passes over all shards before it."""
    shard: int = 0
    """Place of its shard in the order of this pass."""
    row: int = 0
    """Rows of the shard before it."""
    mark: dict[str, Any] | None = None
    """How the shard finds it without reading those rows, where its format allows that."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Shard(Protocol):
    """A part of the stream that is read from its start to its end."""

    def rows(self, row: int, mark: dict[str, Any] | None) -> Iterator[sources.RawRow]:
        """Yield the rows behind the first `row` ones."""

    def mark(self) -> dict[str, Any] | None:
        """Return how to find the row behind the one that `rows` gave last."""

    def share(self, position: Position) -> float:
        """Return how much of it is before `position`, from 0 to 1; 0 where that is not known without reading."""

    def name(self) -> str:
        """Return what messages call it."""

    def identity(self) -> str:
        """Return a text that changes with the shard, and takes no reading of all of it."""


class FileShard:
    """A file. The lines of a JSONL file are found again by their byte, the rows of a Parquet file by their row group;
    of any other file the rows before are read and left out."""

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
    """The rows of `shards`, pass after pass, each pass in another order of the shards.

    The order is a function of (seed, pass), so a position means the same rows whenever it is entered.
    """

    def __init__(self, shards: list[Shard], seed: int):
        self._shards = shards
        self._seed = seed
        self.position = Position()
        """Where the next block begins."""

    def take(self, begin: Position, count: int) -> Iterator[tuple[int, sources.RawRow]]:
        """Yield up to `count` rows from `begin`, each with the number of its shard; fewer at the end of a pass.

        Afterwards `position` is behind the last of them. Nothing comes only where a whole pass has no row.
        """
        row_count, self.position = 0, begin
        ends = begin.passes + 2
        while row_count < count and self.position.passes < ends:
            place = self.position
            number = self.order(place.passes)[place.shard]
            shard = self._shards[number]
            rows = place.row
            whole = True
            for raw in shard.rows(place.row, place.mark):
                rows += 1
                row_count += 1
                yield number, raw
                if row_count == count:
                    self.position = replace(place, row=rows, mark=shard.mark())
                    whole = False
                    break
            if not whole:
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
        """Return passes up to `position`, by shards: 1.5 is half of the second pass."""
        inside = self._shards[self.order(position.passes)[position.shard]].share(position)
        return position.passes + (position.shard + inside) / len(self._shards)

    def shards(self) -> list[list[str]]:
        """Return the name and the identity of each shard."""
        return [[shard.name(), shard.identity()] for shard in self._shards]

    def identity(self) -> str:
        """Return digest of what the shards are, whatever folder they lie in."""
        return identity_of(self.shards())


def identity_of(shards: list[list[str]]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(identity for _, identity in shards).encode())


def difference(before: list[list[str]], now: list[list[str]]) -> str:
    """Return how the shards differ, in words; empty where they do not. Each is given by its name and identity."""
    if before == now:
        return ""
    old, new = dict(before), dict(now)
    names_by_change = {
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "changed": [name for name in old if name in new and old[name] != new[name]],
    }
    words = [
        f"{change}: {', '.join(names[:MAX_NAMES])}{' ...' * (len(names) > MAX_NAMES)}"
        for change, names in names_by_change.items()
        if names
    ]
    return "; ".join(words) or f"{len(before)} files then, {len(now)} in this order now"
