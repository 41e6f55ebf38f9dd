"""Rounds frozen weights to 4 bits, and refuses models that cannot be rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dstune.core.errors import Problem, UserError
from dstune.methods.qlora.config import QloraConfig
from dstune.methods.qlora.rules import rounded_experts_problem
from dstune.zero.parts import full_count, full_shape

KEPT = ("lm_head", "embed_out", "classifier", "pre_classifier", "score", "pooler", "qa_outputs")
"""Linear layers that are not rounded: projections to the vocabulary, and heads, which are trained whole if they are new."""


def quantization(method: QloraConfig, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that round linear layers to NF4 while they are read.

    dtype: of matrix products. At stage 3 it is also the type under which the packed bytes are stored (`quant_storage`), since
    ZeRO-3 only partitions parameters of one floating-point type.
    """
    storage = dtype if stage == 3 else torch.uint8
    return {"quantization_config": rounding(dtype, double=method.double_quantization, storage=storage)}


def rounding(dtype: torch.dtype, *, double: bool, storage: torch.dtype = torch.uint8) -> Any:
    """Return transformers' settings for the rounding that `method=qlora` uses."""
    from transformers import BitsAndBytesConfig

    import dstune.models.peft_import  # noqa: F401  # before transformers imports bitsandbytes

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(KEPT),
    )


def refuse_experts(model: nn.Module) -> None:
    """Raises UserError for a mixture of experts: their weights are stacked, and bitsandbytes rounds linear layers only."""
    parameters = dict(model.named_parameters())
    stacked = [p for name, p in parameters.items() if ".experts." in name and len(full_shape(p)) == 3]
    if stacked:
        share = sum(map(full_count, stacked)) / sum(map(full_count, parameters.values()))
        raise UserError(rounded_experts_problem(share))


def refuse_rounded_vocabulary(model: Any) -> None:
    """Raises UserError if the projection to the vocabulary was rounded although it shares the embedding's weight, as in biogpt,
    whose projection has no name in KEPT: bitsandbytes would fail at the first step. model: loaded with `quantization`."""
    from bitsandbytes.nn import Linear4bit

    projection = model.get_output_embeddings()
    if isinstance(projection, Linear4bit) and projection.weight is model.get_input_embeddings().weight:
        name = next(name for name, module in model.named_modules() if module is projection)
        reason = f"rounds {name}, the projection to the vocabulary, and its weight is the embedding's, which stays"
        raise UserError(Problem("method", reason, "method=lora", "qlora"))


def quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that `quantization` would round, in a model that was loaded without it, with or without
    adapters."""
    names = []
    for name, module in model.named_modules():
        inner = name.removesuffix(".base_layer")
        parts = set(inner.split("."))
        if type(module) is nn.Linear and not parts & set(KEPT) and not is_adapter_part(inner):
            names.append(inner)
    return names


def is_adapter_part(name: str) -> bool:
    return ".lora_" in name or "modules_to_save" in name


def rounded(weight: Tensor, *, double: bool) -> Tensor:
    """Return `weight` [out, in] with the values that training used: rounded to 4 bits and back, in its own dtype."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    values: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
    return values
