"""method=qlora: low-rank adapters on frozen weights that are kept in 4-bit NF4 (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.convert import format_value
from dstune.config.schema import InitialWeights, RunConfig, stage_of
from dstune.core.errors import Problem
from dstune.methods.lora import Lora
from dstune.methods.lora.rules import splits
from dstune.methods.qlora.config import QloraConfig
from dstune.methods.qlora.rules import rounded_experts_problem
from dstune.protocols import Method, method
from dstune.protocols.method_options import HasRequirements, QuantizesWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dstune.planning.architecture import Architecture

STAGE_3_ON_CPU = (
    "on a CPU, bitsandbytes changes the shape of 4-bit weights, but ZeRO-3 gathers them in the shape it partitioned"
)
"""Why ZeRO-3 with 4-bit weights is for GPUs only."""


@method
class Qlora(Lora, QuantizesWeights, HasRequirements):
    Config = QloraConfig
    config: QloraConfig

    ours_alone: ClassVar[tuple[str, ...]] = (*Lora.ours_alone, "double_quantization")

    def check(self, run: RunConfig) -> Iterator[Problem]:
        yield from super().check(run)
        if run.model.weights is InitialWeights.random:
            reason = "weights are rounded to 4 bits while they are read, and random ones are not read"
            yield Problem("model.weights", reason, "model.weights=pretrained, or method=lora", "random")

    def _check_start(self) -> Iterator[Problem]:
        if splits(self.config):
            reason = (
                "what is left of a split weight would be rounded to 4 bits, and the export would not be its difference"
            )
            yield Problem("method.init", reason, "method.init=loftq, or method=lora", self.config.init.value)
        if self.config.frozen_adapters:
            reason = "a weight in 4 bits cannot take up an adapter"
            fix = "method=lora, or a merged model in model.path"
            yield Problem("method.frozen_adapters", reason, fix, format_value(self.config.frozen_adapters))

    def check_cpu(self, run: RunConfig) -> Iterator[Problem]:
        if stage_of(run.zero) == 3:
            yield Problem("zero.stage", STAGE_3_ON_CPU, "zero=stage2, or method=lora", "3")

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        return Method.check_sharded_weights(self, run)

    def encoder_decoder_problem(self, kind: str) -> Problem | None:
        reason = f"{kind} is an encoder-decoder, and rounding to 4 bits has been shown for models of one part only"
        return Problem("method", reason, "method=lora", self.name)

    def architecture_problem(self, model: Architecture) -> Problem | None:
        if not model.experts:
            return None
        experts = sum(tensor.count for tensor in model.tensors if ".experts." in tensor.name)
        return rounded_experts_problem(experts / model.parameters)

    def missing(self) -> Iterator[Problem]:
        if importlib.util.find_spec("bitsandbytes") is None:
            yield Problem(
                "method", "needs the package bitsandbytes", "pip install '.[qlora]' in a clone of dstune", "qlora"
            )

    def load_options(self, run: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
        from dstune.methods.qlora.quantize import quantization

        return quantization(self.config, stage_of(run.zero), dtype)

    def after_load(self, model: PreTrainedModel) -> None:
        from dstune.methods.qlora.quantize import refuse_experts, refuse_rounded_vocabulary
        from dstune.models.quantize import keep_layout

        refuse_experts(model)
        refuse_rounded_vocabulary(model)
        keep_layout(model)

    def frozen_bits(self, weight_bytes: int) -> int:
        return 4

    @classmethod
    def serving_options(cls, record: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        from dstune.methods.qlora.quantize import rounding

        if importlib.util.find_spec("bitsandbytes") is None:
            return {}
        return {"quantization_config": rounding(dtype, double=bool(record.get("double_quantization", True)))}

    def trained_on(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Mapping[str, Callable[[Tensor], Tensor]]:
        from dstune.methods.qlora.quantize import quantized_modules, rounded

        return dict.fromkeys(quantized_modules(model), partial(rounded, double=self.config.double_quantization))

    def record(self) -> dict[str, Any]:
        return {"double_quantization": self.config.double_quantization}
