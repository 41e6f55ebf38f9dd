"""Row format of sources and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dstune.data.messages import template_arguments
from dstune.data.values import text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class SourceTarget(RowFormat):
    name = "source_target"
    required = ("source", "target")
    optional = ("chat_template_kwargs",)
    other_names: ClassVar = {
        "source": ("document", "article", "dialogue"),
        "target": ("summary", "highlights", "abstract"),
    }
    checks: ClassVar[dict[str, Check]] = {"source": text, "target": text}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        arguments = template_arguments(values.pop("chat_template_kwargs", None))
        return {**values, "chat_template_kwargs": arguments} if arguments else values

    def expand(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add the fields of a column `translation`, which has a text for each language (`{"en": ..., "es": ...}`)."""
        texts = fields.get("translation")
        return {**texts, **fields} if isinstance(texts, Mapping) else fields

    def candidates(self, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
        return [column for column in columns if column not in ("translation", "id", *mapping.values())]
