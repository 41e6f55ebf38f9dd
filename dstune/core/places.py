"""Remembers which line of a configuration file a value came from, so that a problem with the value names the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from dstune.core.errors import Problem, UserError

_places: ContextVar[dict[str, str] | None] = ContextVar("places", default=None)
"""`FILE:LINE` by key, within `named`."""


def remember(places: Mapping[str, str]) -> None:
    """Let problems with these keys name `FILE:LINE` as well."""
    remembered = _places.get()
    if remembered is not None:
        remembered.update(places)


@contextmanager
def named() -> Iterator[None]:
    """Add the file and line to every problem with a key that `remember` was called with.

    Raises:
        UserError: instead of the one raised within the block.
    """
    token = _places.set({})
    try:
        yield
    except UserError as error:
        places = _places.get() or {}
        if not any(_place(problem, places) for problem in error.problems):
            raise
        raise UserError(_with_place(problem, places) for problem in error.problems) from error
    finally:
        _places.reset(token)


def _with_place(problem: Problem, places: Mapping[str, str]) -> Problem:
    place = _place(problem, places)
    return replace(problem, where=f"{place}: {problem.where}") if place else problem


def _place(problem: Problem, places: Mapping[str, str]) -> str | None:
    """Return the line of the key, or of the mapping or list that it is in."""
    holders = [key for key in places if problem.where == key or problem.where.startswith((f"{key}.", f"{key}["))]
    return places[max(holders, key=len)] if holders else None
