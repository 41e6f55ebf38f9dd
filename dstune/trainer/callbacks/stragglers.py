"""Which rank is slow. In a step all ranks take equally long, since they wait for each other; so what a rank does without
the others is timed: the wait for its rows, and the matrix products of one forward pass.

The products lie between the collectives of every ZeRO stage: hooks on the model's linear layers, put on after DeepSpeed's,
begin when the weights are there. On GPUs events of the stream are timed, which nobody waits for.
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
"""Weight of the past in the running mean: about ten steps, whose rows differ in length from rank to rank."""
RATIO = 1.5
"""Slowest rank to the median from which on it is worth a word ..."""
PATIENCE = 20
"""... when it lasted so many steps."""


class OwnTime:
    """Seconds per row element of this rank's own work, as a running mean."""

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
        """Put the hooks on, behind those that are there. without: a layer whose work differs from rank to rank by design."""
        from torch import nn

        for hook in self._hooks:
            hook.remove()
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and not list(layer.children()) and layer is not without:
                self._hooks += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]

    def start(self, elements: int, waited: float) -> None:
        """Start timing at the first micro-batch of a step, with its number of elements, padding included, and the time that the
        step waited for its rows."""
        self._spans, self._elements, self._waited, self._timing = [], elements, waited, True

    def stop(self) -> None:
        """Stop timing: forward and backward pass are done. (Under activation checkpointing both count.)"""
        self._timing = False

    def collect(self) -> float:
        """Return the running mean after the step that ends; 0.0 where there is none. Waits for nothing: the step is over."""
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
        # A checkpoint's second forward pass stops at its last saved tensor: a layer may begin and never end.
        if self._timing and self._began is not None:
            self._spans.append((self._began, self._moment()))
            self._began = None


@callback
class Stragglers(Callback):
    """Compares the ranks after each step; the same on all of them."""

    name = "stragglers"
    order = 76

    def __init__(self, own: OwnTime | None = None) -> None:
        self._own = own or OwnTime()
        self.ratio, self.rank = 1.0, 0
        """Slowest rank to the median now, and which one it is."""
        self._steps = 0
        self._reported = False

    @classmethod
    def for_run(cls, run: Any) -> Stragglers:
        return cls()

    def on_train_begin(self, run: Run) -> None:
        # Where ranks share rows, those with the ends of answers have the targets, and the projection makes the whole loss.
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
        """Compare the `means` of all ranks; return a warning, once, where one has been slow for long."""
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
    """Return the vocabulary projection of a model, or of the one that adapters are on."""
    projection = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(projection, "base_layer", projection)
