"""Validates and runs graders of requests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from dstune.grading import grader as graders
from dstune.grading.grader import DETAILS, ERRORS, GraderError, Sample, Services
from dstune.serve.errors import ApiError

ABSENT = {
    "python": "the server runs no code of clients outside of a job",
    "score_model": "a model as judge is not there yet",
    "label_model": "a model as judge is not there yet",
}
"""OpenAI's grader types that `run` and `validate` do not support, with the reason."""


IN_JOBS = {
    "score_model": "a model as judge is not there yet",
    "label_model": "a model as judge is not there yet",
}
"""Grader types that reinforcement jobs do not support. The operator may allow `python` (`python_graders` of a model)."""


MOST_BYTES = 256_000
"""Size limit of a job's grader as JSON: it is stored in the database."""


def check_grader_of_job(grader: Any, at: str, absent: Mapping[str, str]) -> None:
    """Check a job's grader. absent: grader types that this job does not support in addition to `IN_JOBS`, with the reason. Raises
    ApiError that names the field."""
    if len(json.dumps(grader).encode()) > MOST_BYTES:
        message = f"Invalid {at}: must be at most {MOST_BYTES // 1000} kB of JSON."
        raise ApiError(400, message, param=at, code="invalid_grader")
    check_grader(grader, at, {**IN_JOBS, **absent})


def check_grader(grader: Any, at: str = "grader", absent: Mapping[str, str] = ABSENT) -> None:
    """Check a grader. Raises ApiError that names the field."""
    try:
        graders.check_grader(grader, at, absent=absent)
    except GraderError as error:
        raise ApiError(400, str(error), param=error.param, code=error.code) from None


def run_grader(grader: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """Run a grader that passed `check_grader`, and return the body of the answer."""
    began = time.perf_counter()
    graded = graders.grade(grader, sample, Services())
    errors: dict[str, Any] = {name: name in graded.errors for name in ERRORS}
    errors |= dict.fromkeys(DETAILS)
    scores = graded.rewards or {grader["name"]: graded.reward}
    return {
        "reward": graded.reward,
        "sub_rewards": graded.rewards,
        "metadata": {
            "name": grader["name"],
            "type": grader["type"],
            "errors": errors,
            "execution_time": time.perf_counter() - began,
            "scores": scores,
            "token_usage": None,
            "sampled_model_name": None,
        },
        "model_grader_token_usage_per_model": {},
    }
