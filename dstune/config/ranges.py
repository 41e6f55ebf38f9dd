"""Checks every number against the bounds that its field in the schema declares."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any

from dstune.config.convert import format_value
from dstune.config.fields import EXAMPLE, NEEDS
from dstune.core.errors import Problem

TESTS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
"""The bounds of `fields.setting`."""
LENGTHS = ("trainer.max_steps", "trainer.epochs")
WITHOUT_TRAINING = "`dstune evaluate MODEL data.validation=FILE` measures a model without training"


def check_ranges(config: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield a problem for each number that is out of range, of a section and of the sections in it."""
    for field in fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from check_ranges(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if is_dataclass(entry):
                    yield from check_ranges(entry, f"{key}.{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(key, "must be a finite number", _default(key, field), format_value(value))
        elif field.metadata and value is not None and not isinstance(value, (str, Enum)):
            bounds = [(test, field.metadata[kind]) for kind, test in TESTS.items() if kind in field.metadata]
            if not all(holds(value, bound) for (holds, _), bound in bounds):
                allowed = " and ".join(f"{words} {bound:g}" for (_, words), bound in bounds)
                fix = _default(key, field) + (f"; {WITHOUT_TRAINING}" if value == 0 and key in LENGTHS else "")
                yield Problem(key, f"must be {allowed}", fix, format_value(value))


def _default(key: str, field: Field[Any]) -> str:
    """Return the default as a fix, since it is always in range; the field's example where the default is null, which a run may
    refuse. Empty if the field has neither."""
    if field.default is None and EXAMPLE in field.metadata and NEEDS not in field.metadata:
        return f"{key}={field.metadata[EXAMPLE]}"
    return "" if field.default is MISSING else f"{key}={format_value(field.default)} (the default)"
