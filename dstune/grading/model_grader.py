"""What a `score_model` grader asks its model, and how the model's answer is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dstune.grading.grader import GraderFailed

GRADE = {
    "type": "json_schema",
    "json_schema": {
        "name": "grade",
        "schema": {
            "type": "object",
            "properties": {
                "steps": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
                    },
                },
                "result": {"type": "number"},
            },
            "required": ["result"],
        },
    },
}
"""The form of the model's answer."""


def grading_request(grader: Mapping[str, Any], messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return the body of the chat completion that asks a grader's model for a score."""
    parameters = dict(grader.get("sampling_params", {}))
    if (most := parameters.pop("max_completions_tokens", None)) is not None:
        parameters["max_completion_tokens"] = most
    return {"model": grader["model"], "messages": messages, "response_format": GRADE, **parameters}


def read_score(text: Any) -> float:
    """Return the score in a model's answer. Raises GraderFailed."""
    try:
        score = float(json.loads(text)["result"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        score = math.nan
    if not math.isfinite(score):
        raise GraderFailed("model_grader_parse_error", str(text)[:200])
    return score
