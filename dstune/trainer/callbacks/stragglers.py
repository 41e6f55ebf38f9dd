"""Finds slow ranks.

All ranks take equally long for a step, since they wait for each other in collectives. So this times only what a rank does alone:
the wait for its rows, and the matrix products of one forward pass. The products contain no collective at any ZeRO stage: the hooks
that time the linear layers are registered after DeepSpeed's, so they start once the weights are gathered. On GPUs they record
events in the stream, and no one waits for these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.protocols import callback
from dstune.protocols.callback import Callback, Run, Step

if TYPE_CHECKING:
    from torch import nn

SMOOTHING = 0.9
"""Weight of the past in the running mean, which averages over about ten steps: the rows of a single step differ in length from
rank to rank."""
RATIO = 1.5
"""A warning is due when the slowest rank takes this many times as long as the median rank ..."""
PATIENCE = 20
"""... for this many steps in a row."""


class OwnTime:
    """Measures this rank's own work: seconds per element of its rows (padding included), as a running mean."""

    def __init__(self) -> None:
        from dstune.zero import accelerator

        self._on_gpu = accelerator.present()
        self._timing = False
        self._hooks: list[Any] = []
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._elements = 0
        self._waited = 0.0
        self.mean: float | None = None

    def attach(self, module: nn.Module, without: nn.Module | None = None) -> None:
        """Register the hooks, after those that exist. without: a layer whose work differs from rank to rank by design."""
        from torch import nn

        for hook in self._hooks:
            hook.remove()
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and not list(layer.children()) and layer is not without:
                self._hooks += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]

    def start(self, elements: int, waited: float) -> None:
        """Start timing the first micro-batch of a step. elements: its size, padding included. waited: seconds that the step waited
        for its rows."""
        self._spans, self._elements, self._waited, self._timing = [], elements, waited, True

    def stop(self) -> None:
        """Stop timing after the backward pass. (Activation checkpointing repeats the forward pass in it; both count.)"""
        self._timing = False

    def collect(self) -> float:
        """Return the running mean, including the step that ends now; 0.0 if nothing was timed yet. The step's events are done by
        now, so this does not wait for the device."""
        if self._spans and self._elements:
            if self._on_gpu:
                seconds = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
            else:
                seconds = sum(end - begin for begin, end in self._spans)
            now = (seconds + self._waited) / self._elements
            self.mean = now if self.mean is None else SMOOTHING * self.mean + (1 - SMOOTHING) * now
        self._spans = []
        return self.mean or 0.0

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        from dstune.zero import accelerator

        return accelerator.moment()

    def _begin(self, layer: nn.Module, inputs: Any) -> None:
        if self._timing:
            self._began = self._moment()

    def _end(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing ends its second forward pass at the last tensor that it needs: a layer may begin and never end.
        if self._timing and self._began is not None:
            self._spans.append((self._began, self._moment()))
            self._began = None


@callback
class Stragglers(Callback):
    """Compares the ranks after each step. Every rank has the same result."""

    name = "stragglers"
    order = 76

    def __init__(self, own: OwnTime | None = None) -> None:
        self._own = own or OwnTime()
        self.ratio, self.rank = 1.0, 0
        """How many times as long the slowest rank takes as the median rank, and its number."""
        self._steps = 0
        self._reported = False

    @classmethod
    def for_run(cls, run: Any) -> Stragglers:
        return cls()

    def on_train_begin(self, run: Run) -> None:
        # If ranks share rows, the targets are on the ranks with the ends of answers, and so is all the work of the projection.
        shared = run.world.data_parallel_size < run.world.size
        self._own.attach(run.engine.module, without=_projection(run.engine.module) if shared else None)

    def on_micro_batch_begin(self, run: Run, step: Any, position: int, batch: Mapping[str, Any]) -> None:
        if position == 0:
            self._own.start(next(iter(batch.values())).numel(), step.seconds_waited)

    def on_micro_batch_end(self, run: Run, step: Step, position: int) -> None:
        self._own.stop()

    def numbers(self) -> Mapping[str, float]:
        return {"own_time": self._own.collect()}

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        if (slow := self.compare(numbers["own_time"])) and run.log:
            run.log.message(slow)

    def metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        if run.world.size == 1:
            return {}
        return {"slowest_rank": self.rank, "slowest_to_median": round(self.ratio, 3)}

    def results(self) -> Mapping[str, Any]:
        return {"slowest_rank": {"rank": self.rank, "to_median": round(self.ratio, 3)}}

    def compare(self, means: Sequence[float]) -> str:
        """Compare the `means` of all ranks; return a warning, only once, if one rank has been slow for `PATIENCE` steps."""
        median = statistics.median(means)
        if not median:
            return ""
        self.rank = max(range(len(means)), key=means.__getitem__)
        self.ratio = means[self.rank] / median
        self._steps = self._steps + 1 if self.ratio > RATIO else 0
        if self._steps < PATIENCE or self._reported:
            return ""
        self._reported = True
        return (
            f"warning: rank {self.rank} is slow: its own work takes {self.ratio:.1f} times as long as the median rank's"
        )


def _projection(module: nn.Module) -> nn.Module | None:
    """Return the model's vocabulary projection; if it has an adapter, the layer inside of the adapter."""
    projection = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(projection, "base_layer", projection)
