"""The state that routes of the fine-tuning API share, and its background loops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from dstune.finetuning import creations
from dstune.finetuning.batches.handlers import Batches
from dstune.finetuning.batches.worker import BatchWorker
from dstune.finetuning.blobs import Blobs, RemoteBlobs
from dstune.finetuning.deliveries import Deliveries
from dstune.finetuning.files import Files
from dstune.finetuning.jobs.build import Parts, build
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.models.serving import Serving
from dstune.finetuning.organization import Organizations
from dstune.finetuning.settings import ApiSettings
from dstune.finetuning.uploads import Uploads
from dstune.finetuning.vault import Vault
from dstune.finetuning.webhooks import Webhooks
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.routes import INFERENCE
from dstune.serve.store.database import Database

log = logging.getLogger("dstune.serve")

Loop = Callable[[], Coroutine[Any, Any, None]]


class FineTuning:
    """folder: the server's, in which it creates `finetuning`."""

    def __init__(
        self, database: Database, folder: Path, settings: ApiSettings | None = None, parts: Parts | None = None
    ):
        self.database, self.settings = database, settings or ApiSettings()
        self.folder = folder / "finetuning"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.blobs = RemoteBlobs(self.folder, self.settings.store) if self.settings.store else Blobs(self.folder)
        self.files = Files(database, self.blobs, self.settings)
        self.uploads = Uploads(database, self.blobs, self.files, self.settings)
        self.vault = Vault(folder)
        self.webhooks = Webhooks(database, self.vault, self.settings)
        self.organizations = Organizations(database, self.vault)
        self.batches = Batches(database, self.files)
        deliveries = Deliveries(database, self.webhooks, self.settings.delivery_seconds)
        job_parts = parts or Parts()
        job_parts = replace(
            job_parts, keys=job_parts.keys or self._accounts, has_wandb=job_parts.has_wandb or self._has_wandb
        )
        self.job_store, self.jobs, self.models = build(database, self.files, self.folder, job_parts)
        self.job_store.ended.append(self._job_ended)
        self.loops: list[Loop] = [
            self._sweep,
            deliveries.run,
            self.models.loop,
            *([self.jobs.loop] if job_parts.runs else []),
        ]
        """Loops that run until the server ends."""
        self._tasks: list[asyncio.Task[None]] = []

    def attach(self, gateway: Gateway) -> None:
        """Let the gateway's engines serve the models of jobs, and answer batches."""
        self.models.serving = Serving(gateway.fleet, self.models.store)
        gateway.inference.admits = self.models.serving.ensure
        if any(route.path in INFERENCE for route in gateway.routes):
            batches = BatchWorker(self.database, self.folder / "batches", self.files, self.webhooks, gateway)
            self.loops.append(batches.run)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(loop()) for loop in self.loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _job_ended(self, session: Session, job: Job) -> None:
        self.webhooks.enqueue(session, job.project, f"fine_tuning.job.{job.state}", job.id)

    def _has_wandb(self, project: str) -> bool:
        with self.database.session() as session:
            return self.vault.read(session, project, "wandb") is not None

    def _accounts(self, job: Job) -> dict[str, str]:
        """Return the environment variables of the accounts that a job uses, for its processes only."""
        if not job.integrations:
            return {}
        with self.database.session() as session:
            key = self.vault.read(session, job.project, "wandb")
        return {} if key is None else {"WANDB_API_KEY": key}

    async def _sweep(self) -> None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._sweep_disk)
        while True:
            try:
                await asyncio.to_thread(self._sweep_once)
            except Exception:
                log.exception("expired files could not be removed; it is tried again")
            await asyncio.sleep(self.settings.sweep_seconds)

    def _sweep_disk(self) -> None:
        removed = self.blobs.sweep([*self.files.stored_blobs(), *self.uploads.stored_parts()])
        if removed:
            log.info("removed %d files that nothing names", removed)

    def _sweep_once(self) -> None:
        self.files.sweep()
        self.uploads.sweep()
        with self.database.writing.begin() as session:
            creations.forget(session)
