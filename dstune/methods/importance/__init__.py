"""method=importance: trains only the most important share of the weights; the others keep every bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.config.schema import Precision, RunConfig
from dstune.core.errors import Problem
from dstune.methods.importance.config import ImportanceConfig, Selection, Unit
from dstune.protocols import Method, method
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import NeedsPreparation

if TYPE_CHECKING:
    from dstune.core.distributed import World
    from dstune.data.prepared import PreparedData


@method
class Importance(Method, NeedsPreparation):
    Config = ImportanceConfig
    config: ImportanceConfig

    moves_weights = True
    alters_updates = True
    scores_gradients = True
    why_not_shared_rows = "it measures gradients of whole rows"
    why_not_measured = "the parameters are chosen before it can be measured, by micro-batches too"

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config = self.config
        ablates = config.selection is Selection.ablation
        if ablates and config.unit is not Unit.tensors:
            reason = "only whole tensors are left out, and nothing is known of single entries"
            yield Problem("method.unit", reason, "method.unit=tensors, or another method.selection", config.unit.name)
        if ablates and not config.ablation_rows:
            yield Problem("method.ablation_rows", "the selection needs them", "method.ablation_rows=200", "0")
        if config.ablation_rows and not (run.data.validation or run.data.split.holds_out):
            reason = "tensors are left out on validation rows, and none are held out"
            fix = "data.validation=rows.jsonl or data.split.validation=0.05"
            yield Problem("method.ablation_rows", reason, fix, format_value(config.ablation_rows))
        if run.data.streaming:
            reason = "the rows on which weights are scored are not those of a stream's first block alone"
            yield Problem("data.streaming", reason, "data.streaming=false, or method=full", "true")

    def prepare(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
    ) -> Preparation:
        from dstune.methods.importance.scores import choose

        return choose(run, self.config, data, tokenizer, precision, world, run_dir)
