"""Checks graders in the format of OpenAI's fine-tuning API, and runs them on a model's sample and an item of a data set."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from dstune.grading.formula import Formula, FormulaError
from dstune.grading.similarity import FUZZY_CHARACTERS, METRICS, MOST_CHARACTERS, REFUSED

OPERATIONS = ("eq", "ne", "neq", "like", "ilike")
ABSENT: Mapping[str, str] = {"label_model": "score_model gives a number, which a label would have to become"}
"""Types of OpenAI that dstune does not support, with the reason."""
MOST_GRADERS = 32
MOST_SOURCE = 256_000
"""Bytes of a program."""
SAMPLING = ("seed", "top_p", "temperature", "max_completions_tokens", "reasoning_effort")
"""Of a model that grades, spelt as the API spells them."""
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


class GraderError(ValueError):
    """Raised for a malformed grader. param: the field; code: the API's error code."""

    def __init__(self, message: str, param: str, code: str = "invalid_grader"):
        super().__init__(message)
        self.param, self.code = param, code


class GraderFailed(Exception):
    """Raised if a grader cannot compute a score; `kind` is one of `ERRORS`."""

    def __init__(self, kind: str, details: str = ""):
        super().__init__(f"{kind}: {details}" if details else kind)
        self.kind, self.details = kind, details


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
        """The texts of variables that were already rendered."""
        return {}


@dataclass
class Graded:
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    """Of the graders in a `multi`."""
    errors: dict[str, str] = field(default_factory=dict)
    """What failed, of `ERRORS`, with details where there are any."""


@dataclass(frozen=True)
class Services:
    """What graders need in addition to the sample, if it is available."""

    run_python: Callable[[str, Sample], float] | None = None
    """Returns the score of a program's `grade(sample, item)`. Raises GraderFailed."""
    ask_model: Callable[[Mapping[str, Any], list[dict[str, str]]], float] | None = None
    """Returns the score that a grader's model gives for these messages. Raises GraderFailed."""


def check_grader(grader: Any, at: str = "grader", *, absent: Mapping[str, str] = ABSENT, inside: bool = False) -> None:
    """Refuse a malformed grader.

    absent: types that are refused, with the reason. inside: whether the grader is part of a `multi`. Raises a GraderError that
    names the field.
    """
    if not isinstance(grader, dict):
        raise _wrong(at, "must be an object")
    kind = grader.get("type")
    if isinstance(kind, str) and kind in absent:
        message = f"Graders of the type {kind!r} are not supported: {absent[kind]}."
        raise GraderError(message, f"{at}.type", "unsupported_grader")
    if kind == "multi" and inside:
        raise _wrong(f"{at}.type", "a multi grader holds no other one")
    check = _CHECKS.get(kind) if isinstance(kind, str) else None
    if check is None:
        raise _wrong(f"{at}.type", f"must be one of {', '.join(name for name in _CHECKS if name not in absent)}")
    check(grader, at)
    if kind == "multi":
        for place, inner in named_graders(grader["graders"], f"{at}.graders").values():
            check_grader(inner, place, absent=absent, inside=True)


def grade(grader: Mapping[str, Any], sample: Sample, services: Services) -> Graded:
    """Return the score of a grader that `check_grader` has accepted; 0 if it fails, with the reason in `errors`."""
    if grader["type"] == "multi":
        return _grade_multi(grader, sample, services)
    return _grade_one(grader, sample, services)


def kinds_in(grader: Mapping[str, Any]) -> set[str]:
    """Return the types of a grader and of the graders inside it."""
    if grader["type"] != "multi":
        return {grader["type"]}
    return {"multi"} | {inner["type"] for _, inner in named_graders(grader["graders"], "").values()}


