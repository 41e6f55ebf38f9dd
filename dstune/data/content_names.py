"""Names of columns that look like content."""

from __future__ import annotations

from functools import cache

from dstune.core.registry import on_change
from dstune.data.media import COLUMNS
from dstune.protocols import ROW_FORMATS

MORE = (
    "content",
    "context",
    "passage",
    "document",
    "documents",
    "knowledge",
    "hypothesis",
    "premise",
    "dialog",
    "input",
    "output",
    "query",
    "question",
    "answer",
    "system_prompt",
    "instructions",
    "reasoning",
    "reasoning_content",
    "thinking",
    "rationale",
    "explanation",
    "rejected_response",
    "rejected_messages",
    "preferred_output",
    "non_preferred_output",
    "input_ids",
)
"""Names of content beside those that some format reads."""

NO_CONTENT = (
    "label",
    "labels",
    "kto_tag",
    "tags",
    "ner_tags",
    "id",
    "margin",
    "is_impossible",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "attention_mask",
)


@cache
def content_names() -> frozenset[str]:
    """Return names of columns that look like content: those that some format reads, and usual ones."""
    names = {*MORE, *COLUMNS}
    for form in ROW_FORMATS.classes().values():
        names |= {*form.required, *form.optional, *(name for others in form.other_names.values() for name in others)}
    return frozenset(names.difference(NO_CONTENT))


on_change(content_names.cache_clear)
