"""The table of routes. A route of an engine that is not listed here cannot be reached."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, or_, select

from dstune.checkpoint.export import current_export
from dstune.core.errors import Problem, UserError
from dstune.serve import fields, source
from dstune.serve.errors import ApiError
from dstune.serve.fleet import Model
from dstune.serve.gateway import page
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routing import Handler, Route
from dstune.serve.store.database import now
from dstune.serve.store.keys import Caller
from dstune.serve.store.tables import AnswerRow, Feedback, Key

INFERENCE: Mapping[str, type[fields.Request]] = {
    "/v1/chat/completions": fields.Chat,
    "/v1/completions": fields.Completion,
    "/v1/responses": fields.Response,
    "/v1/embeddings": fields.Embedding,
    "/v1/moderations": fields.Moderation,
    "/classify": fields.Classify,
    "/rerank": fields.Rerank,
    "/score": fields.Score,
    "/tags": fields.Tagging,
    "/answers": fields.Answer,
    "/rewards": fields.Reward,
}
"""Routes that engines answer, each with all fields that any engine supports."""


def _inference(path: str, body: type[fields.Request]) -> Handler:
    async def handler(gateway: Gateway, request: Request) -> None:
        await gateway.inference(request, path, body)

    return handler


async def health(gateway: Gateway, request: Request) -> None:
    await request.answer({"status": "ok"})


async def readiness(gateway: Gateway, request: Request) -> None:
    if gateway.ready:
        await request.answer({"status": "ready"})
        return
    status = "draining" if gateway.draining else "starting"
    await request.respond(503, b'{"status":"%s"}' % status.encode(), [(b"retry-after", b"5")])


async def models(gateway: Gateway, request: Request) -> None:
    fleet = gateway.fleet.models
    visible = [describe(model, request.key) for name, model in fleet.items() if request.key.may_use(name)]
    for alias, name in request.settings.aliases.items():
        if name in fleet and request.key.may_use(alias):
            visible.append(describe(fleet[name], request.key) | {"id": alias})
    await request.answer({"object": "list", "data": visible})


async def retrieve_model(gateway: Gateway, request: Request) -> None:
    name = request.parameters["model"]
    model = gateway.fleet.models.get(request.settings.aliases.get(name, name))
    if model is None or not request.key.may_use(name):
        raise ApiError(404, "The model does not exist.", param="model", code="model_not_found")
    await request.answer(describe(model, request.key) | {"id": name})


def describe(model: Model, key: Caller) -> dict[str, Any]:
    """Describe a model as the owner of `key` may see it: the base is named only to those who may use it."""
    proof = model.proof
    parity: dict[str, Any] = {"status": proof.status}
    if proof.detail:
        parity["detail"] = proof.detail
    if model.failed:
        parity = {"status": "failed", "detail": model.failed}
    elif proof.difference is not None:
        parity |= {"rows": proof.rows, "difference": proof.difference, "bound": proof.bound, "dtype": proof.dtype}
    return {
        "id": model.source.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dstune",
        "parent": model.parent if model.parent and key.may_use(model.parent) else None,
        "task": model.source.task,
        "version": model.version,
        "ready": model.ready,
        "routes": sorted(model.engine.routes),
        "parity": parity,
    }


async def metrics(gateway: Gateway, request: Request) -> None:
    text = gateway.metrics.text(gateway.fleet)
    await request.respond(200, text, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


FEEDBACK = ("id", "rating", "label", "correction")
MOST_LABEL, MOST_CORRECTION = 256, 100_000
"""Characters."""


async def feedback(gateway: Gateway, request: Request) -> None:
    """Store a client's feedback on an answer that its own key received."""
    body = await request.json()
    request.refuse_halves(body)  # databases cannot store them, nor PostgreSQL a NUL
    if unknown := sorted(set(body) - set(FEEDBACK)):
        raise ApiError(400, f"Unknown field: {unknown[0][:80]!r}.", param=unknown[0][:80], code="unknown_parameter")
    answer_id, rating = body.get("id"), body.get("rating")
    if not isinstance(answer_id, str) or not 0 < len(answer_id) <= 128 or "\0" in answer_id:
        raise ApiError(400, "Missing required field: 'id', of an answer or its request.", param="id")
    number = isinstance(rating, int | float) and not isinstance(rating, bool)
    if rating is not None and not (number and -1 <= rating <= 1):
        raise ApiError(400, "Invalid rating: must be a number from -1 to 1.", param="rating")
    for name, most in (("label", MOST_LABEL), ("correction", MOST_CORRECTION)):
        value = body.get(name)
        if isinstance(value, str) and len(value) > most:
            raise ApiError(413, f"The {name} has more than {most} characters.", param=name, code="request_too_large")
        if value is not None and not (isinstance(value, str) and value and "\0" not in value):
            raise ApiError(400, f"Invalid {name}: must be a text of at most {most} characters.", param=name)
    if all(body.get(name) is None for name in FEEDBACK[1:]):
        raise ApiError(400, "Give a rating, a label or a correction.", param="rating")
    for pause in (0.0, 0.2):  # an answer that has just been sent is recorded a moment later
        await asyncio.sleep(pause)
        await gateway.recorder.flush()
        row = await asyncio.to_thread(_store_feedback, gateway, request, body)
        if row is not None:
            break
    else:
        raise ApiError(404, "There is no such answer.", param="id", code="answer_not_found")
    await request.answer({"id": row.id, "object": "feedback", "answer": row.answer})


