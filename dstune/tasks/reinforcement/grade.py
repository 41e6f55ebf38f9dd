"""Uses graders of the fine-tuning API, each from a JSON file, as rewards."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dstune.core.api_client import Address, ApiClient
from dstune.core.confinement.table import PROGRAM
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.grading.grader import GraderError, GraderFailed, Sample, Services, check_grader, grade, kinds_in
from dstune.grading.model_grader import grading_request, read_score
from dstune.grading.sandbox import AT_ONCE, run_program
from dstune.tasks.reinforcement.outages import Failure, may_pass

PYTHON_GRADER = """\
import json, os, sys
_answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
_given = json.load(sys.stdin)
_scope = {"__name__": "grader"}
exec(compile(_given["source"], "<grader>", "exec"), _scope)
_grade = _scope["grade"](_given["sample"], _given["item"])
_answers.write(json.dumps({"score": float(_grade)}))
_answers.flush()
"""


class JudgeUnavailable(GraderFailed):
    """Raised if the judge did not answer, but may answer later."""


class Graders:
    """Scores completions with the graders of a run, which it knows by name."""

    def __init__(
        self,
        graders: Mapping[str, Mapping[str, Any]],
        seconds: float = 10.0,
        memory_gib: float = 2.0,
        judge: str | None = None,
        judge_key: str = "",
    ):
        """seconds, memory_gib: limits of one program. judge: address of the server with the models of `score_model` graders."""
        self._graders = graders
        self.limits = replace(PROGRAM, seconds=seconds, memory_bytes=int(memory_gib * 2**30))
        self._judge, self._judge_key = judge, judge_key

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._graders)

    def score(
        self, name: str, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | Failure]:
        """Return for each completion its grade, or why the grader failed."""
        grader = self._graders[name]
        items = [{column: values[number] for column, values in columns.items()} for number in range(len(completions))]
        samples = [Sample(text, item) for text, item in zip(completions, items, strict=True)]
        if not asks_others(grader):
            return [self._score(grader, sample) for sample in samples]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda sample: self._score(grader, sample), samples))

    def _score(self, grader: Mapping[str, Any], sample: Sample) -> float | Failure:
        outages: list[JudgeUnavailable] = []

        def ask_model(model_grader: Mapping[str, Any], messages: list[dict[str, str]]) -> float:
            try:
                return self.ask_model(model_grader, messages)
            except JudgeUnavailable as error:
                outages.append(error)
                raise

        graded = grade(grader, sample, Services(self.run_python, ask_model))
        failed = [(kind, details) for kind, details in graded.errors.items() if is_failure(kind, details)]
        if not failed:
            return graded.reward
        kind, details = failed[0]
        return Failure(f"{kind}: {details}" if details else kind, bool(outages))

    def run_python(self, source: str, sample: Sample) -> float:
        """Run a Python grader in the sandbox and return its score. Raises GraderFailed."""
        arguments = {"source": source, "sample": sample.values["sample"], "item": dict(sample.item)}
        try:
            outcome = run_program(PYTHON_GRADER, json.dumps(arguments), self.limits)
        except (OSError, RuntimeError) as error:
            raise GraderFailed("python_grader_server_error", str(error)) from None
        try:
            if outcome.failure:
                raise GraderFailed("python_grader_runtime_error", outcome.failure)
            return float(json.loads(outcome.output)["score"])
        except (ValueError, KeyError, TypeError):
            raise GraderFailed("python_grader_runtime_error", "it returned no number") from None

    def ask_model(self, grader: Mapping[str, Any], messages: list[dict[str, str]]) -> float:
        """Ask a model for a score and return it. Raises GraderFailed; JudgeUnavailable if another attempt may succeed."""
        if self._judge is None:
            raise GraderFailed("model_grader_server_error", "task.judge names no server")
        body = grading_request(grader, messages)
        try:
            answer = post(f"{self._judge}/v1/chat/completions", body, self.limits.seconds, self._judge_key)
            text = answer["choices"][0]["message"]["content"]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            kind = JudgeUnavailable if may_pass(error) else GraderFailed
            raise kind("model_grader_server_error", f"{type(error).__name__}: {error}"[:200]) from None
        return read_score(text)


def asks_others(grader: Mapping[str, Any]) -> bool:
    """Return whether `grader`, or a grader inside of it, runs a program or asks a model."""
    return bool(kinds_in(grader) & {"python", "score_model"})


def is_failure(kind: str, details: str) -> bool:
    """Return whether an error leaves a completion without a grade. Errors that are the completion's fault give the grade 0 instead:
    it is not JSON, or lacks the fields that the grader compares."""
    return kind != "sample_parse_error" and not (kind == "invalid_variable_error" and details.startswith("sample"))


def post(address: str, body: Mapping[str, Any], seconds: float, key: str = "") -> Any:
    """Post `body` as JSON and return the server's JSON answer. Raises OSError, http.client.HTTPException or ValueError."""
    return parse_json(_client_of(address, key).ask_once("", body, seconds))


@lru_cache(maxsize=8)
def _client_of(address: str, key: str) -> ApiClient:
    return ApiClient(Address(address, key, most_bytes=2**24))


def read_grader(path: str) -> dict[str, Any]:
    """Read and check the grader in the file `path`. Raises UserError."""
    fix = "a JSON file with one grader of the fine-tuning API: docs/reinforcement.md has examples"
    try:
        grader = json.loads(Path(path).read_text(encoding="utf-8"))
        check_grader(grader)
    except FileNotFoundError:
        raise UserError(Problem("task.graders", "there is no such file", fix, path)) from None
    except GraderError as error:
        raise UserError(Problem("task.graders", f"{path}: {error}", fix, path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(Problem("task.graders", f"{path} is no JSON: {error}", fix, path)) from None
    assert isinstance(grader, dict)
    return grader
