"""Defines a reward of `task=reinforcement`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar


class Reward:
    """Base of every reward. Subclasses set `name` and register with `@dstune.reward`.

    Rewards run in a child process of each rank, which is ended after `task.reward_seconds`. They get texts and columns of the data,
    never the model. A function with the signature of TRL's reward functions is registered by the same decorator.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that every row must have."""
    runs_programs: ClassVar[bool] = False
    """Whether it runs programs that the model wrote, which needs the sandbox. Its `limits` then apply to one program."""
    reads_tokens: ClassVar[bool] = False
    """Whether it reads `completion_ids`; `dstune synthesize` then needs a tokenizer."""
    like_trl: ClassVar[bool] = False
    """Whether it gets the arguments of TRL's reward functions: messages instead of the texts of conversations, and `trainer_state`,
    `log_extra` and `log_metric` in addition to the columns."""
    reads_texts: ClassVar[bool] = False
    """Whether it gets the text of the last answer, and the tokens that the model wrote, in place of the messages of a completion
    that has several turns."""
    package: ClassVar[str] = ""
    """A module of the extra `reinforcement` that it imports; a run is refused where it is missing."""
    checks_rows: ClassVar[bool] = False
    """Whether `row_problem` checks the columns."""
    limits: Any = None
    seconds: float = math.inf
    """Seconds within which the programs of one completion must start, if it runs programs."""

    @classmethod
    def row_problem(cls, columns: Mapping[str, Any]) -> str | None:
        """Return why the reward cannot score completions of a row with these columns; None if it can."""
        return None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
        """Return the scores of `completions`, in order; None for one that the reward does not apply to. Raise an exception if
        scoring fails: the completions are then not trained on.

        prompts: texts, or lists of messages. completion_ids: token ids, including the end token. columns: every further column
        of the rows, with a value for each completion; None if its row has none. This may be a coroutine function.
        """
        raise NotImplementedError


def as_reward(function: Any) -> Any:
    """Return a class unchanged, and for a reward function of TRL a class with the function's name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(function, type):
        return function
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise ValueError(f"{function!r}: a reward is a named function, or a class that derives from dstune.Reward")

    def __call__(self: Reward, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        return function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)

    members = {
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__doc__": function.__doc__,
        "__call__": __call__,
        "name": name,
        "like_trl": True,
    }
    return type(name, (Reward,), members)
