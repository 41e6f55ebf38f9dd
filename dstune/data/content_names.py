"""List the names of columns that look like content."""

from __future__ import annotations

from functools import cache

from dstune.core.registry import on_change
from dstune.data.media import COLUMNS
from dstune.protocols import ROW_FORMATS

USUAL_NAMES = (
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
"""Usual names of content, apart from those that some format reads."""

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
"""Names that some format reads and that are no content."""


@cache
def content_names() -> frozenset[str]:
    """Return the names of columns that look like content: those that some format reads, and other usual ones."""
    names = {*USUAL_NAMES, *COLUMNS}
    for form in ROW_FORMATS.classes().values():
        names |= {*form.required, *form.optional, *(name for others in form.other_names.values() for name in others)}
    return frozenset(names.difference(NO_CONTENT))


on_change(content_names.cache_clear)
