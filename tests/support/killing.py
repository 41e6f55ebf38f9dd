"""A server of the fine-tuning API that is killed again and again while clients create, cancel and upload.

The server is forked from a process that has imported everything, so that 200 starts take seconds; it is killed by SIGKILL at
any moment. Its jobs are `stub_job.py`, started by the launcher of the real server in sessions of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openai

from dstune.core.rendezvous import free_port
from dstune.finetuning.jobs.build import Parts
from dstune.finetuning.jobs.check import inconsistencies
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.launcher import ProcessLauncher
from dstune.finetuning.jobs.states import TERMINAL
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.routes import routes
from dstune.finetuning.service import FineTuning
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.routes import COMMON
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Keys
from tests.support.jobs import StubPlans

STUB = Path(__file__).with_name("stub_job.py")
ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"


def serve(folder: Path, port: int) -> None:
    """Run one life of the server."""
    asyncio.run(_serve(folder, port))


async def _serve(folder: Path, port: int) -> None:
    import uvicorn

    database = Database.open_folder(folder)
    launcher = ProcessLauncher(program=[sys.executable, "-S", "-E", str(STUB)])
    parts = Parts(folder / "models.yaml", launcher=launcher, planner=StubPlans(), machine=Machine(4))
    api = FineTuning(database, folder, parts=parts)
    fleet = Fleet(lambda source, name: None, may_be_empty=True)  # type: ignore[arg-type, return-value]
    gateway = Gateway(fleet, database, Settings(), Recorder(database, None), [*routes(api), *COMMON])
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(128)
    api.start()
    config = uvicorn.Config(gateway, lifespan="off", log_config=None, access_log=False)
    await uvicorn.Server(config).serve([listening])


@contextmanager
def stub_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the address and an owner's key of a server whose jobs are stubs."""
    (folder / "models.yaml").write_text("models: {tiny: {path: base}}\n")
    database = Database.open_folder(folder)
    key = Keys(database).add("owner", role="owner")
    database.close()
    port = free_port()
    server = get_context("fork").Process(target=serve, args=(folder, port))
    server.start()
    try:
        yield f"http://127.0.0.1:{port}/v1", key
    finally:
        server.terminate()
        server.join(10)


@dataclass
class Report:
    kills: int
    creates: int = 0
    """That a client began."""
    answered: dict[str, str] = field(default_factory=dict)
    """The job that a client was told, by what it called it."""
    cancelled: set[str] = field(default_factory=set)
    uploads: int = 0
    requests: int = 0
    """Uploads, creates and cancels that were answered."""
    states: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))
        head = (
            f"{self.kills} kills, {self.creates} creates of which {len(self.answered)} were answered, {self.uploads} uploads, "
            f"{len(self.cancelled)} cancels; jobs: {states}"
        )
        return (
            "\n".join([head, *self.problems])
            if self.problems
            else f"{head}; nothing lost, doubled or stuck; store consistent"
        )


