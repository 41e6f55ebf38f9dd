"""The fine-tuning API on a gateway, in one event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

from dstune.finetuning.jobs.build import Parts
from dstune.finetuning.routes import routes
from dstune.finetuning.service import FineTuning
from dstune.finetuning.settings import ApiSettings
from dstune.serve.engines.base import Limits as EngineLimits
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.app import Gateway, Route
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.routes import COMMON, ROUTES
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.database import Database
from dstune.serve.store.tables import Organization, Project
from tests.support.serving import StubApp, StubEngine, listening, stub_source


@dataclass
class Cloud:
    """A server that has the fine-tuning API alone, and keys of two tenants."""

    url: str
    gateway: Gateway
    api: FineTuning
    key: str
    owner: str
    reader: str
    admin: str
    other: str
    """Of another organization, an owner there."""
    folder: Path
    stub: StubApp | None = None
    open_clients: list[Any] = field(default_factory=list)

    def openai(self, key: str | None = None, **options: Any) -> openai.AsyncOpenAI:
        client_options = {"max_retries": 0, "base_url": f"{self.url}/v1", **options}
        made = openai.AsyncOpenAI(api_key=self.key if key is None else key, **client_options)
        self.open_clients.append(made)
        return made

    def http(self, key: str | None = None, **headers: str) -> httpx2.AsyncClient:
        sent_headers = {"authorization": f"Bearer {self.key if key is None else key}"} | headers
        made = httpx2.AsyncClient(base_url=self.url, headers=sent_headers, timeout=30, trust_env=False)
        self.open_clients.append(made)
        return made


@asynccontextmanager
async def cloud(
    folder: Path,
    *,
    database: Database | None = None,
    api: Any = None,
    parts: Parts | None = None,
    models: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Cloud]:
    """Yield a cloud. api: changes of its settings; models: names that a stub answers to."""
    folder.chmod(0o700)
    database = database or Database.open_folder(folder)
    service = FineTuning(database, folder, ApiSettings(**(api or {})), parts)
    stub = StubApp()
    async with AsyncExitStack() as stack:
        engine_url = await stack.enter_async_context(listening(stub)) if models else ""
        fleet = Fleet(
            lambda source, name: StubEngine(source, name, folder, folder, EngineLimits(), url=engine_url),
            may_be_empty=not models,
        )
        await fleet.start([stub_source(name) for name in models])
        async with _running(folder, database, service, fleet, ROUTES if models else COMMON, settings) as running:
            running.stub = stub
            yield running
        await fleet.stop()


@asynccontextmanager
async def _running(
    folder: Path, database: Database, service: FineTuning, fleet: Fleet, common: Sequence[Route], settings: Any
) -> AsyncIterator[Cloud]:
    recorder = Recorder(database, None)
    gateway = Gateway(fleet, database, Settings(**settings), recorder, [*routes(service), *common])
    with database.writing.begin() as session:
        session.add(Organization(id="org-other", name="other", created_at=1))
        session.flush()
        session.add(Project(id="proj_other", organization="org-other", name="other", created_at=1))
    keys = gateway.keys
    key_by_role = {role: keys.add(role, role=role) for role in ("member", "owner", "read_only")}
    admin, other = keys.add("admin", admin=True), keys.add("other", project="proj_other", role="owner")
    recorder.start()
    service.attach(gateway)
    service.start()
    async with listening(gateway) as url:
        cloud = Cloud(
            url,
            gateway,
            service,
            key_by_role["member"],
            key_by_role["owner"],
            key_by_role["read_only"],
            admin,
            other,
            folder,
        )
        try:
            yield cloud
        finally:
            for client in cloud.open_clients:
                await (client.close() if isinstance(client, openai.AsyncOpenAI) else client.aclose())
    await service.stop()
    await recorder.stop()
    database.close()
