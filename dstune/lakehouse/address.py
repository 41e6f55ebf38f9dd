"""`delta://PATH[@VERSION|@TIME][#ID][?columns=A,B&where=SQL]`, and the same after `uc://`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from dstune.core.errors import Problem, UserError

_TIME = r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
_ADDRESS = re.compile(
    rf"(?P<scheme>\w+)://(?P<location>.+?)(?:@(?:(?P<version>\d+)|(?P<time>{_TIME})))?(?:#(?P<id>[0-9a-fA-F-]{{8,64}}))?"
    r"(?:\?(?P<query>.*))?",
    re.DOTALL,
)
_QUERY = re.compile(r"(?:columns=(?P<columns>[^&]*))?(?:&|$)?(?:where=(?P<where>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Address:
    scheme: str
    location: str
    version: int | None = None
    time: str = ""
    """A time instead of a version: it selects the newest version at that time."""
    table_id: str = ""
    """The table's id, which changes if the table is created again at the same place."""
    columns: tuple[str, ...] = ()
    """The columns to read; empty for all."""
    where: str = ""
    """An SQL predicate; only matching rows are read."""

    def __str__(self) -> str:
        version = f"@{self.version}" if self.version is not None else f"@{self.time}" if self.time else ""
        table_id = f"#{self.table_id}" if self.table_id else ""
        columns = f"columns={','.join(self.columns)}" if self.columns else ""
        query = "&".join(filter(None, [columns, f"where={self.where}" if self.where else ""]))
        return f"{self.scheme}://{self.location}{version}{table_id}{f'?{query}' if query else ''}"

    @property
    def is_resolved(self) -> bool:
        return self.version is not None and bool(self.table_id)

    @property
    def moment(self) -> datetime:
        """`time` with its time zone, UTC by default. Raises ValueError."""
        parsed = datetime.fromisoformat(self.time)
        return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


def parse(spec: str, key: str) -> Address:
    """Parse a table's address. Raises UserError."""
    match = _ADDRESS.fullmatch(spec)
    query = _QUERY.fullmatch((match and match["query"]) or "")
    fix = "SCHEME://PLACE, then @VERSION or @TIME, then ?columns=A,B&where=SQL, such as delta:///data/reviews@7?where=stars > 3"
    if match is None or query is None:
        raise UserError(Problem(key, "cannot be read as the address of a table", fix, spec))
    columns = tuple(name.strip() for name in (query["columns"] or "").split(",") if name.strip())
    version = None if match["version"] is None else int(match["version"])
    address = Address(
        match["scheme"],
        match["location"],
        version,
        match["time"] or "",
        match["id"] or "",
        columns,
        (query["where"] or "").strip(),
    )
    if address.time:
        try:
            address.moment  # noqa: B018 (raises)
        except ValueError as error:
            raise UserError(
                Problem(key, f"the time cannot be read: {error}", "such as @2026-03-04T05:06:07Z", spec)
            ) from None
    return address
