"""`/v1/organization/...`: usage, costs and the audit log of an organization, for its owners; and a project's secrets."""

from __future__ import annotations

import asyncio
import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from dstune.finetuning import audit, pages
from dstune.finetuning.fields import Body, read_body
from dstune.finetuning.ids import unix_time
from dstune.finetuning.tables import AuditEntry, Secret, Usage
from dstune.finetuning.vault import Vault
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.store.database import Database
from dstune.serve.store.tables import AnswerRow, Key, Project
from dstune.serve.validation import Expected

WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86_400, 7, 31)}
"""Bucket widths: seconds of a bucket, the default number of buckets and the maximum."""
SECRETS = ("wandb",)
CURRENCY = "usd"


@dataclass(frozen=True)
class UsageEntry:
    """The usage of one answer or job."""

    at: int
    """Unix seconds."""
    project: str
    key: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    device_seconds: float = 0.0
    cost: float = 0.0
    line_item: str = ""


@dataclass
class Total:
    """Sums over the entries of one bucket and group."""

    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    device_seconds: float = 0.0
    cost: float = 0.0

    def add(self, entry: UsageEntry) -> None:
        self.input_tokens += entry.input_tokens
        self.output_tokens += entry.output_tokens
        self.requests += entry.requests
        self.device_seconds += entry.device_seconds
        self.cost += entry.cost


