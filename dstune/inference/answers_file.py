"""A file of answers that survives a killed command: the next one continues after the last complete batch.

While it is being written it is called `NAME.part`, and its first line records the request; when complete, it gets its final name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from dstune.checkpoint import copied
from dstune.core.arguments import refuse_place
from dstune.core.errors import Problem, UserError
from dstune.core.limited_places import refused_operations
from dstune.core.paths import cache_root
from dstune.data.sources import registered_source
from dstune.inference.answer_tables import TABLES, as_named
from dstune.protocols import DATA_SOURCES
from dstune.protocols.data_source import WritesAddresses


def add_flags(parser: argparse.ArgumentParser, unit: str, batch_size: int) -> None:
    """Add the flags of a command that answers rows. unit: the name of what a batch consists of."""
    parser.add_argument(
        "--output",
        type=_place,
        metavar="FILE",
        help="answers as JSON lines, as CSV or Parquet by the ending, or a table (delta://PATH); killed and repeated, it goes on",
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --output")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="N",
        help=f"{unit} computed together (default {batch_size})",
    )
    parser.add_argument("--checkpoint", default="last", help="of a run: a step, `best` or `last` (default)")


def _place(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def answers_file(place: Path | str, request: dict[str, Any], batch_size: int, *, force: bool) -> AnswersFile:
    """Open a file or a table for answers. Raises UserError as `AnswersFile` does, or if there is no such table."""
    if isinstance(place, Path):
        if not refused_operations(place):
            return AnswersFile(place, request, batch_size, force=force)
        refuse_place(place, force, TABLES)

        def put(file: Path) -> str:
            with as_named(file, place.suffix) as suffixed:
                copied.copy(suffixed, place)
            return str(place)

        return AnswersElsewhere(str(place), put, request, batch_size, force=force)
    source = registered_source(place)
    if not isinstance(source, WritesAddresses):
        places = ", ".join(
            f"{name}://" for name, kind in DATA_SOURCES.classes().items() if issubclass(kind, WritesAddresses)
        )
        raise UserError(
            Problem(
                "--output", "nothing is known to write there", f"a file, or {places}" if places else "a file", place
            )
        )
    source.check_output(place)

    def write(file: Path) -> str:
        return source.write(place, file, file.stem, replace=force)

    return AnswersElsewhere(place, write, request, batch_size, force=force)


class AnswersFile:
    """Rows of JSON, appended batch by batch. A file with the ending of a table is converted at the end."""

    written: str
    """The final place of the answers."""

    def __init__(self, path: Path, request: dict[str, Any], batch_size: int, *, force: bool = False):
        """request: everything that the answers depend on; a partial file of another request is refused.

        Raises UserError if `path` or a partial file with other answers exists; with `force`, starts over instead.
        """
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self.written = str(path)
        head = json.dumps({"asked": request, "batch_size": batch_size})
        refuse_place(path, force, TABLES)
        self.done = 0
        if self._part.exists() and not force:
            self._resume(head, batch_size)
        else:
            self._part.write_text(head + "\n", encoding="utf-8")

    def _resume(self, head: str, batch_size: int) -> None:
        ends = [0]  # where the first line and complete batches end
        with self._part.open("rb") as stream:
            if stream.readline().decode("utf-8", "replace") != head + "\n":
                reason = f"{self._part} was begun with other rows, another model or other settings"
                raise UserError(
                    Problem("--output", reason, "repeat that command, or --force to start over", str(self.path))
                )
            ends[0] = end = stream.tell()
            for number, line in enumerate(stream, 1):
                end += len(line)
                if number % batch_size == 0 and line.endswith(b"\n"):
                    ends.append(end)
        self.done = batch_size * (len(ends) - 1)
        os.truncate(self._part, ends[-1])

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append a complete batch, and write it to the disk."""
        with self._part.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Give the file its final name."""
        whole = self.path.with_name(f"{self.path.name}.whole")
        with self._part.open("rb") as source, whole.open("wb") as target:
            source.readline()
            shutil.copyfileobj(source, target)
        with as_named(whole, self.path.suffix) as suffixed:
            suffixed.replace(self.path)
        whole.unlink(missing_ok=True)
        self._part.unlink()


class AnswersElsewhere(AnswersFile):
    """Rows of JSON that are collected in the cache until they are complete, and then brought to their place: a table (in one
    transaction), or a file system that cannot append to files."""

    def __init__(
        self,
        place: str,
        bring: Callable[[Path], str],
        request: dict[str, Any],
        batch_size: int,
        *,
        force: bool = False,
    ):
        """bring: writes the complete file to `place`, and returns a line that says what was done."""
        self._bring, self.written = bring, place
        identity = xxhash.xxh3_128_hexdigest(json.dumps([place, request], sort_keys=True).encode())
        file = cache_root() / "answers" / f"{identity}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        self._whole = file.exists() and not force  # from an earlier command that could not bring it to its place
        if not self._whole:
            super().__init__(file, request, batch_size, force=force)
            self.written = place
            return
        self.path = file
        with file.open("rb") as stream:
            self.done = sum(1 for _ in stream)

    def finish(self) -> None:
        if not self._whole:
            super().finish()
        where = f"the answers are in {self.path}"
        try:
            self.written = self._bring(self.path)
        except UserError as error:
            raise UserError(replace(problem, fix=f"{problem.fix}; {where}") for problem in error.problems) from None
        except OSError as error:
            reason, fix = f"cannot be written: {error.strerror or error}", f"another place; {where}"
            raise UserError(Problem("--output", reason, fix, self.written)) from None
        self.path.unlink()
