"""Computes the rows of waiting encoder requests in batches, in one thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query
from dstune.serve.errors import ApiError
from dstune.serve.turns import CLIENT, Turns

MOST_ROWS = 512
"""The most rows, from several requests, that are computed together."""
MOST_CHARACTERS = 65_536
"""The most characters of these rows together, unless a single row has more. Larger requests are computed in parts, so that others
get their turn in between."""
MAX_WAITING = 256
"""Requests in the queue."""
BATCH_SIZE = 32

log = logging.getLogger("dstune.serve")


class RowAnswer(NamedTuple):
    """The answer to one row."""

    answer: Answer
    ids: list[int]
    """The tokens of the row that the model read."""
    length: int
    """Tokens of the row, including truncated ones."""

    @property
    def truncation(self) -> dict[str, Any]:
        """The fields that report truncation in an answer; empty if the model read the full row."""
        if "truncated" not in self.answer:
            return {}
        return {"truncated": True, "tokens": self.length, "tokens_read": len(self.ids)}


@dataclass(eq=False)
class _Job:
    """Rows of one request that are computed together."""

    rows: list[Query]
    characters: int
    future: Future[list[RowAnswer]] = field(default_factory=Future)


class Batcher:
    """The thread that answers the rows of all waiting requests in batches. Only this thread uses the tokenizer, whose truncation
    settings are shared state."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor
        self._jobs: Turns[_Job] = Turns()
        self._requests = 0
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    async def answers(self, rows: list[Query]) -> list[RowAnswer]:
        """Return the answers to a request's rows. Raises ApiError if the queue is full."""
        if self._requests >= MAX_WAITING:
            raise ApiError(503, "The engine is busy.", code="overloaded", headers={"retry-after": "1"})
        jobs = list(_split_rows(rows))
        self._requests += 1
        try:
            for job in jobs:
                self._jobs.put(CLIENT.get(), job)
            parts = [await asyncio.wrap_future(job.future) for job in jobs]
        finally:
            self._requests -= 1
            for job in jobs:
                if job.future.cancel():
                    self._jobs.remove(CLIENT.get(), job)
        return [answer for part in parts for answer in part]

    def _run(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            while _has_room(jobs) and len(self._jobs):
                jobs.append(self._jobs.get())
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if not self._try_jobs(jobs):
                for job in jobs:  # an error in one of them ends that one alone
                    self._run_job(job)

    def _try_jobs(self, jobs: Sequence[_Job]) -> bool:
        """Compute these jobs together. Returns False, and sets no result, if that fails."""
        rows = [row for job in jobs for row in job.rows]
        try:
            answers = iter(self._compute(rows) if rows else [])
            answers_by_job = [[next(answers) for _ in job.rows] for job in jobs]
        except Exception:
            return False
        for job, job_answers in zip(jobs, answers_by_job, strict=True):
            job.future.set_result(job_answers)
        return True

    def _run_job(self, job: _Job) -> None:
        """Compute one job; an error is its result."""
        try:
            job.future.set_result(self._compute(job.rows))
        except Exception as error:
            log.exception("rows could not be answered")
            job.future.set_exception(ApiError(500, f"The engine failed: {error}.", code="engine_error"))

    def _compute(self, rows: list[Query]) -> list[RowAnswer]:
        samples = self._predictor.samples(rows)
        ids: list[list[int]] = [[] for _ in rows]
        lengths = [0] * len(rows)
        for sample in samples:
            ids[sample.row] += sample.input_ids.tolist()
            lengths[sample.row] = sample.length
        answers = self._predictor.answers_of(samples, rows, BATCH_SIZE, all_labels=True)
        return [RowAnswer(*row) for row in zip(answers, ids, lengths, strict=True)]


def _has_room(jobs: Sequence[_Job]) -> bool:
    """Return whether a batch of these jobs takes another one."""
    return sum(len(job.rows) for job in jobs) < MOST_ROWS and sum(job.characters for job in jobs) < MOST_CHARACTERS


def _split_rows(rows: Sequence[Query]) -> Iterator[_Job]:
    """Split the rows of a request into jobs within MOST_ROWS and MOST_CHARACTERS."""
    part: list[Query] = []
    characters = 0
    for row in rows:
        length = _count_characters(row.row)
        if part and (len(part) == MOST_ROWS or characters + length > MOST_CHARACTERS):
            yield _Job(part, characters)
            part, characters = [], 0
        part.append(row)
        characters += length
    if part:
        yield _Job(part, characters)


def _count_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | dict):
        return sum(map(_count_characters, value.values() if isinstance(value, dict) else value))
    return 1
