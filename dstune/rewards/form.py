"""Rewards for the form of a completion."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from dstune.core.errors import first_line
from dstune.protocols import Reward, reward

log = logging.getLogger(__name__)

_REASONING = re.compile(r"\s*<think>(?:(?!</?think>).)+</think>\s*\S", re.DOTALL)


@reward
class ReasoningFormat(Reward):
    """1 where the completion is `<think>...</think>` and then an answer, else 0. A prompt that ends with `<think>` counts as its
    beginning."""

    name = "reasoning_format"
    reads_texts = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            float(bool(_REASONING.match(text) or _REASONING.match(f"<think>{text}"))) for text in map(str, completions)
        ]


@reward
class Pattern(Reward):
    """1 where the regular expression in the column `pattern` is found in the completion, else 0."""

    name = "pattern"
    reads_texts = True
    columns = ("pattern",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        # A pattern that takes exponential time is ended with the process that runs it.
        return [
            None if expected is None else float(re.search(expected, completion) is not None)
            for completion, expected in zip(completions, columns["pattern"], strict=True)
        ]


@reward
class JsonObject(Reward):
    """1 where the whole completion is a JSON object that has the keys in the column `keys` (any keys without it), else 0."""

    name = "json_object"
    reads_texts = True

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        required_keys = [keys or () for keys in columns.get("keys", [()] * len(completions))]
        return [float(_is_object(text, set(keys))) for text, keys in zip(completions, required_keys, strict=True)]


@reward
class JsonSchema(Reward):
    """1 where the whole completion is JSON that the JSON Schema in the column `schema` (an object, or its text) accepts, else 0."""

    name = "json_schema"
    reads_texts = True
    columns = ("schema",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        try:
            from jsonschema.validators import validator_for
            from referencing import Registry
        except ImportError:
            raise ImportError("the reward json_schema needs the package jsonschema (extra reinforcement)") from None
        scores: list[float | None] = []
        for text, schema in zip(completions, columns["schema"], strict=True):
            if schema is None:
                scores.append(None)
                continue
            try:
                value = _json_of(text)
            except (ValueError, RecursionError):
                scores.append(0.0)
                continue
            try:
                schema = json.loads(schema) if isinstance(schema, str) else schema
                validator_of_dialect = validator_for(schema)
                validator_of_dialect.check_schema(schema)
                # The registry fetches no schema from elsewhere.
                scores.append(float(validator_of_dialect(schema, registry=Registry()).is_valid(value)))
            except Exception as error:  # of one row: the others keep their scores
                log.warning("a completion has no score of its schema: %s: %s", type(error).__name__, first_line(error))
                scores.append(None)
        return scores


@reward
class Brevity(Reward):
    """1 for an empty completion, falling linearly to 0 at the column `max_length` (tokens; 256 without it)."""

    name = "brevity"
    reads_texts = True
    reads_tokens = True

    def __call__(
        self,
        prompts: Any,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        limits = [limit or 256 for limit in columns.get("max_length", [None] * len(completion_ids))]
        return [max(0.0, 1 - len(ids) / limit) for ids, limit in zip(completion_ids, limits, strict=True)]


def _is_object(text: str, keys: set[str]) -> bool:
    try:
        value = _json_of(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and keys <= value.keys()


def _json_of(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for NaN and Infinity, which JSON does not have; RecursionError."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
