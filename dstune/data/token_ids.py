"""Check rows that are already token ids, and whether the model's tokenizer made them."""

from __future__ import annotations

from typing import Any

from dstune.config.data_schema import DataConfig
from dstune.config.schema import RunConfig
from dstune.config.token_rules import TOKENS
from dstune.core.errors import Problem, UserError
from dstune.core.tokenizers import open_tokenizer
from dstune.data.problems import RowError, format_value

MASKED = -100
"""The label of a token that does not count in the loss, as in `transformers`."""


def numbers(value: Any, column: str) -> list[int]:
    """Check that a value is a list of whole numbers and not empty, and return it. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column!r} must be a list of token ids, it is {format_value(value)}")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not -(2**63) <= number < 2**63:
            raise RowError(f"column {column!r} must hold whole numbers of 64 bits, one is {format_value(number)}")
    return value


def token_row(values: dict[str, Any]) -> dict[str, Any]:
    """Return the row's `input_ids`, and its `labels` if given: each label is the token itself or MASKED. Raises RowError."""
    ids, labels, mask = values["input_ids"], values.get("labels"), values.get("attention_mask")
    if mask is not None and (len(mask) != len(ids) or not all(mask)):
        raise RowError(
            "attention_mask must be 1 for every token: rows are padded, and kept apart, when they are packed"
        )
    if labels is None:
        return {"input_ids": ids}
    if len(labels) != len(ids):
        raise RowError(f"{len(ids)} input_ids have {len(labels)} labels")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, MASKED):
            raise RowError(f"the label at token {place} is {label}, which is neither its token ({token}) nor {MASKED}")
    return {"input_ids": ids, "labels": labels}


def check_tokenizer(config: RunConfig, tokenizer: Any) -> None:
    """Raise UserError if `data.tokenizer`, which made the rows' token ids, differs from the model's tokenizer."""
    if not _has_token_ids(config.data) or config.data.tokenizer in (None, config.model.path):
        return
    from dstune import samples

    tokenizer_name = str(config.data.tokenizer)
    path = str(samples.resolve(tokenizer_name, fetch=False)) if samples.is_sample(tokenizer_name) else tokenizer_name
    key = "data.tokenizer"
    maker = open_tokenizer(path, where=key)
    model_ids, data_ids = tokenizer.get_vocab(), maker.get_vocab()
    if different := {
        token for token in model_ids.keys() | data_ids.keys() if model_ids.get(token) != data_ids.get(token)
    }:
        token = min(different, key=lambda item: (data_ids.get(item, len(data_ids)), item))
        reason = (
            f"it differs from the model's tokenizer ({config.model.path}) in {len(different):,} tokens, for example "
            f"{token!r} is {data_ids.get(token, 'none')} in {tokenizer_name} and {model_ids.get(token, 'none')} in the model's"
        )
        raise UserError(
            Problem(key, reason, "make the token ids with the model's tokenizer, or give the texts", tokenizer_name)
        )


def _has_token_ids(data: DataConfig) -> bool:
    return TOKENS in {data.format, *(source.format for source in data.mixture.values())}
