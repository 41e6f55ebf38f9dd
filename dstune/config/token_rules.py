"""Rules for rows that already consist of token ids (`data.format=tokens`)."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.data_schema import AUTOMATIC, Duplicates, Found, Unwanted
from dstune.config.multi_task import OTHER_PARTS, is_multi_task
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem

TOKENS = "tokens"


def check_token_ids(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    formats = {data.format, *(source.format for source in data.mixture.values())}
    if TOKENS not in formats:
        if data.tokenizer is not None:
            reason = "only rows of token ids use this; the model's own tokenizer reads all other rows"
            yield Problem("data.tokenizer", reason, "data.tokenizer=null, or data.format=tokens", data.tokenizer)
        return
    if data.tokenizer is None:
        reason = "token ids mean nothing without the tokenizer that made them"
        yield Problem("data.tokenizer", reason, "data.tokenizer=NAME, the hub id or folder of that tokenizer", "null")
    if not is_multi_task(config):  # with several tasks, each source has its own encoder
        yield from _check_no_texts(config)
    clean = data.clean
    reason = "rows of token ids have no text to examine"
    for key, value, off in (
        ("languages", clean.languages, []),
        ("secrets", clean.secrets, Found.keep),
        ("personal_data", clean.personal_data, Found.keep),
        ("refusals", clean.refusals, Unwanted.keep),
        ("toxicity", clean.toxicity, Unwanted.keep),
        ("min_characters", clean.min_characters, 0),
        ("max_characters", clean.max_characters, None),
    ):
        if value != off:
            name = value.name if isinstance(value, Found | Unwanted) else format_value(value)
            yield Problem(f"data.clean.{key}", reason, f"leave out data.clean.{key}", name)
    if clean.duplicates is Duplicates.near:
        yield Problem("data.clean.duplicates", reason, "data.clean.duplicates=exact", "near")


def _check_no_texts(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if some rows are token ids and others are texts: `bits_per_byte` would divide the loss of all rows by the
    bytes of the texts alone."""
    data = config.data
    format_by_key = {
        f"data.mixture.{name}": data.format if source.format == AUTOMATIC else source.format
        for name, source in data.mixture.items()
    }
    format_by_key |= {f"data.{part}": data.format for part in OTHER_PARTS if getattr(data, part) is not None}
    ids = [key for key, fmt in format_by_key.items() if fmt == TOKENS]
    if texts := [key for key in format_by_key if ids and key not in ids]:
        yield Problem(
            f"{ids[0]}.format" if ids[0].startswith("data.mixture.") else "data.format",
            f"the rows of {ids[0]} are token ids and those of {texts[0]} are texts; a run reads one or the other",
            f"tokenize {texts[0]} with data.tokenizer too and set data.format=tokens, or give the texts of {ids[0]}",
            TOKENS,
        )
