"""Score completions with rewards, graders, reward models and environments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dstune.config.schema import RunConfig
from dstune.data.prepared import Split
from dstune.generation.completions import Completion
from dstune.protocols import REWARDS
from dstune.tasks.reinforcement.config import OVERLONG, ReinforcementConfig
from dstune.tasks.reinforcement.outages import Failure, Patience
from dstune.tasks.reinforcement.records import Scored, identity_of, place_of
from dstune.tasks.reinforcement.reward_model import RewardModel, conversation_of, load_reward_model
from dstune.tasks.reinforcement.reward_process import RewardProcess

NOT_COLUMNS = {"prompt", "prompts", "completions", "completion_ids"}


class Scorer:
    """Scores the completions of this rank. Raises UserError for a missing grader or reward model."""

    def __init__(self, config: RunConfig, split: Split):
        assert isinstance(config.task, ReinforcementConfig)
        self._task, self._split = config.task, split
        self.names = self._task.reward_names
        self.process = RewardProcess(self._task)
        seconds = self._task.reward_seconds
        self._models: dict[str, RewardModel] = {
            name: load_reward_model(path, config.model, seconds) for name, path in self._task.model_paths.items()
        }
        self._rows: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self.patience = Patience(self._task.reward_retry_seconds)
        self.logged: dict[str, list[float]] = {}
        """The metrics that rewards logged since this was last emptied, by name."""

    def columns_of(self, prompt: int) -> dict[str, Any]:
        """Return the columns of a prompt's row."""
        return self._row(prompt)[0]

    def prompt_ids(self, prompt: int) -> list[int]:
        """Return the tokens of a prompt."""
        return self._row(prompt)[1]

    def _row(self, prompt: int) -> tuple[dict[str, Any], list[int]]:
        """Return the columns and the tokens of a prompt. They are kept for its other completions, because reading a row of a table
        takes 0.4 ms."""
        if prompt not in self._rows:
            row = self._split.table[self._split.row(prompt)]
            self._rows[prompt] = json.loads(row["columns"]), row["input_ids"]
        return self._rows[prompt]

    def forget_rows(self) -> None:
        """Forget the kept rows; called when the prompts of a step are done."""
        self._rows.clear()

    def question_of(self, prompt: int) -> str:
        """Return the text of a prompt; for a conversation, that of its last message."""
        question = self.columns_of(prompt).get("prompt")
        return question if isinstance(question, str) else str((question or [{}])[-1].get("content", ""))

    def score(
        self,
        completed: Sequence[Sequence[Scored]],
        scored_before: Mapping[str, Scored],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the scores of the completions.

        scored_before: completions that an earlier launch scored at this step, by `identity_of`. Their scores are reused, because a
        reward that asks a judge or a clock might answer differently. state: the values of `trainer_state` in TRL's functions.
        """
        for batch in completed:
            new = []
            for scored in batch:
                earlier = scored_before.get(identity_of(scored.completion))
                if earlier is None:
                    new.append(scored)
                else:
                    scored.scores, scored.extra, scored.failures = earlier.scores, earlier.extra, earlier.failures
            if new:
                self._score_batch(new, state or {})

    def _score_batch(self, batch: Sequence[Scored], state: Mapping[str, Any]) -> None:
        """Append each reward's score of each completion. A completion that is lost, since its environment failed, gets none."""
        whole = [scored for scored in batch if not scored.failures]
        for scored in batch:
            if scored.failures:
                scored.scores = [None] * len(self.names)
        for name in self.names if whole else ():
            if self._task.overlong_tokens and name == OVERLONG:
                scores: list[float | Failure | None] = [overlong_score(self._task, scored) for scored in whole]
            else:
                scores = self.patience.ask(whole, partial(self._ask, name, state))
            for scored, score in zip(whole, scores, strict=True):
                if isinstance(score, float | int) and not math.isfinite(score):
                    score = Failure(f"it returned {score}") if math.isinf(score) else None
                if isinstance(score, Failure):
                    scored.failures[name] = score.reason
                scored.scores.append(None if isinstance(score, Failure) else score)

    def _ask(self, name: str, state: Mapping[str, Any], batch: Sequence[Scored]) -> list[float | Failure | None]:
        """Return a reward's scores, or why it failed; None where it does not apply. Stores what it logged."""
        rows = [self.columns_of(scored.completion.prompt) for scored in batch]
        prompts = [row.get("prompt") for row in rows]
        if model := self._models.get(name):
            answers = zip(prompts, batch, rows, strict=True)
            return list(model([conversation_of(prompt, last_answer(scored), row) for prompt, scored, row in answers]))
        columns = {
            column: [row.get(column) for row in rows]
            for column in sorted({column for row in rows for column in row} - NOT_COLUMNS)
        }
        keys = [place_of(scored.completion) for scored in batch] if self._task.environment else []
        reads_texts = name in self._task.grader_files or (name in REWARDS and REWARDS[name].reads_texts)
        completions = [last_answer(scored) if reads_texts else scored.answer for scored in batch]
        ids = [written_ids(scored.completion) if reads_texts else scored.completion.ids for scored in batch]
        result = self.process(name, prompts, completions, ids, columns, state=state, environments=keys)
        for metric, value in result.metrics.items():
            self.logged.setdefault(metric, []).append(value)
        for column, values in result.extra.items():
            for scored, value in zip(batch, values, strict=True):
                scored.extra[column] = value
        return [result.failures.get(number, score) for number, score in enumerate(result.scores)]

    def close(self) -> None:
        self.process.close()


def overlong_score(task: ReinforcementConfig, scored: Scored) -> float | None:
    """Return the soft overlong punishment of a completion: 0 up to `max_new_tokens - overlong_tokens` tokens, then falling evenly
    to -1 (Yu et al. 2025, DAPO, arXiv:2503.14476, equation 13). None if no other reward scored it: its length alone would be
    compared with the others' whole rewards."""
    if all(score is None for score in scored.scores):
        return None
    excess = len(scored.completion.ids) - (task.max_new_tokens - task.overlong_tokens)
    return -min(1.0, max(0, excess) / task.overlong_tokens)


def last_answer(scored: Scored) -> str:
    """Return the last text that the model wrote in a completion, which may have several turns."""
    written = [message["content"] for message in scored.messages if message["role"] == "assistant"]
    return written[-1] if written else scored.text


def written_ids(completion: Completion) -> list[int]:
    """Return the tokens of a completion that the model wrote, without those of the results of tools."""
    if not completion.read:
        return completion.ids
    read = set(completion.read)
    return [token for place, token in enumerate(completion.ids) if place not in read]