def run(folder: Path, kills: int, *, seed: int = 0, clients: int = 3, rest_seconds: float = 120.0) -> Report:
    """Kill the server again and again. folder: empty, of this user alone."""
    draw = random.Random(seed)
    (folder / "models.yaml").write_text("models: {tiny: {path: base}}\n")
    database = Database.open_folder(folder)
    key = Keys(database).add("load")
    database.close()
    port = free_port()
    report, over = Report(kills), threading.Event()
    fork = get_context("fork")
    server = fork.Process(target=serve, args=(folder, port))
    server.start()
    threads = [
        threading.Thread(target=_load, args=(report, over, f"http://127.0.0.1:{port}/v1", key, number, seed))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        if draw.random() < 0.8:  # else it may be killed while it starts
            _answers(port)
            _works(report, draw.randint(0, 4))
        time.sleep(draw.uniform(0.0, 0.8))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.join()
        server = fork.Process(target=serve, args=(folder, port))
        server.start()
    over.set()
    for thread in threads:
        thread.join()
    database = Database.open_folder(folder)
    deadline = time.monotonic() + rest_seconds
    while time.monotonic() < deadline and not _rests(database):
        time.sleep(0.2)
    server.terminate()
    server.join(10)
    _judge(report, database, folder)
    database.close()
    return report


def _answers(port: int, seconds: float = 60.0) -> None:
    """Wait until the server listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return


def _works(report: Report, requests: int, seconds: float = 30.0) -> None:
    """Wait until so many more requests were answered: on a slow machine a server that is killed sooner had nothing to lose."""
    deadline, until = time.monotonic() + seconds, report.requests + requests
    while report.requests < until and time.monotonic() < deadline:
        time.sleep(0.005)


def _load(report: Report, over: threading.Event, url: str, key: str, number: int, seed: int) -> None:
    """Run one client until it is told to stop. The official client repeats what was cut."""
    draw = random.Random(f"{seed} {number}")
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=8, timeout=5)
    count = 0
    while not over.is_set():
        count += 1
        name = f"{number}-{count}"
        try:
            content = (ROW * draw.randint(10, 30)).encode()
            file = client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune")
            report.uploads += 1
            report.requests += 1
            report.creates += 1
            seeded: dict[str, Any] = {"seed": draw.randrange(1000), "metadata": {"name": name}}
            job = client.fine_tuning.jobs.create(
                model="tiny", training_file=file.id, hyperparameters={"n_epochs": 2}, **seeded
            )
            report.answered[name] = job.id
            report.requests += 1
            if draw.random() < 0.3:
                time.sleep(draw.random() / 2)
                if client.fine_tuning.jobs.cancel(job.id).status == "cancelled":
                    report.cancelled.add(job.id)
            if draw.random() < 0.3:
                client.files.delete(file.id)
        except openai.APIStatusError as error:
            # Cancelled too late, or deleted by an attempt whose answer was cut.
            if error.status_code not in (400, 404):
                report.problems.append(f"{name}: {error}")
        except openai.APIConnectionError:
            pass  # eight times in a row it met no server
        time.sleep(0.02)
    client.close()


def _rests(database: Database) -> bool:
    with database.session() as session:
        return all(job.state in TERMINAL and not job.active for job in session.query(Job))


def _judge(report: Report, database: Database, folder: Path) -> None:
    with database.session() as session:
        jobs = list(session.query(Job))
        # A folder without a row is what a create leaves that was killed before its row: it goes after an hour.
        problems = [
            problem
            for problem in inconsistencies(session, folder / "finetuning", at_rest=True)
            if "without a row" not in problem
        ]
    report.problems += problems
    report.states = Counter(str(job.state) for job in jobs)
    by_name: dict[str, list[str]] = {}
    for job in jobs:
        by_name.setdefault((job.meta or {})["name"], []).append(job.id)
        if job.state == "failed":
            report.problems.append(f"{job.id}: failed: {job.error}")
    for name, ids in by_name.items():
        if len(ids) > 1:
            report.problems.append(f"{name}: {len(ids)} jobs")
        if name in report.answered and report.answered[name] not in ids:
            report.problems.append(f"{name}: the client was told {report.answered[name]}, there is {ids}")
    report.problems += [f"{name}: lost" for name in report.answered if name not in by_name]
    report.problems += [
        f"{job.id}: cancelled, and is {job.state}"
        for job in jobs
        if job.id in report.cancelled and job.state != "cancelled"
    ]
    for job in jobs:
        report.problems += _overlaps(folder / "finetuning" / "jobs" / job.id / "lives", job.id)


def _overlaps(file: Path, job: str) -> list[str]:
    """Return where two processes of a job ran at a time."""
    if not file.is_file():
        return []
    words = [line.split()[0] for line in file.read_text().splitlines()]
    return [f"{job}: two processes at a time"] if any(a == b == "begins" for a, b in itertools.pairwise(words)) else []
