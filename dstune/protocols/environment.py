"""Defines an environment of `task=reinforcement`."""

from __future__ import annotations

import random
from typing import Any, ClassVar


class Environment:
    """Base of every environment. Subclasses set `name` and register with `@dstune.environment`.

    One instance lives as long as one completion, in the child process of its rank. Its public methods are tools that the model
    may call, described by their signature and docstring (Google style, as transformers reads them); what one returns is read by
    the model, and an exception too. A class for TRL's `environment_factory` is one as it is.
    """

    name: ClassVar[str] = ""
    at_once: ClassVar[int] = 32
    """In how many instances `reset`, tools and `get_reward` run at the same time, each in a thread. With 1 they run one after the
    other in the main thread, for instances that share something that only one may use."""
    random: random.Random
    """Set before `reset`, from seed, step, prompt and sample: an environment that draws from nothing else is the same after a
    resume."""

    def reset(self, **row: Any) -> str | None:
        """Start an episode. row: the columns of the prompt's row. A returned text is appended to the prompt's last message."""
        return None

    # An environment that has a `get_reward(self) -> float | None` scores its own completion, under its name.

    @classmethod
    def tool_names(cls) -> list[str]:
        """Return the names of its public methods, sorted."""
        hidden = {"reset", "get_reward", "tool_names"}
        return [
            name
            for name in sorted(dir(cls))
            if not name.startswith("_") and name not in hidden and callable(getattr(cls, name))
        ]


def as_environment(member: Any) -> Any:
    """Return `member`; for a class that does not derive from `Environment`, return one that derives from both.

    Raises:
        ValueError: `member` is not a class.
    """
    if not isinstance(member, type):
        raise ValueError(f"{member!r}: an environment is a class")
    if issubclass(member, Environment):
        return member
    members = {"__module__": member.__module__, "__qualname__": member.__qualname__, "__doc__": member.__doc__}
    return type(member.__name__, (member, Environment), {**members, "name": getattr(member, "name", member.__name__)})
