"""Rules of rows that are token ids already (`data.format=tokens`)."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.data_schema import Duplicates, Found
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem

TOKENS = "tokens"


def check_token_ids(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    formats = {data.format, *(source.format for source in data.mixture.values())}
    if TOKENS not in formats:
        if data.tokenizer is not None:
            reason = "rows that are no token ids are cut by the model's own tokenizer"
            yield Problem("data.tokenizer", reason, "data.tokenizer=null, or data.format=tokens", data.tokenizer)
        return
    if data.tokenizer is None:
        reason = "token ids mean nothing without the tokenizer that made them"
        yield Problem("data.tokenizer", reason, "data.tokenizer=NAME, the hub id or folder of that tokenizer", "null")
    clean = data.clean
    reason = "rows of token ids have no text that could be looked at"
    for key, value, off in (
        ("languages", clean.languages, []),
        ("secrets", clean.secrets, Found.keep),
        ("personal_data", clean.personal_data, Found.keep),
        ("min_characters", clean.min_characters, 0),
        ("max_characters", clean.max_characters, None),
    ):
        if value != off:
            name = value.name if isinstance(value, Found) else format_value(value)
            yield Problem(f"data.clean.{key}", reason, f"leave out data.clean.{key}", name)
    if clean.duplicates is Duplicates.near:
        yield Problem("data.clean.duplicates", reason, "data.clean.duplicates=exact", "near")
