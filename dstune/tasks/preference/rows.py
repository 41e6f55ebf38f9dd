"""Row formats of compared and judged answers."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.messages import plain_exchange
from dstune.data.preferences import pair_row, verdict_of
from dstune.data.values import text_or_messages
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class PreferenceFormat(RowFormat):
    name = "preference"
    required = ("chosen", "rejected")
    optional = ("prompt", "system", "tools", "margin")

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return pair_row(found)


@row_format
class Feedback(RowFormat):
    name = "feedback"
    required = ("prompt", "completion", "label")
    optional = ("system", "tools")
    checks: ClassVar[dict[str, Check]] = {
        "prompt": text_or_messages,
        "completion": text_or_messages,
        "label": verdict_of,
    }

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        verdict = found.pop("label")
        return {**plain_exchange(found, needs_answer=True, silence=not verdict), "desirable": verdict}