@dataclass(frozen=True)
class UsageQuery:
    """A request for usage: totals of `group_by` in time buckets."""

    organization: str
    start: int
    """Unix seconds, like `end`, which is exclusive."""
    end: int
    width: int
    """Seconds per bucket."""
    count: int
    """The most buckets on a page."""
    group_by: tuple[str, ...]
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Values of `project`, `key` and `model` to include; a missing field includes all."""

    def counts(self, entry: UsageEntry) -> bool:
        return all(getattr(entry, name) in values for name, values in self.only.items())


class SecretRequest(Body):
    name: Annotated[Literal[SECRETS], Expected(f"must be one of {', '.join(SECRETS)}")]  # type: ignore[valid-type]
    value: Annotated[str, Field(pattern="^[ -~]{8,512}$"), Expected("must be 8 to 512 printable ASCII characters")]


class Organizations:
    def __init__(self, database: Database, vault: Vault):
        self._database, self._vault = database, vault

    # -- routes

    async def audit_logs(self, gateway: Gateway, request: Request) -> None:
        query = request.query(("after", "limit"), lists=("event_types", "project_ids"))
        page = pages.page_of(query, limit=20, most=100)
        kinds, projects = request.query_values("event_types[]"), request.query_values("project_ids[]")
        await request.answer(await asyncio.to_thread(self._audit, _organization(request), page, kinds, projects))

    async def completions(self, gateway: Gateway, request: Request) -> None:
        usage_query = _read_usage_query(request, ("project_id", "api_key_id", "model"))
        await self._report(request, usage_query, self._answers, _completion_result)

    async def training(self, gateway: Gateway, request: Request) -> None:
        usage_query = _read_usage_query(request, ("project_id", "api_key_id", "model"))
        await self._report(request, usage_query, self._jobs, _training_result)

    async def costs(self, gateway: Gateway, request: Request) -> None:
        usage_query = _read_usage_query(request, ("project_id", "api_key_id", "line_item"), widths=("1d",))
        await self._report(request, usage_query, self._jobs, _cost_result)

    async def list_secrets(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer(await asyncio.to_thread(self._secrets, request.key.project))

    async def store_secret(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        secret = read_body(SecretRequest, await request.json())
        await asyncio.to_thread(self._store_secret, request, secret.name, secret.value)
        await request.answer({"object": "project.secret", "name": secret.name})

    async def drop_secret(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        name = request.parameters["secret"]
        await asyncio.to_thread(self._drop_secret, request, name)
        await request.answer({"object": "project.secret.deleted", "name": name, "deleted": True})

    # -- inside

    async def _report(
        self,
        request: Request,
        usage_query: UsageQuery,
        source: Callable[[Session, UsageQuery], Iterable[UsageEntry]],
        result: Callable[[Total], dict[str, Any]],
    ) -> None:
        await request.answer(await asyncio.to_thread(self._buckets, usage_query, source, result))

    def _buckets(
        self,
        usage_query: UsageQuery,
        source: Callable[[Session, UsageQuery], Iterable[UsageEntry]],
        result: Callable[[Total], dict[str, Any]],
    ) -> dict[str, Any]:
        until = min(usage_query.end, usage_query.start + usage_query.width * usage_query.count)
        groups: dict[int, dict[tuple[str, ...], Total]] = defaultdict(lambda: defaultdict(Total))
        with self._database.session() as session:
            for entry in source(session, usage_query):
                if usage_query.counts(entry):
                    index = (entry.at - usage_query.start) // usage_query.width
                    groups[index][tuple(_group(entry, name) for name in usage_query.group_by)].add(entry)
        data = []
        for start in range(usage_query.start, until, usage_query.width):
            group_totals = groups.get((start - usage_query.start) // usage_query.width, {})
            results = [
                result(total) | dict(zip(usage_query.group_by, names, strict=True))
                for names, total in sorted(group_totals.items(), key=lambda group: group[0])
            ]
            end = min(start + usage_query.width, usage_query.end)
            data.append({"object": "bucket", "start_time": start, "end_time": end, "results": results})
        has_more = until < usage_query.end
        return {
            "object": "page",
            "data": data,
            "has_more": has_more,
            "next_page": f"page_{until}" if has_more else None,
        }

    def _answers(self, session: Session, usage_query: UsageQuery) -> Iterable[UsageEntry]:
        until = min(usage_query.end, usage_query.start + usage_query.width * usage_query.count)
        query = (
            select(
                AnswerRow.created, AnswerRow.key, AnswerRow.model, AnswerRow.tokens, AnswerRow.input_tokens, Key.project
            )
            .join(Key, Key.id == AnswerRow.key)
            .join(Project, Project.id == Key.project)
            .where(
                Project.organization == usage_query.organization,
                AnswerRow.created >= _moment(usage_query.start),
                AnswerRow.created < _moment(until),
                AnswerRow.status.between(200, 299),
            )
            .execution_options(yield_per=1000)
        )
        for row in session.execute(query):
            created = row.created if row.created.tzinfo else row.created.replace(tzinfo=datetime.UTC)
            output = max(row.tokens - row.input_tokens, 0)
            yield UsageEntry(int(created.timestamp()), row.project, row.key, row.model, row.input_tokens, output, 1)

    def _jobs(self, session: Session, usage_query: UsageQuery) -> Iterable[UsageEntry]:
        until = min(usage_query.end, usage_query.start + usage_query.width * usage_query.count)
        query = (
            select(Usage)
            .join(Project, Project.id == Usage.project)
            .where(
                Project.organization == usage_query.organization,
                Usage.created_at >= usage_query.start,
                Usage.created_at < until,
            )
        )
        for row in session.scalars(query):
            yield UsageEntry(
                row.created_at, row.project, row.key, row.model, row.tokens, 0, 1, row.device_seconds, row.cost,
                f"{row.kind} {row.model}",
            )  # fmt: skip

    def _audit(self, organization: str, page: pages.Page, kinds: list[str], projects: list[str]) -> dict[str, Any]:
        filters = []
        if kinds:
            filters.append(AuditEntry.action.in_(kinds))
        if projects:
            filters.append(AuditEntry.project.in_(projects))
        with self._database.session() as session:
            of_organization = [AuditEntry.organization == organization]
            rows, has_more = pages.rows_of(session, AuditEntry, page, of_organization, *filters)
            names = {row.id: row.name for row in session.scalars(select(Project))}
        return pages.listing([_describe_entry(row, names) for row in rows], has_more)

    def _secrets(self, project: str) -> dict[str, Any]:
        with self._database.session() as session:
            rows = session.scalars(select(Secret).where(Secret.project == project).order_by(Secret.name))
            data = [{"object": "project.secret", "name": row.name, "created_at": row.created_at} for row in rows]
        return {"object": "list", "data": data}

    def _store_secret(self, request: Request, name: str, value: str) -> None:
        with self._database.writing.begin() as session:
            self._vault.keep(session, request.key.project, name, value)
            audit.note(session, request, "secret.created", name)

    def _drop_secret(self, request: Request, name: str) -> None:
        with self._database.writing.begin() as session:
            row = session.get(Secret, (request.key.project, name))
            if row is None:
                raise ApiError(404, f"No such secret: {name[:128]}", param="name", code="secret_not_found")
            session.delete(row)
            audit.note(session, request, "secret.deleted", name)


def _read_usage_query(request: Request, groups: Sequence[str], widths: Sequence[str] = tuple(WIDTHS)) -> UsageQuery:
    """Parse the parameters of a request for usage. groups: the fields it may group by. Raises ApiError."""
    lists = ("project_ids", "api_key_ids", "models", "group_by")
    query = request.query(("start_time", "end_time", "bucket_width", "limit", "page"), lists=lists)
    width_name = query.get("bucket_width", "1d")
    if width_name not in widths:
        raise ApiError(400, f"Invalid bucket_width: must be one of {', '.join(widths)}.", param="bucket_width")
    width, count, most = WIDTHS[width_name]
    start = _time(query, "start_time")
    if start is None:
        raise ApiError(400, "Missing required parameter: 'start_time'.", param="start_time")
    end = _time(query, "end_time")
    end = unix_time() + 1 if end is None else end
    limit = query.get("limit", str(count))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= most):
        raise ApiError(400, f"Invalid limit: must be a whole number from 1 to {most}.", param="limit")
    if page := query.get("page"):
        start = _time({"page": page.removeprefix("page_")}, "page") or 0
    group_by = tuple(dict.fromkeys(request.query_values("group_by[]")))
    if unknown := [name for name in group_by if name not in groups]:
        reason = f"{unknown[0][:60]!r} is none of {', '.join(groups)}"
        raise ApiError(400, f"Invalid group_by: {reason}.", param="group_by")
    if end <= start:
        raise ApiError(400, "Invalid end_time: must be behind start_time.", param="end_time")
    only = {
        name: frozenset(values)
        for name, parameter in (("project", "project_ids"), ("key", "api_key_ids"), ("model", "models"))
        if (values := request.query_values(f"{parameter}[]"))
    }
    return UsageQuery(_organization(request), start, end, width, int(limit), group_by, only)


def _time(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ApiError(400, f"Invalid {name}: must be a time in seconds.", param=name)
    return int(text)


def _group(entry: UsageEntry, name: str) -> str:
    return str(getattr(entry, {"project_id": "project", "api_key_id": "key"}.get(name, name)))


def _completion_result(total: Total) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": total.input_tokens,
        "output_tokens": total.output_tokens,
        "num_model_requests": total.requests,
        **dict.fromkeys(("project_id", "api_key_id", "model", "user_id")),
    }


def _training_result(total: Total) -> dict[str, Any]:
    return {
        "object": "organization.usage.fine_tuning.result",
        "trained_tokens": total.input_tokens,
        "device_seconds": total.device_seconds,
        "num_jobs": total.requests,
        **dict.fromkeys(("project_id", "api_key_id", "model")),
    }


def _cost_result(total: Total) -> dict[str, Any]:
    return {
        "object": "organization.costs.result",
        "amount": {"value": total.cost, "currency": CURRENCY},
        **dict.fromkeys(("project_id", "api_key_id", "line_item")),
    }


def _describe_entry(row: AuditEntry, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "organization.audit_log",
        "type": row.action,
        "effective_at": row.created_at,
        "project": {"id": row.project, "name": names.get(row.project, "")},
        "actor": {
            "type": "api_key",
            "api_key": {"type": "service_account", "id": row.key, "service_account": {"id": row.key}},
        },
        "request_id": row.request,
        row.action: {"id": row.object, "data": row.detail},
    }


def _moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _organization(request: Request) -> str:
    return request.key.organization
