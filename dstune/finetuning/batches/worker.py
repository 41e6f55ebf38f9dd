"""Processes batches. A restart changes nothing: all state is in the database and a folder."""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy import select

from dstune.finetuning.batches.ask import ask
from dstune.finetuning.batches.lines import Answers, Line, LineError, check_lines, read_lines
from dstune.finetuning.files import Files
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.tables import Batch
from dstune.finetuning.webhooks import Webhooks
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller, Keys

log = logging.getLogger("dstune.serve")

WORKED_ON = ("validating", "in_progress", "finalizing", "cancelling")
LEASE_SECONDS = 60.0
AT_ONCE = 4
"""Concurrent requests of a batch."""
BATCHES = 4
"""Batches processed at the same time."""
LOOK_SECONDS = 1.0
FILE_BYTES = 200_000_000
INPUT = "input.jsonl"


class BatchWorker:
    """Processes batches. folder: the parent of the batches' folders."""

    def __init__(self, database: Database, folder: Path, files: Files, webhooks: Webhooks, gateway: Gateway):
        self._database, self._folder, self._files, self._webhooks = database, folder, files, webhooks
        self._gateway, self._keys = gateway, Keys(database)
        self._running: set[str] = set()
        """Batches that this server is processing."""

    async def run(self) -> None:
        await asyncio.to_thread(self._remove_finished_folders)
        async with asyncio.TaskGroup() as group:
            while True:
                row = None
                try:
                    row = await asyncio.to_thread(self._claim) if len(self._running) < BATCHES else None
                except Exception:
                    log.exception("batches could not be looked for; it is tried again")
                if row is None:
                    await asyncio.sleep(LOOK_SECONDS)
                else:
                    self._running.add(row.id)
                    group.create_task(self._process(row))

    def _remove_finished_folders(self) -> None:
        """Remove the folders of batches that ended just before their server was killed."""
        folders = list(self._folder.glob("batch_*"))
        with self._database.session() as session:
            open_ones = set(session.scalars(select(Batch.id).where(Batch.status.in_(WORKED_ON))))
        for folder in folders:
            if folder.name not in open_ones:
                shutil.rmtree(folder, ignore_errors=True)

    async def _process(self, row: Batch) -> None:
        try:
            await self._work(row)
        except Exception:
            log.exception("a batch could not be worked on; it is tried again")
        finally:
            self._running.discard(row.id)

    def _claim(self) -> Batch | None:
        """Return the oldest batch that no server is processing, from a project with the fewest batches in progress."""
        now = time.time()
        with self._database.writing.begin() as session:
            self._database.exclusive(session, "batches")
            rows = list(session.scalars(select(Batch).where(Batch.status.in_(WORKED_ON)).order_by(Batch.number)))
            busy = Counter(row.project for row in rows if row.lease_until >= now)
            has_space = functools.cache(self._files.has_space)  # a batch's results are stored in any case
            free = [
                row
                for row in rows
                if row.lease_until < now
                and row.id not in self._running
                and (row.status != "validating" or has_space(row.project))
            ]
            row = min(free, key=lambda row: busy[row.project], default=None)
            if row is not None:
                row.lease_until = now + LEASE_SECONDS
        return row

    def _change(self, row: Batch, status: str | None = None, event: str | None = None, **details: Any) -> Batch:
        """Set a new status, its details and the event in one transaction. No effect if another server has ended the batch."""
        with self._database.writing.begin() as session:
            current = session.get_one(Batch, row.number, with_for_update=True)
            if current.status not in WORKED_ON:
                return current
            if status is not None and not (current.status == "cancelling" and status == "in_progress"):
                current.status = status
            current.details = {**current.details, **details}
            current.lease_until = time.time() + LEASE_SECONDS
            if event is not None:
                self._webhooks.enqueue(session, current.project, f"batch.{event}", current.id)
        return current

    async def _work(self, row: Batch) -> None:
        folder = self._folder / row.id
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        if row.status == "validating":
            row = await asyncio.to_thread(self._validate, row, folder)
        elif (
            row.status in ("in_progress", "finalizing") and not (folder / INPUT).is_file()
        ):  # another machine processed it before
            row = await asyncio.to_thread(self._begin_again, row, folder)
        if row.status == "in_progress":
            caller = await asyncio.to_thread(self._keys.by_id, row.key)
            if caller is not None:
                row = await self._answer(row, folder, caller)
            if await asyncio.to_thread(self._keys.by_id, row.key) is None:
                revoked = LineError(None, "invalid_api_key", "The key was revoked.")
                row = await asyncio.to_thread(self._fail, row, [revoked])
        if row.status in ("in_progress", "finalizing", "cancelling"):
            await asyncio.to_thread(self._finalize, row, folder)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _begin_again(self, row: Batch, folder: Path) -> Batch:
        return self._snapshot(row, folder) or self._change(row, "in_progress")

    def _snapshot(self, row: Batch, folder: Path) -> Batch | None:
        """Copy the batch's file into its folder; return the failed batch if the file is missing."""
        path = folder / INPUT
        path.unlink(missing_ok=True)
        try:
            with self._database.session() as session:
                file = self._files.of(session, row.project, row.input_file)
                if file.bytes > FILE_BYTES:
                    error = LineError(None, "file_too_large", f"A batch's file has at most {FILE_BYTES} bytes.")
                    return self._fail(row, [error])
                self._files.snapshot(file, path)
        except (ApiError, FileNotFoundError):
            return self._fail(row, [LineError(None, "file_not_found", "The input file was deleted.")])
        return None

    def _validate(self, row: Batch, folder: Path) -> Batch:
        if failed := self._snapshot(row, folder):
            return failed
        count, errors = check_lines(folder / INPUT, row.endpoint)
        if errors:
            return self._fail(row, errors)
        counts = {"total": count, "completed": 0, "failed": 0}
        return self._change(row, "in_progress", in_progress_at=unix_time(), request_counts=counts)

    def _fail(self, row: Batch, errors: list[LineError]) -> Batch:
        described = [error.described() for error in errors]
        return self._change(row, "failed", "failed", failed_at=unix_time(), errors=described)

    async def _answer(self, row: Batch, folder: Path, caller: Caller) -> Batch:
        """Answer the remaining requests and return the updated row."""
        good = await asyncio.to_thread(Answers, folder / "output.jsonl")
        bad = await asyncio.to_thread(Answers, folder / "errors.jsonl")
        answered = good.ids | bad.ids
        lines = (
            line
            for line in read_lines(folder / INPUT, row.endpoint)
            if isinstance(line, Line) and line.custom_id not in answered
        )
        expires, reading = row.details["expires_at"], asyncio.Lock()

        async def take() -> None:
            while True:
                async with reading:
                    line = await asyncio.to_thread(next, lines, None)
                if line is None:
                    return
                response = await ask(self._gateway, caller, row.endpoint, line.body)
                answer = {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": response, "error": None}
                answers = good if response["status_code"] < 400 else bad
                await asyncio.to_thread(answers.add, answer)

        async def watch() -> None:
            while row.status == "in_progress" and unix_time() < expires:
                await asyncio.sleep(LOOK_SECONDS)
                await keep()
                if await asyncio.to_thread(self._keys.by_id, row.key) is None:
                    return  # its key was revoked

        async def keep() -> None:
            nonlocal row
            counts = {
                "total": row.details["request_counts"]["total"],
                "completed": len(good.ids),
                "failed": len(bad.ids),
            }
            row = await asyncio.to_thread(self._change, row, request_counts=counts)

        await _until(watch, [take] * AT_ONCE)
        await keep()
        return row

    def _finalize(self, row: Batch, folder: Path) -> None:
        """End the batch from its row alone: the server may have been restarted since it was answered."""
        counts = row.details.get("request_counts") or {"total": 0, "completed": 0, "failed": 0}
        whole = counts["completed"] + counts["failed"] >= counts["total"]
        ending = "cancelled" if row.status == "cancelling" else "completed" if whole else "expired"
        if row.status == "in_progress":
            row = self._change(row, "finalizing", finalizing_at=unix_time())
        staged = {}
        try:
            for name, path in (("output_file_id", "output.jsonl"), ("error_file_id", "errors.jsonl")):
                if (folder / path).is_file() and (folder / path).stat().st_size:
                    staged[name] = self._files.stage()
                    with (folder / path).open("rb") as file:
                        while chunk := file.read(1 << 20):
                            staged[name].write(chunk)
                    staged[name].close()
            self._end(row, staged, ending)
        finally:
            for staged_file in staged.values():
                staged_file.discard()

    def _end(self, row: Batch, staged: dict[str, Any], ending: str) -> None:
        with self._database.writing.begin() as session:
            current = session.get_one(Batch, row.number, with_for_update=True)
            if current.status not in WORKED_ON:  # another server has ended it
                return
            made = {}
            for name, staged_file in staged.items():
                file = self._files.add(
                    session, staged_file, project=row.project, key=row.key, filename=f"{row.id}_{name.split('_')[0]}.jsonl",
                    purpose="batch_output", seconds=row.output_seconds, is_server_made=True,
                )  # fmt: skip
                made[name] = file.id
            current.status = ending
            current.details = {**current.details, **made, f"{ending}_at": unix_time()}
            self._webhooks.enqueue(session, row.project, f"batch.{ending}", row.id)


Work = Callable[[], Coroutine[Any, Any, None]]


async def _until(watch: Work, workers: list[Work]) -> None:
    """Run all workers until they are done, or until `watch` ends; unfinished work is cancelled then."""

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker())

    watching, working = asyncio.create_task(watch()), asyncio.create_task(work())
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)
