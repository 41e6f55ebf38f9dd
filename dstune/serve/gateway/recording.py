"""What is remembered of answers: who asked which model when, and how many tokens; with `--log-requests` their text too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import delete, insert, select

from dstune.serve.gateway.request import Request
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.store.database import Database, now
from dstune.serve.store.tables import AnswerRow, Feedback

log = logging.getLogger("dstune.serve")

FLUSH_SECONDS = 0.5
MOST_KEPT = 1 << 20
"""Bytes of an answer that are kept for the log."""
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,128})"')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})')
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')


class Record:
    """Of one answer, while it is passed on."""

    def __init__(self, *, keeps_text: bool):
        self.response: str | None = None
        self.events = 0
        self.tokens = 0
        self.input_tokens = 0
        self.text = bytearray()
        self._keeps_text = keeps_text
        self._first = True

    def take(self, chunk: bytes) -> None:
        if self._first:
            self._first = False
            found = _ID.search(chunk[:1024])
            self.response = found[1].decode("utf-8", "replace") if found else None
        self.events += chunk.count(b"data: ")
        if b'"total_tokens"' in chunk:
            self.tokens = int(_TOTAL.findall(chunk)[-1])
            if prompts := _PROMPT.findall(chunk):
                self.input_tokens = int(prompts[-1])
        if self._keeps_text and len(self.text) < MOST_KEPT:
            self.text += chunk[: MOST_KEPT - len(self.text)]

    @property
    def used(self) -> int:
        """Tokens that the engine tells; of a stream without them, its events."""
        return self.tokens or self.events


class Recorder:
    """Writes answers to the database, many at a time, beside the requests."""

    def __init__(self, database: Database, request_log: RequestLog | None = None):
        self._database, self._log = database, request_log
        self._rows: list[dict[str, Any]] = []
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self.written: Any = lambda request, tokens: None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.flush()
        if self._log is not None:
            await asyncio.to_thread(self._log.close)

    @contextmanager
    def answer(self, request: Request, body: Mapping[str, Any]) -> Iterator[Record]:
        record = Record(keeps_text=self._log is not None)
        try:
            yield record
        finally:
            self._finish(request, body, record)

    def _finish(self, request: Request, body: Mapping[str, Any], record: Record) -> None:
        assert request.caller is not None
        self.written(request, record.used)
        row = {
            "id": request.id,
            "response": record.response,
            "key": request.caller.id,
            "model": request.model,
            "version": request.version,
            "user": request.user,
            "status": request.status,
            "tokens": record.used,
            "input_tokens": record.input_tokens,
            "seconds": time.monotonic() - request.began,
            "created": now(),
        }
        self._rows.append(row)
        if self._log is not None:
            self._log.add(row, request.path, body, bytes(record.text))

    async def forget(self, user: str) -> int:
        """Remove what is kept of a user: answers, what was said of them, and their text. Returns how many there were."""
        await self.flush()
        removed = await asyncio.to_thread(self._remove, user)
        if self._log is not None:
            await asyncio.to_thread(self._log.forget, user)
        return removed

    def _remove(self, user: str) -> int:
        with self._database.session.begin() as session:
            found = list(session.scalars(select(AnswerRow).where(AnswerRow.user == user)))
            session.execute(delete(Feedback).where(Feedback.answer.in_([row.id for row in found])))
            for row in found:
                session.delete(row)
            return len(found)

    async def flush(self) -> None:
        """What was answered until now is in the database."""
        async with self._writing:
            rows, self._rows = self._rows, []
            if rows:
                await asyncio.to_thread(self._write, rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """By one statement: an object a row would take the interpreter from the requests for ten times as long."""
        with self._database.session.begin() as session:
            session.connection().execute(insert(AnswerRow), rows)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
                if self._log is not None:
                    await asyncio.to_thread(self._log.flush)
            except Exception:
                log.exception("answers could not be recorded")
