"""The guard's process: `python -m dstune.guard.process`, which reads its settings from standard input. It is separate so that
searching a long text does not block other requests, and so that the gateway survives its crash."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.guard.model import BATCH, GuardModel, Window, WindowScore
from dstune.guard.scanner import Item, Prepared, Result, Scanner
from dstune.guard.wire import items_from_json, result_to_json
from dstune.serve.asgi import ClientGone, Receive, Scope, Send, dumps, read_body, respond, while_connected
from dstune.serve.engines.local.process import run_process, set_threads

log = logging.getLogger("dstune.guard")

MOST_BYTES = 64 << 20
SEARCHES = 4
"""Texts that are searched concurrently: 200,000 characters of numbers take seconds, during which others should not wait."""
SEARCHES_PER_REQUEST = SEARCHES // 2
"""The most concurrent searches of one request, so that the first text of another request only waits for running searches."""


@dataclass
class _Job:
    windows: Sequence[Window]
    future: Future[list[WindowScore]]
    scores: list[WindowScore] = field(default_factory=list)


class Compute:
    """The thread that scores windows. Each turn takes equally many from every waiting request, so that neither a long text nor
    thousands of short ones delay other requests."""

    def __init__(self, models: dict[str, GuardModel]):
        self._models = models
        self._lines: dict[tuple[str, object], deque[_Job]] = {}
        """Jobs by detector and request; the next request in turn comes first."""
        self._changed = threading.Condition()
        self._moved = 0.0
        """When the last turn ended, or windows arrived while none were waiting."""
        if models:
            threading.Thread(target=self._run, name="compute", daemon=True).start()

    async def scores(self, detector: str, windows: Sequence[Window], request: object) -> list[WindowScore]:
        """Score windows in turn. request: an object shared by all texts that take turns as one."""
        if not windows:
            return []
        job = _Job(windows, Future())
        with self._changed:
            if not self._lines:
                self._moved = time.monotonic()
            self._lines.setdefault((detector, request), deque()).append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def seconds_without_progress(self) -> float:
        """Return for how many seconds windows have waited without a completed turn."""
        with self._changed:
            return time.monotonic() - self._moved if self._lines else 0.0

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines:
                    self._changed.wait()
                detector = next(iter(self._lines))[0]
                turn = [line for line in self._lines if line[0] == detector][:BATCH]
                parts = [part for line in turn for part in _next(self._lines[line], max(1, BATCH // len(turn)))]
            if parts:
                self._score(self._models[detector], parts)
            with self._changed:
                for line in turn:
                    jobs = self._lines.pop(line)
                    while jobs and jobs[0].future.done():
                        jobs.popleft()
                    if jobs:
                        self._lines[line] = jobs  # to the end of the line
                self._moved = time.monotonic()

    @staticmethod
    def _score(model: GuardModel, parts: Sequence[tuple[_Job, Sequence[Window]]]) -> None:
        try:
            scores = iter(model.score_windows([window for _, part in parts for window in part]))
        except Exception as error:
            log.exception("windows could not be scored")
            for job, _ in parts:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(RuntimeError(str(error)))
            return
        for job, part in parts:
            job.scores += [next(scores) for _ in part]
            if len(job.scores) == len(job.windows) and job.future.set_running_or_notify_cancel():
                job.future.set_result(job.scores)


def _next(jobs: Iterable[_Job], most: int) -> Iterator[tuple[_Job, Sequence[Window]]]:
    """Yield the next windows of a request, with their jobs."""
    for job in jobs:
        if most <= 0:
            return
        if not job.future.done():
            part = job.windows[len(job.scores) : len(job.scores) + most]
            most -= len(part)
            yield job, part


def limit_windows(prepared: Sequence[Prepared]) -> None:
    """Skip models that would have more windows, over all texts of a request, than the policy allows per request. Cached scores cost
    nothing and do not count."""
    windows: Counter[str] = Counter()
    for text in prepared:
        windows.update({detector: sum(map(len, pieces)) for detector, pieces in text.windows.items()})
    for text in prepared:
        for detector in [each for each in text.windows if windows[each] > text.item.most_windows]:
            del text.windows[detector]
            text.not_run[detector] = f"more than {text.item.most_windows} windows"


class GuardApp:
    """The ASGI application of the guard: `POST /scan` and `GET /health`."""

    def __init__(self, scanner: Scanner):
        self.scanner = scanner
        self._compute = Compute(scanner.models)
        self._search = ThreadPoolExecutor(SEARCHES, "search")
        self._searching: dict[object, float] = {}
        """When the search of each text began."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if (scope["method"], scope["path"]) == ("GET", "/health"):
                models = self.scanner.models.items()
                health = {
                    "calibrated": self.scanner.calibrated,
                    "window_tokens": {name: model.window_tokens for name, model in models},
                    "labels": {name: model.label for name, model in models},
                    "silent": self.seconds_without_progress(),
                }
                await respond(send, 200, dumps(health))
                return
            body = json.loads(await read_body(receive, MOST_BYTES))
            items = items_from_json(body)
            async with while_connected(receive):
                results = await self.scan(items)
            await respond(send, 200, dumps({"results": [result_to_json(result) for result in results]}))
        except ClientGone:
            return
        except Exception:
            log.exception("texts could not be looked at")
            await respond(send, 500, b'{"error":{"message":"the guard failed"}}')

    async def scan(self, items: Sequence[Item]) -> list[Result]:
        """Scan the texts of one request."""
        request, turns = object(), asyncio.Semaphore(SEARCHES_PER_REQUEST)
        prepared = await asyncio.gather(*(self._searched(item, turns) for item in items))
        limit_windows(prepared)
        return list(await asyncio.gather(*(self._scored(text, request) for text in prepared)))

    def seconds_without_progress(self) -> float:
        """Return how long the longest running step (a search, or a turn of windows) has taken so far."""
        now = time.monotonic()
        return max(
            [self._compute.seconds_without_progress(), *(now - since for since in list(self._searching.values()))]
        )

    async def _searched(self, item: Item, turns: asyncio.Semaphore) -> Prepared:
        async with turns:
            return await asyncio.get_running_loop().run_in_executor(self._search, self._prepare, item)

    def _prepare(self, item: Item) -> Prepared:
        step = object()
        self._searching[step] = time.monotonic()
        try:
            return self.scanner.prepare(item)
        finally:
            del self._searching[step]

    async def _scored(self, prepared: Prepared, request: object) -> Result:
        scores = {
            detector: await self._compute.scores(
                detector, [window for reading in windows for window in reading], request
            )
            for detector, windows in prepared.windows.items()
        }
        return self.scanner.finish(prepared, scores)


def _app(stack: ExitStack, settings: dict[str, Any]) -> GuardApp:
    if settings["models"]:
        set_threads(settings)
    for check in settings["needs"]:
        _CHECKS[check]()
    return GuardApp(Scanner.load({detector: Path(path) for detector, path in settings["models"].items()}))


def _sensitive() -> None:
    from dstune.data.clean.sensitive import check_personal_data, find_secrets

    check_personal_data()
    find_secrets("")


def _links() -> None:
    from dstune.guard.links import check_installed

    check_installed()


_CHECKS = {"sensitive": _sensitive, "links": _links}
"""Checks that the packages for the policies' detectors are installed, at the start rather than at the first text."""


if __name__ == "__main__":
    run_process(_app)