def render(template: str, sample: Sample) -> str:
    """Return a template with its variables replaced; values that are not texts become JSON. Raises GraderFailed."""
    values, characters_left = sample.values, MOST_RENDERED - len(template)

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
                raise GraderFailed("invalid_variable_error", path[1] + path[2]) from None
        nonlocal characters_left
        place = path[1] + path[2]
        text = value if isinstance(value, str) else sample.written.get(place)
        if text is None:
            text = json.dumps(value, ensure_ascii=False)
            if len(sample.written) < MOST_WRITTEN:
                sample.written[place] = text
        characters_left -= len(text)
        if characters_left < 0:
            raise GraderFailed("truncated_observation_error")
        return text

    return _VARIABLE.sub(value_of, template)


# -- checks of each type


def _check_common(grader: Mapping[str, Any], at: str, keys: tuple[str, ...]) -> None:
    _refuse_unknown(grader, ("type", "name", *keys), at)
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
        match_of_variable = _VARIABLE.match(text, match.start())
        if match_of_variable is None or _PATH.fullmatch(match_of_variable[1]) is None:
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
        raise GraderError(message, f"{at}.evaluation_metric", "unsupported_metric")
    if not isinstance(metric, str) or metric not in METRICS:
        raise _wrong(f"{at}.evaluation_metric", f"must be one of {', '.join(METRICS)}")
    threshold = grader.get("pass_threshold")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise _wrong(f"{at}.pass_threshold", "must be a number")


def _check_multi(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("graders", "calculate_output"))
    graders = named_graders(grader.get("graders"), f"{at}.graders")
    formula = grader.get("calculate_output")
    if not isinstance(formula, str) or not formula.strip():
        raise _wrong(f"{at}.calculate_output", "must be a formula over the names of the graders")
    try:
        Formula(formula, graders)
    except FormulaError as error:
        raise _wrong(f"{at}.calculate_output", str(error), code="formula_parse_error") from None


def _check_python(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("source", "image_tag"))
    source = grader.get("source")
    if not isinstance(source, str) or not 0 < len(source.encode()) < MOST_SOURCE:
        raise _wrong(f"{at}.source", f"must be a program of less than {MOST_SOURCE // 1000} kB")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _wrong(f"{at}.source", f"is no Python: {error}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "grade" for node in tree.body):
        raise _wrong(f"{at}.source", "must define grade(sample, item)")


def _check_model(grader: Mapping[str, Any], at: str) -> None:
    _check_common(grader, at, ("model", "input", "range", "sampling_params"))
    if not isinstance(grader.get("model"), str) or not 0 < len(grader["model"]) <= 256:
        raise _wrong(f"{at}.model", "must be the name of a model")
    messages = grader.get("input")
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_GRADERS:
        raise _wrong(f"{at}.input", f"must be a list of 1 to {MOST_GRADERS} messages")
    for place, message in enumerate(messages):
        where = f"{at}.input[{place}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise _wrong(where, "must be a message with a role and a content")
        _refuse_unknown(message, ("type", "role", "content"), where)
        _check_template({"content": _content(message)}, "content", where)
    low, high = grader.get("range", (0, 1)) if _is_pair(grader.get("range", [0, 1])) else (1, 0)
    if not low < high:
        raise _wrong(f"{at}.range", "must be two numbers, the smaller one first")
    parameters = grader.get("sampling_params", {})
    if not isinstance(parameters, dict):
        raise _wrong(f"{at}.sampling_params", "must be an object")
    _refuse_unknown(parameters, SAMPLING, f"{at}.sampling_params")


def _content(message: Mapping[str, Any]) -> Any:
    """Return the text of a message, which may stand in an object (`{"type": "input_text", "text": ...}`)."""
    content = message.get("content")
    return content.get("text") if isinstance(content, dict) else content


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
    )


_CHECKS = {
    "string_check": _check_string,
    "text_similarity": _check_similarity,
    "score_model": _check_model,
    "python": _check_python,
    "multi": _check_multi,
}


