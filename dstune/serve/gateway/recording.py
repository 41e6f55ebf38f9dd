"""Records answers: which key used which model when, and how many tokens; with `--log-requests` also the text."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import delete, func, insert, or_, select
from sqlalchemy.exc import DataError, IntegrityError

from dstune.serve.asgi import ClientGone
from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.store.database import Database, now
from dstune.serve.store.tables import AnswerRow, Feedback

log = logging.getLogger("dstune.serve")

FLUSH_SECONDS = 0.5
MOST_LOGGED_BYTES = 1 << 20
"""Bytes of an answer that go into the log."""
MOST_ROWS = 100_000
"""Rows that wait for a database that cannot be written; older ones are lost then."""
CARRIED_BYTES = 64
"""The end of a chunk that is searched again with the next one: a key and its number may be split anywhere."""
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,128})"')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})')
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')


class Record:
    """The record of one answer while it is forwarded."""

    def __init__(self, *, keeps_text: bool):
        self.response: str | None = None
        self.events = 0
        self.tokens = 0
        self.input_tokens = 0
        self.text = bytearray()
        self._keeps_text = keeps_text
        self._first = True
        self._carried = b""

    def take(self, chunk: bytes) -> None:
        if self._first:
            self._first = False
            match = _ID.search(chunk[:1024])
            self.response = match[1].decode("utf-8", "replace") if match else None
        searched = self._carried + chunk
        self.events += searched.count(b"data:") - self._carried.count(b"data:")
        if b'_tokens"' in searched:
            if totals := _TOTAL.findall(searched):
                self.tokens = int(totals[-1])
            if prompts := _PROMPT.findall(searched):
                self.input_tokens = int(prompts[-1])
        self._carried = searched[-CARRIED_BYTES:]
        if self._keeps_text and len(self.text) < MOST_LOGGED_BYTES:
            self.text += chunk[: MOST_LOGGED_BYTES - len(self.text)]

    @property
    def used(self) -> int:
        """Tokens that the engine reports; for a stream that was cut off before, its number of events."""
        return self.tokens or self.events


class Recorder:
    """Writes answers to the database in batches, in the background."""

    def __init__(self, database: Database, request_log: RequestLog | None = None, *, logs: bool = True):
        """request_log: the folder with logged requests. logs: False if its rows are only deleted, after their retention or with
        their user, and no more are added."""
        self._database, self._log = database, request_log
        self._logs = logs and request_log is not None
        self._rows: list[dict[str, Any]] = []
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self.on_recorded: Any = lambda request, tokens: None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        try:
            await self.flush()
        finally:
            if self._log is not None:
                await asyncio.to_thread(self._log.close)

    @contextmanager
    def answer(self, request: Request, body: Mapping[str, Any]) -> Iterator[Record]:
        record = Record(keeps_text=self._logs)
        status = 500
        try:
            yield record
        except (ApiError, ClientGone) as error:
            status = error.status if isinstance(error, ApiError) else 499
            raise
        finally:
            self._finish(request, body, record, request.status or status)

    def _finish(self, request: Request, body: Mapping[str, Any], record: Record, status: int) -> None:
        self.on_recorded(request, record.used)
        row = {
            "id": request.id,
            "response": record.response,
            "key": request.key.id,
            "model": request.model,
            "version": request.version,
            "user": request.end_user,
            "safety_identifier": request.safety_identifier,
            "status": status,
            "tokens": record.used,
            "input_tokens": record.input_tokens,
            "seconds": time.monotonic() - request.began,
            "created": now(),
        }
        self._rows.append(row)
        if self._logs and self._log is not None:
            self._log.add(row, request.path, body, bytes(record.text), request.body_bytes)

    async def forget(self, user: str) -> int:
        """Delete a user's answers, the feedback on them, and their logged text. Returns the number of answers."""
        await self.flush()
        removed = await asyncio.to_thread(self._remove, user)
        if self._log is not None:
            await asyncio.to_thread(self._log.forget, user)
        return removed

    def _remove(self, user: str) -> int:
        of_user = or_(AnswerRow.user == user, AnswerRow.safety_identifier == user)
        with self._database.writing.begin() as session:
            session.execute(delete(Feedback).where(Feedback.answer.in_(select(AnswerRow.id).where(of_user))))
            # A heavy user has more rows than a statement can list.
            return session.connection().execute(delete(AnswerRow).where(of_user)).rowcount

    async def used(self, key: str, since: int) -> int:
        """Return the tokens of a key's answers since a time, in seconds since the epoch, over all gateways of the database."""
        await self.flush()
        return await asyncio.to_thread(self._sum, key, since)

    def _sum(self, key: str, since: int) -> int:
        begin = datetime.datetime.fromtimestamp(since, datetime.UTC)
        with self._database.session() as session:
            query = select(func.sum(AnswerRow.tokens)).where(AnswerRow.key == key, AnswerRow.created >= begin)
            return int(session.scalar(query) or 0)

    async def flush(self) -> None:
        """Write the answers recorded so far to the database."""
        async with self._writing:
            rows, self._rows = self._rows, []
            if not rows:
                return
            try:
                await asyncio.to_thread(self._write, rows)
            except Exception:
                unwritten = [*rows, *self._rows]
                if lost := unwritten[:-MOST_ROWS]:
                    log.error("%d records of answers are lost: the database cannot be written", len(lost))
                self._rows = unwritten[-MOST_ROWS:]
                raise

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Insert with one statement: one object per row would take the interpreter from the requests for ten times as long."""
        try:
            with self._database.writing.begin() as session:
                session.connection().execute(insert(AnswerRow), rows)
        except (IntegrityError, DataError):  # a row that the tables refuse must not block the others for ever
            if len(rows) == 1:
                log.exception("the record of the answer %s is lost", rows[0]["id"])
                return
            self._write(rows[: len(rows) // 2])
            self._write(rows[len(rows) // 2 :])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception:
                log.exception("answers could not be recorded yet")
            try:
                if self._log is not None:
                    await asyncio.to_thread(self._log.flush)
            except Exception:
                log.exception("requests could not be logged yet")
