"""Row formats of plain text, and of text that is already tokenized."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.token_ids import numbers, token_row
from dstune.data.values import text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class Text(RowFormat):
    name = "text"
    required = ("text",)
    checks: ClassVar[dict[str, Check]] = {"text": text}


@row_format
class Tokens(RowFormat):
    name = "tokens"
    required = ("input_ids",)
    optional = ("labels", "attention_mask")
    only_named = True
    further_keys = "data.format=tokens data.tokenizer=NAME"
    checks: ClassVar[dict[str, Check]] = {"input_ids": numbers, "labels": numbers, "attention_mask": numbers}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return token_row(values)
