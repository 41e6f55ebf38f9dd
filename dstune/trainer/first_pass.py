"""Refuses, before training, a model whose first forward pass fails because of its code in transformers."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from dstune.core.errors import Problem, UserError, first_line

OF_CODE = (AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
"""Errors that a model's code raises for inputs or a configuration that it does not support. A failing device, memory that runs out
and a lost rank raise other errors, after which the run can be started again."""
OF_OPERATORS = re.compile(
    r"not implemented|must match|size of tensor|cannot be multiplied|expected .*(dtype|scalar type)|same dtype|"
    r"match the broadcast shape|Unsupported dtype"
)
"""Texts of torch's RuntimeError for an operator that lacks a number format or does not fit the shapes."""


@contextmanager
def refuse_failing_model(path: str, name: str, *, raised_there: bool = False) -> Iterator[None]:
    """Raise UserError in place of an error that the model's code raises within the block, with the place in the code.

    path: `model.path`. name: of the model's class. raised_there: replace only errors whose last frame is in the model's code;
    others may be a callback's fault. Every rank computes the same, so all of them raise it.
    """
    try:
        yield
    except (*OF_CODE, RuntimeError) as error:
        if not isinstance(error, OF_CODE) and not OF_OPERATORS.search(str(error)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if "transformers" in frame.filename), None)
        if frame is None:  # not the model's code
            raise
        if raised_there and (frame is not frames[-1] or not Path(frame.filename).name.startswith("modeling_")):
            raise
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        reason = (
            f"{name} fails in its first forward pass over text, in transformers {version('transformers')}: "
            f"{type(error).__name__} at {place}: {first_line(error)}"
        )
        raise UserError(
            Problem("model.path", reason, "another release of transformers, or another model", path)
        ) from error
