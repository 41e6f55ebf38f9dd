"""Unfreezes the layers of a model step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dstune.protocols import callback
from dstune.protocols.callback import Callback, Run, Step

if TYPE_CHECKING:
    from dstune.methods.ulmfit.unfreezing import Unfreezing


@callback
class GradualUnfreezing(Callback):
    """Runs the schedule of a method that unfreezes one group of layers after another."""

    name = "unfreezing"
    order = 62

    def __init__(self, unfreezing: Unfreezing):
        self._unfreezing = unfreezing

    @classmethod
    def for_run(cls, run: Any) -> GradualUnfreezing | None:
        return None if run.unfreezing is None else cls(run.unfreezing)

    def on_step_begin(self, run: Run, step: Step) -> None:
        self._unfreezing.before_step(step.number - 1)

    def metrics(self, run: Run, step: Step) -> Mapping[str, int]:
        return {"trained_layers": self._unfreezing.trained_layers(step.number - 1)}
