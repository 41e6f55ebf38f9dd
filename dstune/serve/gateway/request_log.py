"""Requests and answers in Parquet files, for monitoring and training again: only where it was asked for (`--log-requests`).

Personal data is masked before anything is written (`data.clean`'s rules). Files are of this user alone, closed every
ROWS rows or SECONDS seconds, and removed after their retention.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROWS = 2000
SECONDS = 300.0
COLUMNS = ("id", "response", "created", "key", "user", "model", "version", "route", "status", "request", "answer")


class RequestLog:
    """A folder of Parquet files. Rows may be added by one thread, and flushed by another."""

    def __init__(self, folder: Path, redact: Callable[[str], str], retention_days: float = 30.0):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._redact, self._retention = folder, redact, retention_days
        self._rows: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any], route: str, body: Mapping[str, Any], answer: bytes) -> None:
        """row: of the table of answers."""
        record = {**row, "route": route, "request": body, "answer": answer}
        with self._lock:
            self._rows.append(record)

    def flush(self, *, now: bool = False) -> None:
        """Write a file if there are rows enough, or they are old; remove files that are too old."""
        with self._lock:
            due = now or len(self._rows) >= ROWS or time.monotonic() - self._began >= SECONDS
            if not due:
                return
            rows, self._rows = self._rows, []
            self._began = time.monotonic()
        if rows:
            self._write([self._redacted(row) for row in rows])
        oldest = time.time() - self._retention * 86400
        for file in self.folder.glob("*.parquet"):
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)

    def close(self) -> None:
        self.flush(now=True)

    def forget(self, user: str) -> int:
        """Remove all rows of a user. Returns how many there were."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        self.flush(now=True)
        removed = 0
        for file in sorted(self.folder.glob("*.parquet")):
            table = pq.read_table(file)
            kept = table.filter(pc.fill_null(pc.not_equal(table["user"], user), True))
            if len(kept) == len(table):
                continue
            removed += len(table) - len(kept)
            if len(kept):
                self._write_table(kept)
            file.unlink()
        return removed

    def _redacted(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = _texts_mapped(answer_value(row["answer"]), self._redact)
        request = _texts_mapped(row["request"], self._redact)
        user = row["user"] and self._redact(row["user"])
        written = {
            name: json.dumps(value, ensure_ascii=False) for name, value in (("request", request), ("answer", answer))
        }
        return row | {"user": user} | written

    def _write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        self._write_table(pa.table({name: [row[name] for row in rows] for name in COLUMNS}))

    def _write_table(self, table: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
        unfinished = self.folder / f".{name}.incomplete"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream, pa.PythonFile(stream) as file:
            pq.write_table(table, file)
        unfinished.rename(self.folder / f"{name}.parquet")


def _texts_mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with `change` applied to each text of it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _texts_mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts_mapped(item, change) for item in value]
    return value


def answer_value(raw: bytes) -> Any:
    """What an answer says: its JSON, or the text of each choice of a stream."""
    text = raw.decode("utf-8", "replace")
    if not text.startswith("data: "):
        try:
            return json.loads(text)
        except ValueError:  # an answer that was cut
            return text
    choices: dict[int, str] = {}
    for line in text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        try:
            chunk = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue
        for choice in chunk.get("choices", []):
            delta = choice.get("delta", {})
            written = choice.get("text") or delta.get("content") or ""
            if delta.get("tool_calls"):
                written += json.dumps(delta["tool_calls"], ensure_ascii=False)
            choices[choice["index"]] = choices.get(choice["index"], "") + written
    return [choices[index] for index in sorted(choices)]
