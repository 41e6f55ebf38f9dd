"""Fills in `optimizer.lr`, whose default depends on the method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstune.config.convert import format_value
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
    method, task = (composed[section].get("name") for section in ("method", "task"))
    rate, origin = Method.learning_rate, ""
    if (method_class := METHODS.find(str(method))) is not None:
        rate, origin = method_class.learning_rate, f"the default of method={method}"
    if (task_class := TASKS.find(str(task))) is not None and task_class.low_learning_rate:
        rate, origin = rate / 10, f"a tenth of {format_value(rate)}, {origin}, for task={task}"
    optimizer_class = OPTIMIZERS.find(str(optimizer.get("name")))
    if optimizer_class is not None and optimizer_class.rate_share != 1:
        share = f"{format_value(optimizer_class.rate_share)} times {format_value(rate)}, the rate for AdamW"
        rate, origin = rate * optimizer_class.rate_share, f"{share} ({origin})" if origin else share
    optimizer.lr = float(f"{rate:g}")
    return {RATE: origin}
