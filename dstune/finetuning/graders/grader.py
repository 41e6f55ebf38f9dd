"""Graders as requests write them: checked, and run over a sample of a model and an item of a data set."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dstune.finetuning.fields import refuse_unknown
from dstune.finetuning.graders.formula import Formula, FormulaError
from dstune.finetuning.graders.similarity import FUZZY_CHARACTERS, METRICS, MOST_CHARACTERS, REFUSED
from dstune.serve.errors import ApiError

OPERATIONS = ("eq", "ne", "neq", "like", "ilike")
ABSENT = {
    "python": "the server runs no code of clients",
    "score_model": "a model as judge is not there yet",
    "label_model": "a model as judge is not there yet",
}
"""Types that OpenAI has and this server refuses, with the reason."""
MOST_GRADERS = 32
MOST_TEMPLATE = 100_000
MOST_WRITTEN = 16
"""Variables of which the text is kept for other templates."""
MOST_SECONDS = 10.0
"""In which the graders of a `multi` begin."""
MOST_RENDERED = 2_000_000
"""Characters of a template with its variables replaced."""

_VARIABLE = re.compile(r"\{\{([^{}]*)\}\}")
_OTHER = re.compile(r"\{\{[^{}]{0,60}")
"""What begins like one: neither looks behind a brace, so that a text of braces takes no longer than another one."""
_PATH = re.compile(r"\s*(item|sample)((?:\.[A-Za-z_][\w-]*|\[\d{1,6}\])*)\s*", re.ASCII)
_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+)\]", re.ASCII)

ERRORS = (
    "formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
    "invalid_variable_error", "other_error", "python_grader_server_error", "python_grader_runtime_error",
    "model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error",
)  # fmt: skip
DETAILS = (
    "python_grader_server_error_type",
    "python_grader_runtime_error_details",
    "model_grader_server_error_details",
)


class GraderFailed(Exception):
    """A grader has no score; `kind` is one of `ERRORS`."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Sample:
    """What is graded."""

    text: str
    item: Mapping[str, Any]

    @cached_property
    def values(self) -> Mapping[str, Any]:
        sample: dict[str, Any] = {"output_text": self.text}
        with contextlib.suppress(ValueError, RecursionError):
            sample["output_json"] = json.loads(self.text)
        return {"item": self.item, "sample": sample}

    @cached_property
    def written(self) -> dict[str, str]:
        """The texts of variables that were asked for already."""
        return {}


@dataclass
class Graded:
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    """Of the graders in a `multi`."""
    errors: set[str] = field(default_factory=set)


def check_grader(grader: Any, at: str = "grader", *, inside: bool = False) -> None:
    """inside: of a `multi`. Raises ApiError that names the field."""
    if not isinstance(grader, dict):
        raise _wrong(at, "must be an object")
    kind = grader.get("type")
    if isinstance(kind, str) and kind in ABSENT:
        message = f"Graders of the type {kind!r} are not supported: {ABSENT[kind]}."
        raise ApiError(400, message, param=f"{at}.type", code="unsupported_grader")
    if kind == "multi" and inside:
        raise _wrong(f"{at}.type", "a multi grader holds no other one")
    check = _CHECKS.get(kind) if isinstance(kind, str) else None
    if check is None:
        raise _wrong(f"{at}.type", f"must be one of {', '.join(_CHECKS)}")
    check(grader, at)


