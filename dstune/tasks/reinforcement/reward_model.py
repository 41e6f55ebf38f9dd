"""Reward models: a model in this rank, or a server that has one."""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import urllib.error
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.data.problems import RowError
from dstune.tasks.reinforcement.grade import post
from dstune.tasks.reinforcement.outages import LONGEST_REASON, Failure, may_pass
from dstune.tasks.reinforcement.reward_process import JUDGE_KEY

Conversation = list[dict[str, Any]]
ROWS_AT_ONCE = 8
ASKED_AT_ONCE = 64
"""Conversations of one request: `MOST_CONVERSATIONS` of `dstune serve`."""


class RewardModel(ABC):
    """Scores conversations that end with an answer."""

    @abstractmethod
    def __call__(self, conversations: Sequence[Conversation]) -> list[float | Failure]:
        """Return for each conversation its score, or why it has none."""


def load_reward_model(path: str, model: ModelConfig, seconds: float) -> RewardModel:
    """Return the reward model at `path` (see `task.reward_models`); one in memory is shared. seconds: for one answer of a server.

    Raises:
        UserError: there is none.
    """
    if path.startswith(("http://", "https://")):
        return RemoteRewardModel(path, seconds)
    return _load_local(path, model.trust_remote_code)


class RemoteRewardModel(RewardModel):
    """A reward model on a server such as `dstune serve`."""

    def __init__(self, path: str, seconds: float):
        """path: `ADDRESS#NAME`."""
        self._address, _, self._name = path.partition("#")
        self._seconds = seconds

    def __call__(self, conversations: Sequence[Conversation]) -> list[float | Failure]:
        scores: list[float | Failure] = []
        for start in range(0, len(conversations), ASKED_AT_ONCE):
            scores += self._ask(conversations[start : start + ASKED_AT_ONCE])
        return scores

    def _ask(self, conversations: Sequence[Conversation]) -> list[float | Failure]:
        body = {"model": self._name, "messages": list(conversations)}
        try:
            address = f"{self._address.rstrip('/')}/rewards"
            answer = post(address, body, self._seconds, os.environ.get(JUDGE_KEY, ""))
            scores = {item["index"]: float(item["score"]) for item in answer["data"]}
            return [scores[number] for number in range(len(conversations))]
        except urllib.error.HTTPError as error:
            failure = Failure(f"the server answered {error.code}: {_message_of(error)}", may_pass(error))
            if error.code == 400 and len(conversations) > 1:  # one of them is at fault, and the others have scores
                return [score for conversation in conversations for score in self._ask([conversation])]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            reason = f"the server gave no scores: {type(error).__name__}: {error}"[:LONGEST_REASON]
            failure = Failure(reason, may_pass(error))
        return [failure] * len(conversations)


def _message_of(error: urllib.error.HTTPError) -> str:
    """Return what a server says with an error."""
    text = ""
    with suppress(OSError, http.client.HTTPException):
        text = error.read(2**16).decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return text[:LONGEST_REASON]


class LocalRewardModel(RewardModel):
    """A model of `task=reward` in this rank's memory."""

    def __init__(self, predictor: Any):
        self._predictor = predictor
        self._row_reader = predictor.question_class(predictor.config.task, predictor.labels, predictor.config.data)
        self._column = self._row_reader.mapping.get("messages", "messages")

    def __call__(self, conversations: Sequence[Conversation]) -> list[float | Failure]:
        scores: list[float | Failure] = [Failure("it has no score")] * len(conversations)
        rows = {}
        for number, turns in enumerate(conversations):
            try:
                rows[number] = self._row_reader.query({self._column: turns}, "completion")
            except RowError as error:  # an answer without text
                scores[number] = Failure(str(error))
        answers = self._predictor.answers(list(rows.values()), ROWS_AT_ONCE) if rows else []
        for number, answer in zip(rows, answers, strict=True):
            score = answer.get("score")
            scores[number] = Failure(answer.get("problem", "it has no score")) if score is None else score
        return scores


_loaded: WeakValueDictionary[tuple[str, bool], LocalRewardModel] = WeakValueDictionary()
"""Loaded models, by path and trust of remote code, which training and its evaluations share."""


def _load_local(path: str, trust_remote_code: bool) -> RewardModel:
    from dstune.inference.load import find, load

    if (shared := _loaded.get((path, trust_remote_code))) is not None:
        return shared
    is_run = (Path(path) / "run.yaml").is_file()
    source = ModelConfig(path=path, trust_remote_code=trust_remote_code)
    try:
        request = find(source, "last", [] if is_run else ["task=reward"])
    except UserError as error:
        raise UserError([replace(problem, where="task.reward_models") for problem in error.problems]) from None
    if request.config.task.name != "reward":
        reason = f"it is a model for task={request.config.task.name}"
        raise UserError(Problem("task.reward_models", reason, "a run of task=reward", path))
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        loaded = _loaded[path, trust_remote_code] = LocalRewardModel(load(request, Path(scratch)))
    return loaded


def conversation_of(prompt: Any, completion: str, columns: Mapping[str, Any]) -> Conversation:
    """Return the conversation that a reward model scores: the prompt's messages and the answer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system := columns.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    return [*messages, {"role": "assistant", "content": completion}]
