"""Row format of plain text."""

from __future__ import annotations

from typing import ClassVar

from dstune.data.values import text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check


@row_format
class Text(RowFormat):
    name = "text"
    required = ("text",)
    checks: ClassVar[dict[str, Check]] = {"text": text}
