"""The guard's process: `python -m dstune.guard.process`, with its settings on standard input.

It is a process of its own so that a search through a long text holds up no other request, and so that the gateway outlives it.
"""

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
"""Texts that are searched side by side: 200,000 characters of numbers take seconds, and others need not wait for them."""
SEARCHES_OF_ONE = SEARCHES // 2
"""Of one request: however many texts it has, another one's first text waits for none but those that are searched now."""


@dataclass
class _Job:
    windows: Sequence[Window]
    future: Future[list[WindowScore]]
    scores: list[WindowScore] = field(default_factory=list)


class Compute:
    """One thread that scores windows. Each turn takes as many of every request that waits, so that neither a long text nor
    thousands of short ones delay another request's."""

    def __init__(self, models: dict[str, GuardModel]):
        self._models = models
        self._lines: dict[tuple[str, object], deque[_Job]] = {}
        """By detector and request, the one whose turn is next first."""
        self._changed = threading.Condition()
        self._moved = 0.0
        """When the last turn ended, or windows came while none waited."""
        if models:
            threading.Thread(target=self._run, name="compute", daemon=True).start()

    async def scores(self, detector: str, windows: Sequence[Window], request: object) -> list[WindowScore]:
        """Score windows in turn. request: what all texts share that take turns as one."""
        if not windows:
            return []
        job = _Job(windows, Future())
        with self._changed:
            if not self._lines:
                self._moved = time.monotonic()
            self._lines.setdefault((detector, request), deque()).append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def silent(self) -> float:
        """Return seconds for which windows have waited without a turn that ended."""
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
                        self._lines[line] = jobs  # behind all others
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
    """Yield the next windows of a request, and the texts that they are of."""
    for job in jobs:
        if most <= 0:
            return
        if not job.future.done():
            part = job.windows[len(job.scores) : len(job.scores) + most]
            most -= len(part)
            yield job, part


def limit_windows(prepared: Sequence[Prepared]) -> None:
    """Score nothing by a model that would have more windows of all texts of a request than the policy allows of one. What is
    remembered costs nothing, and does not count."""
    windows: Counter[str] = Counter()
    for text in prepared:
        windows.update({detector: sum(map(len, pieces)) for detector, pieces in text.windows.items()})
    for text in prepared:
        for detector in [each for each in text.windows if windows[each] > text.item.most_windows]:
            del text.windows[detector]
            text.not_run[detector] = f"more than {text.item.most_windows} windows"


class GuardApp:
    """ASGI application: `POST /scan` and `GET /health`."""

    def __init__(self, scanner: Scanner):
        self.scanner = scanner
        self._compute = Compute(scanner.models)
        self._search = ThreadPoolExecutor(SEARCHES, "search")
        self._searching: dict[object, float] = {}
        """Since when each text is searched."""

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
                    "silent": self.silent(),
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
        request, turns = object(), asyncio.Semaphore(SEARCHES_OF_ONE)
        prepared = await asyncio.gather(*(self._searched(item, turns) for item in items))
        limit_windows(prepared)
        return list(await asyncio.gather(*(self._scored(text, request) for text in prepared)))

    def silent(self) -> float:
        """Return the longest that a step of the work has taken by now: a search, or a turn of windows."""
        now = time.monotonic()
        return max([self._compute.silent(), *(now - since for since in list(self._searching.values()))])

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
"""What must be installed for the detectors of the policies; known at the start, not with the first text."""


if __name__ == "__main__":
    run_process(_app)
