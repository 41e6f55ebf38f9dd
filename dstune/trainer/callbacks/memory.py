"""Reports the peak of memory over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.protocols import callback
from dstune.protocols.callback import Callback, Run, Step

if TYPE_CHECKING:
    from dstune.trainer.memory import PeakMemory


@callback
class Memory(Callback):
    """Reports `peak_memory_gib`: the highest peak of any rank, over all launches."""

    name = "memory"
    order = 74

    def __init__(self, memory: PeakMemory):
        self._memory, self._peak = memory, 0.0

    @classmethod
    def for_run(cls, run: Any) -> Memory:
        return cls(run.memory)

    def numbers(self) -> Mapping[str, float]:
        return {"gib": self._memory.gib}

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        self._peak = max(self._peak, *numbers["gib"])

    def metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        return {"peak_memory_gib": self._peak}

    def results(self) -> Mapping[str, Any]:
        return {"peak_memory_gib": round(self._peak, 4)}

    def on_rewind(self, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Keep the peak: undone steps took memory, too."""

    def close(self) -> None:
        self._memory.close()

    def state_dict(self) -> dict[str, Any]:
        return {"peak_memory_gib": self._peak}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._peak = state["peak_memory_gib"]
