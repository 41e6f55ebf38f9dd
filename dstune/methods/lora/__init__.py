"""method=lora: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._peft import ModuleAdapter
from dstune.methods.lora import rules
from dstune.methods.lora.config import LoraConfig, LoraInit
from dstune.protocols import method, task_of
from dstune.protocols.method import MethodConfig
from dstune.protocols.method_options import GivesCautions, ShiftsFrozenWeights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dstune.planning.architecture import Architecture
    from dstune.planning.architecture import Tensor as PlannedTensor
    from dstune.trainer.loop import Training

SLOW_FOR_ADAPTERS = 5e-5
"""Adapters learn little at this learning rate or below; usual ones are 1e-4 to 5e-4."""


@method
class Lora(ModuleAdapter, ShiftsFrozenWeights, GivesCautions):
    Config = LoraConfig
    config: LoraConfig

    learning_rate = 2e-4

    same_parameters_throughout = True
    trains_tokens = True
    peft_type = "LORA"
    adapter_name = "LoRA"
    tensor_marks = (".lora_",)
    renamed: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora",
        "dora": "use_dora",
    }
    ours_alone: ClassVar[tuple[str, ...]] = ("init", "init_iterations", "lr_ratio", "frozen_adapters")

    @property
    def starts_at_base(self) -> bool:
        """Whether the adapter starts at zero. Only then does switching it off give the model that training started from."""
        return self.config.adapter is None and self.config.init in (LoraInit.default, LoraInit.gaussian)

    def check(self, run: RunConfig) -> Iterator[Problem]:
        yield from self._check_start()
        yield from rules.check_lora(self.config)
        yield from super().check(run)

    def _check_start(self) -> Iterator[Problem]:
        if self.config.init is LoraInit.loftq:
            reason = "it makes up for what rounding to 4 bits takes, and method=lora rounds nothing"
            yield Problem("method.init", reason, "method=qlora, or method.init=default", "loftq")

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check_sharded_weights(self.config)

    def architecture_problem(self, model: Architecture) -> Problem | None:
        if model.experts and any(".experts." in tensor.name for tensor in self.added(model)):
            return rules.adapted_experts_problem(self.config)
        return None

    @property
    def folders(self) -> list[str]:
        return [*super().folders, *self.config.frozen_adapters]

    def resolve(self) -> MethodConfig:
        if not self.config.frozen_adapters:
            return super().resolve()
        from dstune.methods._peft.files import adapter_folders

        folders = adapter_folders(self.config.frozen_adapters, "method.frozen_adapters", self.peft_type)
        resolved = replace(self.config, frozen_adapters=[str(folder) for folder in folders])
        return super(Lora, type(self)(resolved)).resolve()

    def added(self, model: Architecture) -> tuple[PlannedTensor, ...]:
        from dstune.planning.adapters import low_rank, of_stacked

        config = self.config
        modules = low_rank(model, self.targets, config.rank, ranks=config.rank_pattern, magnitudes=config.dora)
        return (*modules, *of_stacked(model, config.target_parameters, config.rank))

    @property
    def adapter_dropout(self) -> float:
        return self.config.dropout

    def add(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        from dstune.methods.lora.apply import add_lora

        return add_lora(self.config, model, run, self.refused_by_peft)

    def refused_by_peft(self, reason: str) -> Problem:
        if "ParamWrapper" in reason and (problem := rules.adapted_experts_problem(self.config)):
            return problem
        return super().refused_by_peft(reason)

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        # LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B starts at zero and has to catch up with A.
        ratio = self.config.lr_ratio
        return lambda name: ratio if ".lora_B." in name else 1.0

    def trained_on(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Mapping[str, Callable[[Tensor], Tensor]]:
        from dstune.methods.lora.export import shifted, shifts_by_module

        return {name: partial(shifted, *factors) for name, factors in shifts_by_module(trained).items()}

    def plain_adapter(self, adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from dstune.methods.lora.export import plain_lora

        return plain_lora(adapted, trained)

    def cautions(self, run: Training) -> Iterator[str]:
        from dstune.methods.lora.apply import experts_without_adapters, layers_without_adapters

        lr = run.config.optimizer.lr
        low = task_of(run.config.task).low_learning_rate
        if lr <= SLOW_FOR_ADAPTERS and not low:
            yield (
                f"optimizer.lr={lr:g} is a rate for all weights; adapters usually learn at 1e-4 to 5e-4 "
                f"(without optimizer.lr: {self.learning_rate:g})"
            )
        every_layer = self.config.target_modules == ["all-linear"]
        if every_layer and (share := experts_without_adapters(run.engine.module)):
            yield (
                f"the experts, {share:.0%} of the weights, have no adapters: peft does not know those of this architecture "
                "(method.target_parameters names them)"
            )
        if every_layer and (bare := layers_without_adapters(run.engine.module)):
            yield (
                f"{len(bare)} linear layers of {sum(bare.values()):,} weights have no adapters, since peft takes their names "
                f"for those of experts: {', '.join(list(bare)[:3])}{', ...' if len(bare) > 3 else ''}"
            )

    def without_paths(self, public_name: Callable[[str], str]) -> MethodConfig:
        public = replace(self.config, frozen_adapters=[public_name(path) for path in self.config.frozen_adapters])
        return super(Lora, type(self)(public)).without_paths(public_name)
