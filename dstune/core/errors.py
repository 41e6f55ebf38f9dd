"""Errors that are shown to users, with the exit codes of the public contract.

0 done, 2 the configuration or data is wrong, 75 preempted and resumable, 1 anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

from dstune.core.secrets import redact
from dstune.core.text import visible

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later" is what a scheduler should do


@dataclass(frozen=True)
class Problem:
    """One thing a user has to change."""

    where: str
    """The configuration key (`trainer.micro_batch_size`) or place in a file (`data.jsonl:17`)."""
    reason: str
    fix: str = ""
    value: str = ""
    """The offending value as the user wrote it; empty if there is none."""

    def __post_init__(self) -> None:
        # A value of the environment is shown by its reference, a control character as its code.
        for field in fields(self):
            object.__setattr__(self, field.name, visible(redact(str(getattr(self, field.name)))))

    def __str__(self) -> str:
        assignment = f"={self.value}" if self.value else ""
        advice = f"\n    fix: {self.fix}" if self.fix else ""
        return f"{self.where}{assignment}: {self.reason}{advice}"


class DstuneError(Exception):
    """Base of every error that is shown as a message instead of a traceback."""

    exit_code = EXIT_FAILED

    def __str__(self) -> str:
        return visible(redact(super().__str__()))


class UserError(DstuneError):
    """The user's configuration or data is wrong: every problem that was found, listed together."""

    exit_code = EXIT_USER

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        assert self.problems, "a UserError without a problem says nothing"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[Problem]]]:
        return (type(self), (self.problems,))


class Preempted(DstuneError):
    """Stopped by a signal or a time limit after a save: the run can be continued."""

    exit_code = EXIT_PREEMPTED


class TrainingFailed(DstuneError):
    """The run cannot go on (non-finite losses, a dead rank, a failed save)."""


class Stalled(TrainingFailed):
    """A rank made no progress for `trainer.stall_seconds`."""


class WaitedInVain(Stalled):
    """A rank made no progress because it waited in a collective for another rank."""


@contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of a UserError that is raised within the block to `problems`."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def with_class(error: BaseException) -> str:
    """Return an error's class, and the first line of its text if it has one."""
    name = type(error).__name__
    return name if (line := first_line(error)) == name else f"{name}: {line}"


@contextmanager
def files_of_others(where: str, value: str, what: str, fix: str) -> Iterator[None]:
    """Raise a library's error about untrusted files as a UserError: `what` cannot be loaded, and why."""
    try:
        yield
    except DstuneError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(Problem(where, f"{what} cannot be loaded: {' '.join(lines[:2])}", fix, value)) from error


def to_json(error: DstuneError) -> str:
    """Return `error` as one JSON object, so that a rank can pass it to the process that started it."""
    problems = [asdict(problem) for problem in getattr(error, "problems", [])]
    return json.dumps({"type": type(error).__name__, "message": str(error), "problems": problems})


def from_json(text: str) -> DstuneError:
    """Rebuild the error that `to_json` wrote; an unknown type becomes a plain `DstuneError`. Raises ValueError for other text."""
    from dstune.core.parsing import parse_json  # brings yaml, which `dstune --help` can do without

    fields = parse_json(text)
    try:
        if fields["problems"]:
            return UserError([Problem(**problem) for problem in fields["problems"]])
        kinds = {kind.__name__: kind for kind in (Preempted, TrainingFailed, Stalled, WaitedInVain)}
        return kinds.get(fields["type"], DstuneError)(str(fields["message"]))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no error of a rank") from None
