"""Cursor pagination as in the official client: `after` is the id of the previous page's last row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session
from sqlalchemy.sql.base import ExecutableOption

from dstune.finetuning.tables import Numbered
from dstune.serve.errors import ApiError

Row = TypeVar("Row", bound=Numbered)
PARAMETERS = ("after", "limit", "order")


@dataclass(frozen=True)
class Page:
    limit: int
    after: str | None = None
    ascending: bool = False


def page_of(query: dict[str, str], *, limit: int, most: int, orders: tuple[str, str] = ("asc", "desc")) -> Page:
    """Return the page that a query asks for. limit: the default; most: the largest. orders: the words for oldest and for newest
    first. Raises ApiError."""
    limit_text = query.get("limit", "")
    if limit_text:
        if not (
            limit_text.isdecimal() and limit_text.isascii() and len(limit_text) < 10 and 1 <= int(limit_text) <= most
        ):
            raise ApiError(400, f"Invalid limit: must be a whole number from 1 to {most}.", param="limit")
        limit = int(limit_text)
    order = query.get("order") or orders[1]
    if order not in orders:
        raise ApiError(400, f"Invalid order: must be {orders[0]} or {orders[1]}.", param="order")
    return Page(limit, query.get("after") or None, order == orders[0])


def rows_of(
    session: Session,
    table: type[Row],
    page: Page,
    may_name: Sequence[ColumnElement[bool]],
    *listed: ColumnElement[bool],
    options: Sequence[ExecutableOption] = (),
) -> tuple[list[Row], bool]:
    """Return the rows of a page, and whether there are more. may_name: conditions on rows that the caller may use as a cursor;
    listed: conditions on rows to list. A cursor may be a row that is no longer listed. Raises ApiError for an unknown cursor."""
    query = select(table).options(*options).where(*may_name, *listed)
    place = tuple_(table.created_at, table.number)
    if page.after is not None:
        at = session.execute(select(table.created_at, table.number).where(*may_name, table.id == page.after)).first()
        if at is None:
            raise ApiError(400, "Invalid after: there is no such object.", param="after", code="invalid_cursor")
        query = query.where(place > tuple(at) if page.ascending else place < tuple(at))
    order = (table.created_at, table.number) if page.ascending else (table.created_at.desc(), table.number.desc())
    rows = list(session.scalars(query.order_by(*order).limit(page.limit + 1)))
    return rows[: page.limit], len(rows) > page.limit


def listing(
    values: list[dict[str, Any]], has_more: bool, *, ids: bool = True, nobody: str | None = None
) -> dict[str, Any]:
    """Return the body of a list. ids: whether it includes the first and the last id; nobody: their value for an empty list."""
    body: dict[str, Any] = {"object": "list", "data": values, "has_more": has_more}
    if ids:
        body |= {"first_id": values[0]["id"] if values else nobody, "last_id": values[-1]["id"] if values else nobody}
    return body
