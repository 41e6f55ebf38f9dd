"""Keys whose default is the method's: `optimizer.lr` of an optimizer that has no rate of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstune.config.convert import format_value
from dstune.protocols import METHODS, OPTIMIZERS, TASKS, Method

if TYPE_CHECKING:
    from omegaconf import DictConfig

RATE = "optimizer.lr"


def fill(composed: DictConfig) -> dict[str, str]:
    """Put the method's learning rate where nobody gave one. Returns where each value that was put comes from, by key.

    A method or task that does not exist is refused where the configuration is typed.
    """
    optimizer = composed.get("optimizer")
    if optimizer is None or "lr" not in optimizer or optimizer.lr is not None:
        return {}
    method, task = (composed[section].get("name") for section in ("method", "task"))
    rate, origin = Method.learning_rate, ""
    if (room := METHODS.find(str(method))) is not None:
        rate, origin = room.learning_rate, f"the default of method={method}"
    if (of_task := TASKS.find(str(task))) is not None and of_task.low_learning_rate:
        rate, origin = rate / 10, f"a tenth of {format_value(rate)}, {origin}, for task={task}"
    of_optimizer = OPTIMIZERS.find(str(optimizer.get("name")))
    if of_optimizer is not None and of_optimizer.rate_share != 1:
        share = f"{format_value(of_optimizer.rate_share)} times {format_value(rate)}, the rate for AdamW"
        rate, origin = rate * of_optimizer.rate_share, f"{share} ({origin})" if origin else share
    optimizer.lr = float(f"{rate:g}")
    return {RATE: origin}
