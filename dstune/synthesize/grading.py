"""Scores drafts: by dstune's rewards in a separate process, or by a reward model at an address."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core.api_client import ApiClient
from dstune.core.errors import Problem, UserError
from dstune.protocols import REWARDS
from dstune.synthesize import options
from dstune.synthesize.requests import Draft
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.reward_process import RewardProcess

GRADER_SECONDS = 120.0
"""Time limit for one grader to score all drafts of a call."""
AT_ONCE = 64
"""Drafts per call."""


@dataclass
class Graders:
    """The graders by name, with the lowest score that a draft may have."""

    least: dict[str, float | None]
    reward_model: ApiClient | None = None
    reward_model_name: str = ""
    reward_least: float | None = None
    grader_files: list[str] = field(default_factory=list)
    """Files with graders of the fine-tuning API, which are named after the files."""
    tokenizer: Any = None
    """Counts the tokens of answers; None if no `--tokenizer` is given."""
    _process: RewardProcess | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Graders:
        """Return the graders that the flags name. Raises UserError for names that are not rewards, rewards that need a tokenizer,
        and a tokenizer that cannot be loaded."""
        least: dict[str, float | None] = {}
        graders: list[str] = []
        problems = []
        for word in arguments.grade:
            name, equals, value = word.partition("=")
            if name.endswith(".json") and Path(name).is_file():
                graders.append(name)
                name = Path(name).stem
            elif name not in REWARDS:
                problems.append(Problem("--grade", "there is no such reward", f"one of {', '.join(REWARDS)}", name))
            try:
                least[name] = float(value) if equals else None
            except ValueError:
                problems.append(Problem("--grade", "the least score is no number", f"--grade {name}=0.5", word))
            if name in REWARDS and REWARDS[name].reads_tokens and arguments.tokenizer is None:
                reason = "this reward counts tokens"
                problems.append(Problem("--tokenizer", reason, "--tokenizer PATH, of the model to be trained", name))
        if problems:
            raise UserError(problems)
        tokenizer = None
        if arguments.tokenizer is not None:
            from dstune.core.tokenizers import open_tokenizer

            tokenizer = open_tokenizer(arguments.tokenizer, where="--tokenizer")
        model = None
        if arguments.reward_url is not None:
            model = ApiClient(options.address_of(arguments, "--reward-url", arguments.reward_url))
        return cls(least, model, arguments.reward_model or "", arguments.reward_least, graders, tokenizer)

    def score(self, name: str, drafts: Sequence[Draft]) -> list[float | None]:
        """Score drafts by the reward `name`. Raises UserError if it can score none of them."""
        if self._process is None:
            rewards = [name for name in self.least if name in REWARDS]
            config = ReinforcementConfig(rewards=rewards, graders=self.grader_files, reward_seconds=GRADER_SECONDS)
            self._process = RewardProcess(config)
        scores: list[float | None] = []
        for start in range(0, len(drafts), AT_ONCE):
            some = drafts[start : start + AT_ONCE]
            names = sorted(
                {column for draft in some for column in draft.columns} - {"prompt", "prompts", "completions"}
            )
            columns = {column: [draft.columns.get(column) for draft in some] for column in names}
            prompts = [draft.prompt for draft in some]
            answers = [draft.answer for draft in some]
            scores += self._process(name, prompts, answers, self._tokens_of(answers), columns).scores
        if drafts and all(score is None for score in scores):
            needed = ", ".join(REWARDS[name].columns) if name in REWARDS else ""
            reason = f"it could score no answer: {self._process.last_error or 'it returned None'}"
            fix = "give --tokenizer if it reads completion_ids" if self.tokenizer is None else "correct the reward"
            raise UserError(
                Problem("--grade", reason, f"add its columns to the input: {needed}" if needed else fix, name)
            )
        return scores

    def _tokens_of(self, answers: list[str]) -> Sequence[list[int] | None]:
        """Return the tokens of each answer and its end token, as in training; None if there is no tokenizer."""
        if self.tokenizer is None:
            return [None] * len(answers)
        end = self.tokenizer.eos_token_id
        ids: list[list[int]] = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        return [[*tokens, *([] if end is None else [end])] for tokens in ids]

    def score_by_model(self, drafts: Sequence[Draft]) -> list[float | None]:
        """Score drafts by the reward model. Raises ServerUnreachable, UserError."""
        assert self.reward_model is not None
        scores: list[float | None] = []
        for start in range(0, len(drafts), AT_ONCE):
            some = drafts[start : start + AT_ONCE]
            body = {"model": self.reward_model_name, "messages": [draft.row["messages"] for draft in some]}
            answered = self.reward_model.post("/rewards", body)
            try:
                scores += [float(item["score"]) for item in answered["data"]]
            except (KeyError, TypeError, ValueError):
                reason = "its answer is of another shape than that of /v1/rewards of `dstune serve`"
                raise UserError(Problem("--reward-url", reason, "a reward model behind `dstune serve`")) from None
        return scores

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
