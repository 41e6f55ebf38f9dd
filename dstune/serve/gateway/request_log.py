"""Logs requests and answers to Parquet files, for monitoring and further training, if `--log-requests` is given.

Personal data is masked before anything is written (`data.clean`'s rules); an image is replaced by its digest and size. Files can be
read by this user only; they are closed after ROWS rows, BYTES bytes or SECONDS seconds, and deleted after their retention. A user's
name may be masked, so rows also hold its hash, keyed by a secret of this folder: that hash finds a user's rows for deletion.
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
from dstune.serve.events import stream_data
from dstune.serve.images import LOGGED, without_images

ROWS = 2000
SECONDS = 300.0
AGAIN_SECONDS = 30.0
"""Pause after a failed write."""
BYTES = 64 << 20
"""Bytes of requests and answers after which a file is written before it has ROWS rows."""
MOST_ROWS, MOST_BYTES = 3 * ROWS, 256 << 20
"""Limits of what waits for a disk that cannot be written; older rows are lost then."""
COLUMNS = (
    *("id", "response", "created", "key", "user", "user_hash", "safety_hash", "model", "version", "route", "status"),
    *("request", "answer"),
)

log = logging.getLogger("dstune.serve")


class RequestLog:
    """A folder of Parquet files. One thread may add rows while another one flushes."""

    def __init__(self, folder: Path, redact: Callable[[str], str], retention_days: float = 30.0):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._redact, self._retention = folder, redact, retention_days
        self._rows: deque[dict[str, Any]] = deque()
        self._bytes = 0
        self._due = time.monotonic() + SECONDS
        self._not_before = 0.0
        self._lock = threading.Lock()
        self._files = threading.Lock()
        """Held while files are written or removed, so that `forget` does not miss a file that is being written."""

    def add(self, row: Mapping[str, Any], route: str, body: Mapping[str, Any], answer: bytes, size: int = 0) -> None:
        """Add a request to the log. row: its row in the table of answers. size: bytes of the body."""
        record = {**row, "route": route, "request": body, "answer": answer, "bytes": size + len(answer)}
        with self._lock:
            self._rows.append(record)
            self._bytes += record["bytes"]
            if self._bytes > MOST_BYTES:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drop the oldest rows if too much waits to be written."""
        lost = 0
        while len(self._rows) > MOST_ROWS or self._bytes > MOST_BYTES:
            self._bytes -= self._rows.popleft()["bytes"]
            lost += 1
        if lost:
            log.error("%d requests are not logged: %s cannot be written", lost, self.folder)

    def flush(self, *, now: bool = False) -> None:
        """Write a file if there are enough rows or they are old; remove files past their retention."""
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
                self._write([redacted_row for row in rows if (redacted_row := self._redacted(row))])
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
        """Remove all rows of a user and return their number."""
        with self._files:
            self._flush(now=True)
            for file in self.folder.glob(".*.incomplete"):  # left by a server that was killed while writing
                file.unlink()
            return sum(self._forget(file, user) for file in sorted(self.folder.glob("*.parquet")))

    def _forget(self, file: Path, user: str) -> int:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        if "user_hash" in table.column_names:
            is_other_user = pc.fill_null(pc.not_equal(table["user_hash"], self._hash(user)), True)
            if "safety_hash" in table.column_names:
                is_other_name = pc.fill_null(pc.not_equal(table["safety_hash"], self._hash(user)), True)
                is_other_user = pc.and_(is_other_user, is_other_name)
        else:  # a file without hashes: remove all rows whose masked name is the same
            is_other_user = pc.not_equal(table["user"], self._redact(user))
        remaining = table.filter(pc.fill_null(is_other_user, True))
        if len(remaining) == len(table):
            return 0
        if len(remaining):
            self._write_table(
                remaining, modified=file.stat().st_mtime_ns
            )  # keep the time from which its retention counts
        file.unlink()
        return len(table) - len(remaining)

    @cached_property
    def _key(self) -> bytes:
        return _create_or_read_key(self.folder / "user-key")

    def _hash(self, user: str) -> str:
        return hmac.digest(self._key, user.encode("utf-8", "surrogatepass"), "sha256").hex()

    def _redacted(self, row: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._masked(row)
        except Exception:  # a row that cannot be masked must not block the others for ever
            log.exception("the request %s is not logged", row["id"])
            return None

    def _masked(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = texts_mapped(answer_value(row["answer"]), self._redact)
        request = texts_mapped(without_images(row["request"]), self._redact_but_digests)
        user = row["user"] and self._redact(row["user"])
        columns = {
            name: json.dumps(value, ensure_ascii=False) for name, value in (("request", request), ("answer", answer))
        }
        names = (("user_hash", row["user"]), ("safety_hash", row.get("safety_identifier")))
        return row | {"user": user} | {column: name and self._hash(name) for column, name in names} | columns

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


def _create_or_read_key(path: Path) -> bytes:
    """Return the secret key of this folder, creating it if it is missing."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(key := secrets.token_bytes(32))
    return key


_STREAM = re.compile(r"\ufeff?(?:data|event|id|retry)?:")


def answer_value(raw: bytes) -> Any:
    """Return the content of an answer: its JSON, or the text of each choice of a stream."""
    text = raw.decode("utf-8", "replace")
    if not _STREAM.match(text):
        try:
            return parse_json(text)
        except ValueError:  # the answer was cut off
            return text
    choices: dict[int, str] = {}
    for data in stream_data(raw):
        try:
            for choice in json.loads(data).get("choices", []):
                delta = choice.get("delta", {})
                new_text = str(choice.get("text") or delta.get("content") or "")
                if delta.get("tool_calls"):
                    new_text += json.dumps(delta["tool_calls"], ensure_ascii=False)
                choices[int(choice["index"])] = choices.get(int(choice["index"]), "") + new_text
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            continue
    return [choices[index] for index in sorted(choices)]
