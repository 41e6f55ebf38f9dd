"""Requests and answers in Parquet files, for monitoring and training again: only where it was asked for (`--log-requests`).

Personal data is masked before anything is written (`data.clean`'s rules); of an image there is the digest and the size. Files are
of this user alone, closed every ROWS rows, BYTES bytes or SECONDS seconds, and removed after their retention. A user is kept as a
hash by a key of this folder, by which all that is kept of one is found again, though the name itself may be masked.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dstune.core.parsing import parse_json
from dstune.core.secrets import texts_mapped
from dstune.serve.events import data_in
from dstune.serve.images import LOGGED, without_images

ROWS = 2000
SECONDS = 300.0
AGAIN_SECONDS = 30.0
"""From a write that failed to the next one."""
BYTES = 64 << 20
"""Of requests and answers, at which a file is written before it has its rows."""
MOST_ROWS, MOST_BYTES = 3 * ROWS, 256 << 20
"""That wait for a disk that cannot be written; older ones are lost then."""
COLUMNS = (
    *("id", "response", "created", "key", "user", "user_hash", "model", "version", "route", "status"),
    *("request", "answer"),
)

log = logging.getLogger("dstune.serve")


class RequestLog:
    """A folder of Parquet files. Rows may be added by one thread, and flushed by another."""

    def __init__(self, folder: Path, redact: Callable[[str], str], retention_days: float = 30.0):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._redact, self._retention = folder, redact, retention_days
        self._rows: deque[dict[str, Any]] = deque()
        self._bytes = 0
        self._due = time.monotonic() + SECONDS
        self._not_before = 0.0
        self._lock = threading.Lock()
        self._files = threading.Lock()
        """Held while files are written or removed, so that what is being written is not missed by `forget`."""

    def add(self, row: Mapping[str, Any], route: str, body: Mapping[str, Any], answer: bytes, size: int = 0) -> None:
        """Write a request into the log. row: of the table of answers. size: bytes of the body."""
        record = {**row, "route": route, "request": body, "answer": answer, "bytes": size + len(answer)}
        with self._lock:
            self._rows.append(record)
            self._bytes += record["bytes"]
            if self._bytes > MOST_BYTES:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drop the oldest of what waits, where that is too much."""
        lost = 0
        while len(self._rows) > MOST_ROWS or self._bytes > MOST_BYTES:
            self._bytes -= self._rows.popleft()["bytes"]
            lost += 1
        if lost:
            log.error("%d requests are not logged: %s cannot be written", lost, self.folder)

    def flush(self, *, now: bool = False) -> None:
        """Write a file if there are rows enough, or they are old; remove files that are too old."""
        with self._files:
            self._flush(now=now)

    def _flush(self, *, now: bool) -> None:
        clock = time.monotonic()
        with self._lock:
            full = (len(self._rows) >= ROWS or self._bytes >= BYTES) and clock >= self._not_before
            if not (now or full or clock >= self._due):
                return
            rows, size = [*self._rows], self._bytes
            self._rows.clear()
            self._bytes = 0
            self._due = clock + SECONDS
        try:
            if rows:
                self._write([made for row in rows if (made := self._redacted(row))])
        except BaseException:
            with self._lock:
                self._rows.extendleft(reversed(rows))
                self._bytes += size
                self._drop_oldest()
                self._due = self._not_before = clock + AGAIN_SECONDS
            raise
        oldest = time.time() - self._retention * 86400
        for pattern in ("*.parquet", ".*.incomplete"):
            for file in self.folder.glob(pattern):
                if file.stat().st_mtime < oldest:
                    file.unlink(missing_ok=True)

    def close(self) -> None:
        self.flush(now=True)

    def forget(self, user: str) -> int:
        """Remove all rows of a user. Returns how many there were."""
        with self._files:
            self._flush(now=True)
            for file in self.folder.glob(".*.incomplete"):  # of a server that was killed while it wrote
                file.unlink()
            return sum(self._forget(file, user) for file in sorted(self.folder.glob("*.parquet")))

    def _forget(self, file: Path, user: str) -> int:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        if "user_hash" in table.column_names:
            others = pc.not_equal(table["user_hash"], self._hash(user))
        else:  # written before there was one: all whose name was masked in the same way
            others = pc.not_equal(table["user"], self._redact(user))
        remaining = table.filter(pc.fill_null(others, True))
        if len(remaining) == len(table):
            return 0
        if len(remaining):
            self._write_table(remaining, modified=file.stat().st_mtime_ns)  # its retention goes on
        file.unlink()
        return len(table) - len(remaining)

    @cached_property
    def _key(self) -> bytes:
        return _own_key(self.folder / "user-key")

    def _hash(self, user: str) -> str:
        return hmac.digest(self._key, user.encode("utf-8", "surrogatepass"), "sha256").hex()

    def _redacted(self, row: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._masked(row)
        except Exception:  # one that cannot be masked must not hold up the others for ever
            log.exception("the request %s is not logged", row["id"])
            return None

    def _masked(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = texts_mapped(answer_value(row["answer"]), self._redact)
        request = texts_mapped(without_images(row["request"]), self._redact_but_digests)
        user = row["user"] and self._redact(row["user"])
        written = {
            name: json.dumps(value, ensure_ascii=False) for name, value in (("request", request), ("answer", answer))
        }
        return row | {"user": user, "user_hash": row["user"] and self._hash(row["user"])} | written

    def _redact_but_digests(self, text: str) -> str:
        return text if LOGGED.fullmatch(text) else self._redact(text)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        self._write_table(pa.table({name: [row[name] for row in rows] for name in COLUMNS}))

    def _write_table(self, table: Any, modified: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
        unfinished = self.folder / f".{name}.incomplete"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream, pa.PythonFile(stream) as file:
            pq.write_table(table, file)
        if modified is not None:
            os.utime(unfinished, ns=(modified, modified))
        unfinished.rename(self.folder / f"{name}.parquet")


def _own_key(path: Path) -> bytes:
    """Return the key of this folder, made where there is none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(made := secrets.token_bytes(32))
    return made


_STREAM = re.compile(r"\ufeff?(?:data|event|id|retry)?:")


def answer_value(raw: bytes) -> Any:
    """Return what an answer says: its JSON, or the text of each choice of a stream."""
    text = raw.decode("utf-8", "replace")
    if not _STREAM.match(text):
        try:
            return parse_json(text)
        except ValueError:  # an answer that was cut
            return text
    choices: dict[int, str] = {}
    for data in data_in(raw):
        try:
            for choice in json.loads(data).get("choices", []):
                delta = choice.get("delta", {})
                written = str(choice.get("text") or delta.get("content") or "")
                if delta.get("tool_calls"):
                    written += json.dumps(delta["tool_calls"], ensure_ascii=False)
                choices[int(choice["index"])] = choices.get(int(choice["index"]), "") + written
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            continue
    return [choices[index] for index in sorted(choices)]