def run_grader(grader: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """The body of an answer for a grader that `check_grader` has let through."""
    began = time.perf_counter()
    graded = _grade_multi(grader, sample) if grader["type"] == "multi" else _grade_one(grader, sample)
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


def render(template: str, sample: Sample) -> str:
    """A template with its variables replaced; a value that is no text as JSON. Raises GraderFailed."""
    values, rest = sample.values, MOST_RENDERED - len(template)

    def value_of(match: re.Match[str]) -> str:
        path = _PATH.fullmatch(match[1])
        if path is None:
            raise GraderFailed("invalid_variable_error")
        value: Any = values[path[1]]
        if path[1] == "sample" and path[2].startswith(".output_json") and "output_json" not in value:
            raise GraderFailed("sample_parse_error")
        for name, index in _STEP.findall(path[2]):
            try:
                value = value[int(index)] if index else value[name]
            except (KeyError, IndexError, TypeError):
                raise GraderFailed("invalid_variable_error") from None
        nonlocal rest
        place = path[1] + path[2]
        text = value if isinstance(value, str) else sample.written.get(place)
        if text is None:
            text = json.dumps(value, ensure_ascii=False)
            if len(sample.written) < MOST_WRITTEN:
                sample.written[place] = text
        rest -= len(text)
        if rest < 0:
            raise GraderFailed("truncated_observation_error")
        return text

    return _VARIABLE.sub(value_of, template)


# -- checks of each type


def _check_common(grader: Mapping[str, Any], at: str, keys: tuple[str, ...]) -> None:
    refuse_unknown(grader, ("type", "name", *keys), at)
    name = grader.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise _wrong(f"{at}.name", "must be a text of 1 to 256 characters")


def _check_template(grader: Mapping[str, Any], name: str, at: str) -> None:
    text = grader.get(name)
    if not isinstance(text, str) or len(text) > MOST_TEMPLATE:
        raise _wrong(f"{at}.{name}", f"must be a text of at most {MOST_TEMPLATE} characters")
    if "{%" in text:
        raise _wrong(f"{at}.{name}", "a template has variables ({{ item.KEY }}), no statements ({% ... %})")
    for match in _OTHER.finditer(text):
        found = _VARIABLE.match(text, match.start())
        if found is None or _PATH.fullmatch(found[1]) is None:
            raise _wrong(
                f"{at}.{name}", f"{match[0]!r} begins no variable; {{{{ item.KEY }}}} and {{{{ sample.KEY }}}} are"
            )


def _check_string(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("input", "reference", "operation"))
    for name in ("input", "reference"):
        _check_template(grader, name, at)
    if grader.get("operation") not in OPERATIONS:
        raise _wrong(f"{at}.operation", f"must be one of {', '.join(OPERATIONS)}")


def _check_similarity(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("input", "reference", "evaluation_metric", "pass_threshold"))
    for name in ("input", "reference"):
        _check_template(grader, name, at)
    metric = grader.get("evaluation_metric")
    if isinstance(metric, str) and metric in REFUSED:
        message = f"The metric {metric!r} is not supported: {REFUSED[metric]}."
        raise ApiError(400, message, param=f"{at}.evaluation_metric", code="unsupported_metric")
    if not isinstance(metric, str) or metric not in METRICS:
        raise _wrong(f"{at}.evaluation_metric", f"must be one of {', '.join(METRICS)}")
    threshold = grader.get("pass_threshold")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise _wrong(f"{at}.pass_threshold", "must be a number")


def _check_multi(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("graders", "calculate_output"))
    graders = _named(grader.get("graders"), f"{at}.graders")
    for place, inner in graders.values():
        check_grader(inner, place, inside=True)
    formula = grader.get("calculate_output")
    if not isinstance(formula, str) or not formula.strip():
        raise _wrong(f"{at}.calculate_output", "must be a formula over the names of the graders")
    try:
        Formula(formula, graders)
    except FormulaError as error:
        raise _wrong(f"{at}.calculate_output", str(error), code="formula_parse_error") from None


_CHECKS = {"string_check": _check_string, "text_similarity": _check_similarity, "multi": _check_multi}


def _named(graders: Any, at: str) -> dict[str, tuple[str, Any]]:
    """The graders of a `multi` by their names, each with its place: a map, a list or a single one. Raises ApiError."""
    if isinstance(graders, dict) and not isinstance(graders.get("type"), str):
        found = {name: (f"{at}.{name[:60]}", grader) for name, grader in graders.items()}
    else:
        given = graders if isinstance(graders, list) else [graders]
        found = {}
        for index, grader in enumerate(given):
            place = f"{at}[{index}]" if isinstance(graders, list) else at
            name = grader.get("name") if isinstance(grader, dict) else None
            if not isinstance(name, str):
                raise _wrong(place, "must be a grader with a name")
            if name in found:
                raise _wrong(f"{place}.name", "another grader has this name")
            found[name] = (place, grader)
    if not 0 < len(found) <= MOST_GRADERS:
        raise _wrong(at, f"must be 1 to {MOST_GRADERS} graders")
    return found


def _wrong(param: str, reason: str, code: str = "invalid_grader") -> ApiError:
    return ApiError(400, f"Invalid {param}: {reason}.", param=param, code=code)


# -- runs


def _grade_one(grader: Mapping[str, Any], sample: Sample) -> Graded:
    try:
        return Graded(_score(grader, sample))
    except GraderFailed as failure:
        return Graded(errors={failure.kind})


def _score(grader: Mapping[str, Any], sample: Sample) -> float:
    text, reference = render(grader["input"], sample), render(grader["reference"], sample)
    if grader["type"] == "text_similarity":
        most = FUZZY_CHARACTERS if grader["evaluation_metric"] == "fuzzy_match" else MOST_CHARACTERS
        if max(len(text), len(reference)) > most:
            raise GraderFailed("truncated_observation_error")
        return METRICS[grader["evaluation_metric"]](text, reference)
    match grader["operation"]:
        case "eq":
            found = text == reference
        case "ne" | "neq":
            found = text != reference
        case "like":
            found = reference in text
        case _:
            found = reference.casefold() in text.casefold()
    return float(found)


def _grade_multi(grader: Mapping[str, Any], sample: Sample) -> Graded:
    graded, ends = Graded(), time.monotonic() + MOST_SECONDS
    for name, (_, inner) in _named(grader["graders"], "").items():
        late = Graded(errors={"unresponsive_reward_error"})
        one = _grade_one(inner, sample) if time.monotonic() < ends else late
        graded.rewards[name] = one.reward
        graded.errors |= one.errors
    try:
        graded.reward = Formula(grader["calculate_output"], graded.rewards)(graded.rewards)
    except FormulaError:
        graded.errors.add("formula_parse_error")
    return graded