def named_graders(graders: Any, at: str) -> dict[str, tuple[str, Any]]:
    """Return the graders of a `multi` by their names, each with its place: a map, a list or a single one. Raises GraderError."""
    if isinstance(graders, dict) and not isinstance(graders.get("type"), str):
        grader_by_name = {name: (f"{at}.{name[:60]}", grader) for name, grader in graders.items()}
    else:
        grader_list = graders if isinstance(graders, list) else [graders]
        grader_by_name = {}
        for index, grader in enumerate(grader_list):
            place = f"{at}[{index}]" if isinstance(graders, list) else at
            name = grader.get("name") if isinstance(grader, dict) else None
            if not isinstance(name, str):
                raise _wrong(place, "must be a grader with a name")
            if name in grader_by_name:
                raise _wrong(f"{place}.name", "another grader has this name")
            grader_by_name[name] = (place, grader)
    if not 0 < len(grader_by_name) <= MOST_GRADERS:
        raise _wrong(at, f"must be 1 to {MOST_GRADERS} graders")
    return grader_by_name


def _wrong(param: str, reason: str, code: str = "invalid_grader") -> GraderError:
    return GraderError(f"Invalid {param}: {reason}.", param, code)


def _refuse_unknown(value: Mapping[str, Any], accepted: Sequence[str], at: str) -> None:
    unknown = sorted(set(map(str, value)) - set(accepted))
    if unknown:
        param = f"{at}.{unknown[0][:80]}"
        similar = get_close_matches(unknown[0][:80], accepted, n=1)
        hint = f"Did you mean {f'{at}.{similar[0]}'!r}?" if similar else f"The fields here are {', '.join(accepted)}."
        raise GraderError(f"Unknown field: {param!r}. {hint}", param, "unknown_parameter")


# -- runs


def _grade_one(grader: Mapping[str, Any], sample: Sample, services: Services) -> Graded:
    try:
        score = _score(grader, sample, services)
    except GraderFailed as failure:
        return Graded(errors={failure.kind: failure.details})
    return Graded(score)


def _score(grader: Mapping[str, Any], sample: Sample, services: Services) -> float:
    if grader["type"] == "python":
        if services.run_python is None:
            raise GraderFailed("python_grader_server_error", "there is no sandbox")
        return services.run_python(grader["source"], sample)
    if grader["type"] == "score_model":
        if services.ask_model is None:
            raise GraderFailed("model_grader_server_error", "there is no server of models")
        messages = [
            {"role": message["role"], "content": render(_content(message), sample)} for message in grader["input"]
        ]
        low, high = grader.get("range", (0.0, 1.0))
        return min(high, max(low, services.ask_model(grader, messages)))
    text, reference = render(grader["input"], sample), render(grader["reference"], sample)
    if grader["type"] == "text_similarity":
        most = FUZZY_CHARACTERS if grader["evaluation_metric"] == "fuzzy_match" else MOST_CHARACTERS
        if max(len(text), len(reference)) > most:
            raise GraderFailed("truncated_observation_error")
        return METRICS[grader["evaluation_metric"]](text, reference)
    match grader["operation"]:
        case "eq":
            is_match = text == reference
        case "ne" | "neq":
            is_match = text != reference
        case "like":
            is_match = reference in text
        case _:
            is_match = reference.casefold() in text.casefold()
    return float(is_match)


def _grade_multi(grader: Mapping[str, Any], sample: Sample, services: Services) -> Graded:
    graded, ends = Graded(), time.monotonic() + MOST_SECONDS
    for name, (_, inner) in named_graders(grader["graders"], "").items():
        # Only computations in this process are limited here: programs and models have their own limits.
        waits = inner["type"] in ("python", "score_model")
        late = Graded(errors={"unresponsive_reward_error": ""})
        inner_grade = _grade_one(inner, sample, services) if waits or time.monotonic() < ends else late
        graded.rewards[name] = inner_grade.reward
        graded.errors |= inner_grade.errors
    try:
        graded.reward = Formula(grader["calculate_output"], graded.rewards)(graded.rewards)
    except FormulaError as error:
        graded.errors["formula_parse_error"] = str(error)
    return graded
