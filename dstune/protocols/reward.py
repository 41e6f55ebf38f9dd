"""What a reward of `task=reinforcement` is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class Reward:
    """Base of every reward. Subclasses set `name` and register with `@dstune.reward`.

    Rewards run in a child process of each rank, which is ended after `task.reward_seconds`. They see texts and columns of the
    data, never the model.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that every row must have."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Score `completions`, in their order; None for one that cannot be scored, which then does not train.

        prompts: texts, or lists of messages. completion_ids: tokens, the end token included. columns: every further column of
        the rows, a value for each completion; None where a row has none. As reward functions of TRL, which can be called here.
        """
        raise NotImplementedError