def _store_feedback(gateway: Gateway, request: Request, body: Mapping[str, Any]) -> Feedback | None:
    """Store the feedback, replacing earlier values of the same fields; return None if the caller received no such answer. Raises
    ApiError if the project has stored too much feedback."""
    with gateway.database.writing.begin() as session:
        of_caller = AnswerRow.key == request.key.id
        has_this_id = or_(AnswerRow.id == body["id"], AnswerRow.response == body["id"])
        answer = session.scalar(select(AnswerRow).where(of_caller, has_this_id))
        if answer is None:
            return None
        gateway.database.exclusive(session, f"feedback {request.key.project}")
        row = session.scalar(select(Feedback).where(Feedback.answer == answer.id))
        if row is None:
            row = Feedback(id=f"fb_{secrets.token_hex(12)}", answer=answer.id, key=request.key.id, bytes=0)
        for name in FEEDBACK[1:]:
            if body.get(name) is not None:
                setattr(row, name, body[name])
        bytes_before, row.bytes = row.bytes, sum(len(text.encode()) for text in (row.label, row.correction) if text)
        keys = select(Key.id).where(Key.project == request.key.project)
        stored = session.scalar(select(func.coalesce(func.sum(Feedback.bytes), 0)).where(Feedback.key.in_(keys))) or 0
        most = gateway.settings.feedback_bytes
        if row.bytes > bytes_before and stored - bytes_before + row.bytes > most:
            message = f"What this project says of its answers would have more than {most} bytes."
            headers = {"retry-after": "3600", "x-should-retry": "false"}
            raise ApiError(429, message, code="insufficient_quota", headers=headers)
        row.created = now()
        session.add(row)
        return row


async def add_model(gateway: Gateway, request: Request) -> None:
    """Serve another adapter: a run or an export below the folders that the operator allows. `replace` replaces the one served under
    that name."""
    body = await request.json()
    name, path, replaces = body.get("name"), body.get("path"), body.get("replace", False)
    if not {"name", "path"} <= set(body) <= {"name", "path", "replace"} or not isinstance(replaces, bool):
        raise ApiError(400, "Give name and path, and replace (true or false) if you like.", param="name")
    if not isinstance(name, str) or not isinstance(path, str):
        raise ApiError(400, "Give name and path.", param="name")
    folder = await asyncio.to_thread(_resolve_below, path, gateway.settings.adapter_roots)
    adapter = await asyncio.to_thread(source.resolve, name, str(folder))
    model = await (gateway.fleet.replace(adapter) if replaces else gateway.fleet.add(adapter))
    await request.answer(describe(model, request.key))


def _resolve_below(path: str, roots: tuple[str, ...]) -> Path:
    """Return the folder with its links resolved. Raises UserError if it is not below one of `roots`."""
    try:
        folder = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        folder = None
    if folder is None or not folder.is_dir() or not any(folder.is_relative_to(Path(root).resolve()) for root in roots):
        raise UserError(
            Problem("path", "is no folder below those that --adapter-root names", "dstune serve --adapter-root DIR")
        )
    if source.is_run(str(folder)) and current_export(folder) is None:
        raise UserError(Problem("path", "the run has no export of its newest checkpoint: run `dstune export`"))
    return folder


async def remove_model(gateway: Gateway, request: Request) -> None:
    name = request.parameters["model"]
    await gateway.fleet.remove(name)
    await request.answer({"id": name, "object": "model", "deleted": True})


async def forget_user(gateway: Gateway, request: Request) -> None:
    """Delete what is stored of the requests that named this `user`."""
    removed = await gateway.recorder.forget(request.parameters["user"])
    await request.answer({"object": "user", "deleted": True, "answers": removed})


async def chat_page(gateway: Gateway, request: Request) -> None:
    await request.respond(200, page.html(), page.HEADERS)


COMMON = [
    Route("GET", "/healthz", health, scope="public", any_host=True),
    Route("GET", "/readyz", readiness, scope="public", any_host=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/models/{model+}", retrieve_model),
    Route("GET", "/metrics", metrics, scope="admin"),
]
"""Routes that exist even without a model."""

ROUTES = [
    *COMMON,
    Route("GET", "/", chat_page, scope="public"),
    *(Route("POST", path, _inference(path, body), scope="member") for path, body in INFERENCE.items()),
    Route("POST", "/v1/feedback", feedback, scope="member"),
    Route("POST", "/admin/models", add_model, scope="admin"),
    Route("DELETE", "/admin/models/{model+}", remove_model, scope="admin"),
    Route("DELETE", "/admin/users/{user+}", forget_user, scope="admin"),
]
