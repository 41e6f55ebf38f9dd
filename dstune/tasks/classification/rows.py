"""Row formats of texts, or pairs of them, with a label."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.values import label, labels_of_row, number, text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class TextLabel(RowFormat):
    name = "text_label"
    required: ClassVar[tuple[str, ...]] = ("text", "label")
    other_names: ClassVar = {"label": ("labels",)}
    readable_as: ClassVar[tuple[str, ...]] = ("text",)
    checks: ClassVar[dict[str, Check]] = {"text": text}

    def check_of(self, role: str, task: Task | None) -> Check | None:
        if role != "label":
            return super().check_of(role, task)
        if task is not None and task.several_labels:
            return labels_of_row
        return label if task is None or task.has_labels else number

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        if task is not None and task.several_labels:
            values["labels"] = values.pop("label")
        return values


@row_format
class Pair(TextLabel):
    name = "pair"
    required = ("text", "text_pair", "label")
    readable_as = ()
    checks: ClassVar[dict[str, Check]] = {"text": text, "text_pair": text}
