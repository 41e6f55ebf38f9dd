"""method=ulmfit: gradual unfreezing from the top, a lower rate for each layer below (Howard and Ruder 2018, arXiv:1801.06146)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._layers import rates_of_layers
from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.protocols import Method, method, task_of
from dstune.protocols.method_options import TrainsInStages, UnfreezesLater

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from dstune.trainer.data_loader import DataLoader
    from dstune.zero.engine import Engine


@method
class Ulmfit(Method, TrainsInStages, UnfreezesLater):
    Config = UlmfitConfig
    config: UlmfitConfig

    moves_weights = True
    alters_updates = True
    why_not_shared_rows = "its classifier reads one vector of the whole row"
    why_no_rollback = "a run cannot go back over a step at which method=ulmfit unfroze a layer"

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config = self.config
        if config.language_model_epochs:
            yield from self._check_language_model_stage(run)
        by_epochs = config.unfreeze_steps is None and config.unfreeze_epochs > 0
        if run.data.streaming and by_epochs:
            reason = "with data.streaming the length of an epoch is not known"
            yield Problem(
                "method.unfreeze_epochs", reason, "method.unfreeze_steps=100", format_value(config.unfreeze_epochs)
            )

    def _check_language_model_stage(self, run: RunConfig) -> Iterator[Problem]:
        key, epochs = "method.language_model_epochs", format_value(self.config.language_model_epochs)
        if task_of(run.task).unpoolable:
            reason = f"the stage prepares a classifier, but task={run.task.name} itself trains on texts"
            yield Problem(key, reason, "method.language_model_epochs=0", epochs)
        if run.data.streaming or run.data.mixture or run.forgetting.replay:
            reason = (
                "the stage reads the texts a second time, which a stream, a mixture or replayed rows do not support"
            )
            yield Problem(key, reason, "train task=causal_lm first, then model.path=RUN/export", epochs)

    def stages(self, run: RunConfig, run_dir: Path) -> list[RunConfig]:
        from dstune.methods.ulmfit.stages import classifier_stage, language_model_stage

        if not self.config.language_model_epochs:
            return [run]
        return [language_model_stage(self.config, run, run_dir), classifier_stage(run, run_dir)]

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        return rates_of_layers(module, 1 / self.config.rate_factor)

    def parts(self, module: nn.Module) -> Callable[[str], int]:
        from transformers import PreTrainedModel

        from dstune.models.layers import layers_of

        assert isinstance(module, PreTrainedModel)
        return {name: number for number, part in enumerate(layers_of(module).parts) for name in part}.__getitem__

    def unfreezing(self, model: PreTrainedModel, engine: Engine, data_loader: DataLoader, step: int) -> Any:
        from dstune.methods.ulmfit.unfreezing import Unfreezing, first_steps
        from dstune.models.layers import layers_of

        return Unfreezing(first_steps(self.config, layers_of(model).parts, data_loader), engine, step)
