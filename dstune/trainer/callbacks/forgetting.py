"""Adds the penalties against forgetting (L2-SP, EWC) to the gradient of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.protocols import callback
from dstune.protocols.callback import Callback, Run, Step

if TYPE_CHECKING:
    from dstune.trainer.forgetting import Penalties


@callback
class Forgetting(Callback):
    """Applies `forgetting.l2sp` and `forgetting.ewc`."""

    name = "forgetting"
    order = 64

    def __init__(self, penalties: Penalties):
        self._penalties, self._penalty = penalties, 0.0

    @classmethod
    def for_run(cls, run: Any) -> Forgetting | None:
        return None if run.penalties is None else cls(run.penalties)

    def before_update(self, partition: Any, gradient: Any, group: dict[str, Any]) -> None:
        self._penalties.add(partition, gradient)

    def numbers(self) -> Mapping[str, float]:
        return {"penalty": self._penalties.collect()}

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        # At stage 0 every rank updates all entries.
        self._penalty = sum(numbers["penalty"]) if run.engine.stage > 0 else numbers["penalty"][0]

    def metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        return {"penalty": self._penalty}
