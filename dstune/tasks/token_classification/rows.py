"""Row format of words with a tag each."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.problems import RowError, format_value
from dstune.data.tags import checked
from dstune.data.values import listed, words
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task
from dstune.tasks.token_classification.config import TokenClassificationConfig


@row_format
class TokensTags(RowFormat):
    name = "tokens_tags"
    required = ("tokens", "tags")
    other_names: ClassVar = {"tokens": ("words",), "tags": ("ner_tags", "labels")}
    checks: ClassVar[dict[str, Check]] = {"tokens": words, "tags": listed}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        config = task.config if task is not None else None
        settings = config if isinstance(config, TokenClassificationConfig) else TokenClassificationConfig()
        tokens, tags = values["tokens"], values["tags"]
        if len(tokens) != len(tags):
            raise RowError(f"{len(tokens)} tokens have {len(tags)} tags")
        mapped_tags = [_tag(tag, settings.labels) for tag in tags]
        return {"tokens": tokens, "tags": checked(mapped_tags, tokens, settings.scheme, repair=settings.repair)}


def _tag(value: Any, names: list[str]) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not names:
            raise RowError(f"tag {value} is a number; task.labels=[NAME,NAME] names the tags in their order")
        if not 0 <= value < len(names):
            raise RowError(f"tag {value} is not the number of one of the {len(names)} task.labels")
        return names[value]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"a tag must be text or a number, it is {format_value(value)}")
    return value.strip()
