"""The guard's process: `python -m dstune.serve.guard.process`, with its settings on standard input.

It is a process of its own so that a search through a long text holds up no other request, and so that the gateway outlives it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.serve.asgi import ClientGone, Receive, Scope, Send, dumps, read_body, respond, while_connected
from dstune.serve.engines.local.process import run_process, set_threads
from dstune.serve.guard.model import BATCH, GuardModel, Window
from dstune.serve.guard.scanner import Item, Result, Scanner
from dstune.serve.guard.wire import items_from_json, result_to_json

log = logging.getLogger("dstune.serve.guard")

MOST_BYTES = 64 << 20
SEARCHES = 4
"""Texts that are searched side by side: 200,000 characters of numbers take seconds, and others need not wait for them."""


@dataclass
class _Job:
    detector: str
    windows: Sequence[Window]
    future: Future[list[float]]
    scores: list[float] = field(default_factory=list)


class Compute:
    """One thread that scores windows. Each turn takes some of every text that waits, so that a long one delays no short one."""

    def __init__(self, models: dict[str, GuardModel]):
        self._models = models
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        if models:
            threading.Thread(target=self._run, name="compute", daemon=True).start()

    async def scores(self, detector: str, windows: Sequence[Window]) -> list[float]:
        if not windows:
            return []
        job = _Job(detector, windows, Future())
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
                detector = self._jobs[0].detector
                jobs = [job for job in self._jobs if job.detector == detector][:BATCH]
            self._turn(self._models[detector], jobs)
            with self._changed:
                self._jobs = deque(job for job in self._jobs if not job.future.done())
                self._jobs.rotate(-1)

    @staticmethod
    def _turn(model: GuardModel, jobs: Sequence[_Job]) -> None:
        each = max(1, BATCH // len(jobs))
        jobs = [job for job in jobs if not job.future.cancelled()]
        parts = [job.windows[len(job.scores) : len(job.scores) + each] for job in jobs]
        try:
            scores = iter(model.score_windows([window for part in parts for window in part]))
        except Exception as error:
            log.exception("windows could not be scored")
            for job in jobs:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(RuntimeError(str(error)))
            return
        for job, part in zip(jobs, parts, strict=True):
            job.scores += [next(scores) for _ in part]
            if len(job.scores) == len(job.windows) and job.future.set_running_or_notify_cancel():
                job.future.set_result(job.scores)


class GuardApp:
    """ASGI application: `POST /scan` and `GET /health`."""

    def __init__(self, scanner: Scanner):
        self.scanner = scanner
        self._compute = Compute(scanner.models)
        self._search = ThreadPoolExecutor(SEARCHES, "search")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if (scope["method"], scope["path"]) == ("GET", "/health"):
                models = {name: model.window_tokens for name, model in self.scanner.models.items()}
                await respond(send, 200, dumps({"calibrated": self.scanner.calibrated, "window_tokens": models}))
                return
            body = json.loads(await read_body(receive, MOST_BYTES))
            items = items_from_json(body)
            async with while_connected(receive):
                results = await self._scan(items)
            await respond(send, 200, dumps({"results": [result_to_json(one) for one in results]}))
        except ClientGone:
            return
        except Exception:
            log.exception("texts could not be looked at")
            await respond(send, 500, b'{"error":{"message":"the guard failed"}}')

    async def _scan(self, items: Sequence[Item]) -> list[Result]:
        return list(await asyncio.gather(*(self._one(item) for item in items)))

    async def _one(self, item: Item) -> Result:
        prepared = await asyncio.get_running_loop().run_in_executor(self._search, self.scanner.prepare, item)
        scores = {
            detector: await self._compute.scores(detector, [one for reading in windows for one in reading])
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
    from dstune.serve.guard.links import check_installed

    check_installed()


_CHECKS = {"sensitive": _sensitive, "links": _links}
"""What must be installed for the detectors of the policies; known at the start, not with the first text."""


if __name__ == "__main__":
    run_process(_app)
