"""The states of a job and the transitions between them. docs/finetuning-jobs.md has the same table; a test compares them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from dstune.serve.errors import ApiError


class State(StrEnum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Change(StrEnum):
    """A change of a job, requested by a client or detected by the reconciler."""

    VALIDATED = "validated"
    START = "start"
    LOSE = "lose"
    """Its process is gone without a result, or was stopped although nobody asked: it starts again from its newest checkpoint."""
    PAUSE = "pause"
    HALT = "halt"
    """Its process has saved and ended, as a pause requested."""
    RESUME = "resume"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

TRANSITIONS: Mapping[tuple[State, Change], State] = {
    (State.VALIDATING, Change.VALIDATED): State.QUEUED,
    (State.VALIDATING, Change.FAIL): State.FAILED,
    (State.VALIDATING, Change.CANCEL): State.CANCELLED,
    (State.QUEUED, Change.START): State.RUNNING,
    (State.QUEUED, Change.PAUSE): State.PAUSED,
    (State.QUEUED, Change.FAIL): State.FAILED,
    (State.QUEUED, Change.CANCEL): State.CANCELLED,
    (State.RUNNING, Change.LOSE): State.QUEUED,
    (State.RUNNING, Change.PAUSE): State.PAUSING,
    (State.RUNNING, Change.COMPLETE): State.SUCCEEDED,
    (State.RUNNING, Change.FAIL): State.FAILED,
    (State.RUNNING, Change.CANCEL): State.CANCELLED,
    (State.PAUSING, Change.HALT): State.PAUSED,
    (State.PAUSING, Change.COMPLETE): State.SUCCEEDED,
    (State.PAUSING, Change.FAIL): State.FAILED,
    (State.PAUSING, Change.CANCEL): State.CANCELLED,
    (State.PAUSED, Change.RESUME): State.QUEUED,
    (State.PAUSED, Change.CANCEL): State.CANCELLED,
}

ALREADY: Mapping[Change, frozenset[State]] = {
    Change.CANCEL: frozenset({State.CANCELLED}),
    Change.PAUSE: frozenset({State.PAUSING, State.PAUSED}),
    Change.RESUME: frozenset(),
}
"""States in which a client's request is already fulfilled: repeating it succeeds and changes nothing."""
RESUMED = frozenset({State.QUEUED, State.RUNNING})
"""The same for a resume that the client retries because it saw no answer (`x-stainless-retry-count` above 0)."""


def after(state: State, change: Change, *, repeated: bool = False) -> State | None:
    """Return the state that a change leads to; None where a client's wish is fulfilled already.

    repeated: whether the client says that it has sent this request before.

    Raises:
        ApiError: the change is not possible in this state.
    """
    if state in ALREADY.get(change, ()) or (repeated and change is Change.RESUME and state in RESUMED):
        return None
    new_state = TRANSITIONS.get((state, change))
    if new_state is None:
        code = "job_not_paused" if change is Change.RESUME else "invalid_job_state"
        raise ApiError(400, f"A job that is {state} does not take `{change}`.", code=code)
    return new_state
