"""Reward models: a model in this rank, or a server that has one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.tasks.reinforcement.grade import post
from dstune.tasks.reinforcement.reward_process import JUDGE_KEY

Conversation = list[dict[str, Any]]
RewardModel = Callable[[Sequence[Conversation]], list[float | None]]
"""Scores conversations that end with an answer; None for one that it cannot score."""
ROWS_AT_ONCE = 8


def load_reward_model(path: str, model: ModelConfig, seconds: float) -> RewardModel:
    """The reward model at `path` (see `task.reward_models`). seconds: for one answer of a server.

    Raises:
        UserError: there is none.
    """
    if path.startswith(("http://", "https://")):
        return _of_server(path, seconds)
    return _in_this_rank(path, model)


def _of_server(path: str, seconds: float) -> RewardModel:
    address, _, name = path.partition("#")

    def score(conversations: Sequence[Conversation]) -> list[float | None]:
        body = {"model": name, "messages": list(conversations)}
        try:
            answer = post(f"{address.rstrip('/')}/rewards", body, seconds, os.environ.get(JUDGE_KEY, ""))
            scores = {item["index"]: float(item["score"]) for item in answer["data"]}
            return [scores[number] for number in range(len(conversations))]
        except (OSError, ValueError, LookupError, TypeError):
            return [None] * len(conversations)

    return score


def _in_this_rank(path: str, model: ModelConfig) -> RewardModel:
    from dstune.inference.load import find, load

    is_run = (Path(path) / "run.yaml").is_file()
    own = ModelConfig(path=path, trust_remote_code=model.trust_remote_code)
    try:
        expected = find(own, "last", [] if is_run else ["task=reward"])
    except UserError as error:
        raise UserError([replace(problem, where="task.reward_models") for problem in error.problems]) from None
    if expected.config.task.name != "reward":
        reason = f"it is a model for task={expected.config.task.name}"
        raise UserError(Problem("task.reward_models", reason, "a run of task=reward", path))
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        predictor = load(expected, Path(scratch))
    question = predictor.question_class(expected.config.task, predictor.labels, expected.config.data)
    column = question.mapping.get("messages", "messages")

    def score(conversations: Sequence[Conversation]) -> list[float | None]:
        rows = [question.query({column: turns}, "completion") for turns in conversations]
        answers = predictor.answers(rows, ROWS_AT_ONCE)
        return [answer.get("score") for answer in answers]

    return score


def conversation_of(prompt: Any, completion: str, columns: Mapping[str, Any]) -> Conversation:
    """What a reward model reads: the prompt's messages and the answer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system := columns.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    return [*messages, {"role": "assistant", "content": completion}]
