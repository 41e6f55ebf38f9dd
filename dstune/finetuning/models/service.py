"""`/v1/models` for tuned models, and other projects' permissions to use them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from dstune.finetuning import audit, pages
from dstune.finetuning.creations import is_retry
from dstune.finetuning.fields import Body, IdText, read_body
from dstune.finetuning.jobs.presets import Presets
from dstune.finetuning.jobs.tables import ModelPermission, TunedModel
from dstune.finetuning.models.serving import Serving
from dstune.finetuning.models.store import ModelStore, missing
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routes import describe
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller
from dstune.serve.validation import Expected, FailsFast

log = logging.getLogger("dstune.serve")

MOST_PROJECTS = 200
ORDERS = ("ascending", "descending")


class Sharing(Body):
    project_ids: Annotated[
        list[Annotated[str, IdText(128)]],
        Field(min_length=1, max_length=MOST_PROJECTS),
        FailsFast,
        Expected(f"must be a list of 1 to {MOST_PROJECTS} ids"),
    ]


class Models:
    def __init__(self, database: Database, store: ModelStore, presets: Callable[[], Presets]):
        self._database, self.store, self._presets = database, store, presets
        self.serving: Serving | None = None
        """Set if the server has engines."""
        self._new = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- routes

    async def listed(self, gateway: Gateway, request: Request) -> None:
        caller = request.key
        tuned = await asyncio.to_thread(self.store.usable, caller)
        values = [
            describe(model, caller)
            for name, model in gateway.fleet.models.items()
            if caller.may_use(name) and not name.startswith("ft:")
        ]
        served = {value["id"] for value in values}
        values += [_base(name) for name in self._presets().models if name not in served and caller.may_use(name)]
        values += [self._describe(gateway, model, caller) for model in tuned if caller.may_use(model.name)]
        values += self._aliased(gateway, request, tuned)
        await request.answer({"object": "list", "data": values})

    async def retrieve(self, gateway: Gateway, request: Request) -> None:
        name, caller = request.parameters["model"], request.key
        if not caller.may_use(name):
            raise missing(name)
        requested, name = name, request.settings.aliases.get(name, name)
        if name.startswith("ft:"):
            tuned = await asyncio.to_thread(self.store.find, caller, name)
            if tuned is None:
                raise missing(name)
            await request.answer(self._describe(gateway, tuned, caller) | {"id": requested})
        elif name in gateway.fleet.models:
            await request.answer(describe(gateway.fleet.models[name], caller) | {"id": requested})
        elif name in self._presets().models:
            await request.answer(_base(requested))
        else:
            raise missing(name)

    async def delete(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        name = request.parameters["model"]
        if name in self._presets().models or (name in gateway.fleet.models and not name.startswith("ft:")):
            raise ApiError(403, f"The model {name!r} is none of yours to delete.", param="model", code="base_model")
        gone = await asyncio.to_thread(self._delete, request, name)
        try:
            if self.serving is not None:
                await self.serving.forget(name)
        finally:
            await asyncio.to_thread(self.store.remove_files, gone)
        await request.answer({"id": name, "object": "model", "deleted": True})

    async def share(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        made = await asyncio.to_thread(self._share, request, read_body(Sharing, await request.json()).project_ids)
        self._forget()
        await request.answer(pages.listing([_permission(row) for row in made], has_more=False))

    async def permissions(self, gateway: Gateway, request: Request) -> None:
        query = request.query((*pages.PARAMETERS, "project_id"))
        page = pages.page_of(query, limit=10, most=100, orders=ORDERS)
        rows, has_more = await asyncio.to_thread(self._permissions, request, page, query.get("project_id"))
        await request.answer(pages.listing([_permission(row) for row in rows], has_more))

    async def unshare(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        permission = request.parameters["permission"]
        await asyncio.to_thread(self._unshare, request, permission)
        self._forget()
        await request.answer({"id": permission, "object": "checkpoint.permission", "deleted": True})

    # -- the loop

    def notify_new_model(self) -> None:
        """Wake the loop; called from the jobs' thread when a model has been added."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._new.set)

    async def loop(self) -> None:
        """Load new models until the server ends."""
        self._loop = asyncio.get_running_loop()
        self._new.set()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._new.wait(), 30.0)  # other servers create models too
            self._new.clear()
            if self.serving is not None:
                try:
                    await self.serving.load_new()
                except Exception:
                    log.exception("new models could not be loaded; it is tried again")

    # -- inside

    def _forget(self) -> None:
        if self.serving is not None:
            self.serving.forget_permissions()

    def _delete(self, request: Request, name: str) -> TunedModel:
        with self._database.writing.begin() as session:
            repeated = is_retry(request.header("x-stainless-retry-count"))
            row, deleted = self.store.delete(session, request.key, name, repeated=repeated)
            if deleted:
                audit.note(session, request, "model.deleted", name)
        return row

    def _share(self, request: Request, projects: list[str]) -> list[ModelPermission]:
        name = request.parameters["model"]
        with self._database.writing.begin() as session:
            made = self.store.share(session, request.key, name, projects)
            audit.note(session, request, "checkpoint.permission.created", name, projects=projects)
        return made

    def _permissions(self, request: Request, page: pages.Page, project: str | None) -> Any:
        with self._database.session() as session:
            return self.store.permissions(session, request.key, request.parameters["model"], page, project)

    def _unshare(self, request: Request, permission: str) -> None:
        name = request.parameters["model"]
        with self._database.writing.begin() as session:
            self.store.unshare(session, request.key, name, permission)
            audit.note(session, request, "checkpoint.permission.deleted", name, permission=permission)

    def _aliased(self, gateway: Gateway, request: Request, tuned: Sequence[TunedModel]) -> Iterator[dict[str, Any]]:
        """Yield the aliases of models that the caller may use, described as their models."""
        models, caller = {model.name: model for model in tuned}, request.key
        for alias, name in request.settings.aliases.items():
            if not caller.may_use(alias):
                continue
            if name in models:
                yield self._describe(gateway, models[name], caller) | {"id": alias}
            elif name in gateway.fleet.models and not name.startswith("ft:"):
                yield describe(gateway.fleet.models[name], caller) | {"id": alias}

    @staticmethod
    def _describe(gateway: Gateway, row: TunedModel, caller: Caller) -> dict[str, Any]:
        value = {
            "id": row.name,
            "object": "model",
            "created": row.created_at,
            "owned_by": row.organization,
            "parent": row.preset,
        }
        served = gateway.fleet.models.get(row.name)
        return {**describe(served, caller), **value} if served is not None else value


def _base(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dstune"}


def _permission(row: ModelPermission) -> dict[str, Any]:
    return {"id": row.id, "object": "checkpoint.permission", "created_at": row.created_at, "project_id": row.project}
