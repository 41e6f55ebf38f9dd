"""Fills in `optimizer.lr`, whose default depends on the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any

from dstune.config.convert import DEFAULT, format_value, typed
from dstune.config.fields import BY_METHOD
from dstune.config.schema import CHOICES
from dstune.core.errors import Problem
from dstune.protocols import METHODS, OPTIMIZERS, TASKS, Method

if TYPE_CHECKING:
    from omegaconf import DictConfig

RATE = "optimizer.lr"


def fill(composed: DictConfig) -> dict[str, str]:
    """Set `optimizer.lr` to the method's default if nobody set it. Returns, by key, where a value that was filled in comes from.

    A method or task that does not exist is reported later, when the configuration is typed.
    """
    optimizer = composed.get("optimizer")
    if optimizer is None or "lr" not in optimizer or optimizer.lr is not None:
        return {}
    optimizer.lr, origin = rate_of(composed)
    return {RATE: origin}


def rate_of(tree: Mapping[str, Any]) -> tuple[float, str]:
    """Return the learning rate of a run that does not set it, and where it comes from.

    tree: a composition, of which the names of optimizer, method and task are read. Names that do not exist are left out.
    """
    optimizer, method, task = ((tree.get(section) or {}).get("name") for section in ("optimizer", "method", "task"))
    rate, origin = Method.learning_rate, ""
    if (method_class := METHODS.find(str(method))) is not None:
        rate, origin = method_class.learning_rate, f"the default of method={method}"
    if (task_class := TASKS.find(str(task))) is not None and task_class.low_learning_rate:
        rate, origin = rate / 10, f"a tenth of {format_value(rate)}, {origin}, for task={task}"
    optimizer_class = OPTIMIZERS.find(str(optimizer))
    if optimizer_class is not None and optimizer_class.rate_share != 1:
        share = f"{format_value(optimizer_class.rate_share)} times {format_value(rate)}, the rate for AdamW"
        rate, origin = rate * optimizer_class.rate_share, f"{share} ({origin})" if origin else share
    return float(f"{rate:g}"), origin


def with_composed_default(problem: Problem, tree: Mapping[str, Any]) -> Problem:
    """Return the problem with the default that composing `tree` gives, if its fix is the default of another choice."""
    section, _, name = problem.where.partition(".")
    choice = CHOICES[section].get(str((tree.get(section) or {}).get("name"))) if section in CHOICES else None
    field = next((field for field in fields(choice) if field.name == name), None) if choice else None
    if field is None or not problem.fix.endswith(DEFAULT) or field.default in (MISSING, None):
        return problem
    if BY_METHOD in field.metadata and not all(section in tree for section in ("method", "task")):
        return replace(problem, fix=f"leave it out, and {problem.where} is the default of the method")
    value = rate_of(tree)[0] if BY_METHOD in field.metadata else field.default
    return replace(problem, fix=f"{typed(problem.where, format_value(value))}{DEFAULT}")
