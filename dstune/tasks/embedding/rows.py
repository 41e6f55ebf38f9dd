"""Row format of texts that belong together."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.problems import RowError
from dstune.data.values import text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class Contrastive(RowFormat):
    name = "contrastive"
    required = ("anchor", "positive")
    optional = ("negative",)
    checks: ClassVar[dict[str, Check]] = {"anchor": text, "positive": text, "negative": text}

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        if found["positive"] == found.get("negative"):
            raise RowError("positive and negative are the same")
        return found
