"""The modules that get adapters, and their low-rank matrices, from the configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.core.confinement.here import check_patterns
from dstune.planning.architecture import Architecture, Tensor


def linear_modules(model: Architecture, targets: list[str]) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Yield (name, [out, in], layer) of the linear layers that `targets` names, as `low_rank` reads it."""
    # peft takes these names for the experts, so that layers without experts, and shared ones, get no adapter under them.
    of_experts = {name for names in EXPERT_TARGETS.get(_pattern(model), {}).values() for name in names} - {"gate"}
    for tensor in model.tensors:
        module = tensor.name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if targets == ["all-linear"]:
            is_head = leaf in ("lm_head", "score", "classifier") or "classifier." in module
            is_target = not is_head and not module.endswith(model.unadapted)
        else:
            is_target = any(module == ending or module.endswith(f".{ending}") for ending in targets)
        if tensor.linear and is_target and leaf not in of_experts:
            yield module, tensor.shape, tensor.layer


def _pattern(model: Architecture) -> str:
    return model.expert_pattern or model.kind


def low_rank(
    model: Architecture,
    targets: list[str],
    rank: int,
    *,
    ranks: dict[str, int] | None = None,
    magnitudes: bool = False,
    experts: bool = True,
) -> Iterator[Tensor]:
    """Yield the two matrices of rank `rank` that LoRA puts beside each linear layer that `targets` names, and DoRA's magnitudes.

    targets: endings of module names; `["all-linear"]` is every linear layer except the output head, as in peft, and routers
    and experts. ranks: others than `rank`, by ending of the module's name or regular expression; the first that matches counts.
    experts: whether the adapter can be on stacked weights.
    """
    modules = list(linear_modules(model, targets))
    check_patterns({"rank_pattern": ranks}, [module for module, _, _ in modules], "method.rank_pattern")
    for module, (outputs, inputs), layer in modules:
        module_rank = next(
            (n for pattern, n in (ranks or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), rank
        )
        yield Tensor(f"{module}.lora_A.weight", (module_rank, inputs), layer=layer, used=1.0)
        yield Tensor(f"{module}.lora_B.weight", (outputs, module_rank), layer=layer, used=1.0)
        if magnitudes:
            yield Tensor(f"{module}.lora_magnitude_vector.weight", (outputs,), layer=layer)
    for tensor in model.tensors if experts else ():
        if not tensor.linear:
            yield from _of_experts(tensor, _pattern(model), targets, rank)


STATE_SPACES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Kinds whose `out_proj` peft refuses an adapter on: the fused kernel of a state space reads its weight and never calls it."""
UNADAPTED = dict.fromkeys(STATE_SPACES, ("out_proj",)) | {
    "deepseek_v4": ("o_a_proj",),  # a block-diagonal layer, whose input is not that of a linear layer of its shape
    "llama4": (".router",),  # a linear layer that returns a choice of experts, not one tensor
    "llama4_text": (".router",),
    "phimoe": (".router",),
    # peft 0.21 renames these when it loads an adapter, and leaves them out (`dstune/models/peft_load.py`).
    "laguna": ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
    "inkling2_text": ("sconv.weight_proj",),
    "inkling2_loop_text": ("sconv.weight_proj",),
}
"""Endings of the linear layers that `all-linear` leaves without an adapter, by model type."""
QWEN_EXPERTS = {"gate.weight": ("gate",), "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT_TARGETS = {
    "mixtral": {"gate.weight": ("gate",), "gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": QWEN_EXPERTS,
    "qwen2_moe": QWEN_EXPERTS,
}
"""Weights of routers and experts as transformers stacks them, each with the module names that select it in peft, by a model's kind
or by peft's name of its pattern (GLM 4.5 and DeepSeek 3 follow `qwen2_moe`, MiniMax M2 `mixtral`)."""


def of_stacked(model: Architecture, endings: list[str], rank: int) -> Iterator[Tensor]:
    """Yield the two matrices of the adapter on each stacked weight [experts, a, b] whose name ends with one of `endings`; each
    expert has a rank of its own."""
    for tensor in model.tensors:
        if len(tensor.shape) == 3 and any(f".{tensor.name}".endswith(f".{ending}") for ending in endings):
            experts, inputs, outputs = tensor.shape
            for leaf, shape in (("lora_A", (experts * rank, inputs)), ("lora_B", (outputs, experts * rank))):
                yield Tensor(f"{tensor.name}.{leaf}.weight", shape, layer=tensor.layer, used=tensor.used)


def _of_experts(tensor: Tensor, kind: str, targets: list[str], rank: int) -> Iterator[Tensor]:
    """Yield the matrices for a router or all experts of a layer: one rank per expert, and per stacked module."""
    if kind not in EXPERT_TARGETS:
        return
    weight = next((name for name in EXPERT_TARGETS[kind] if tensor.name.endswith(f".mlp.experts.{name}")), None)
    if tensor.name.endswith(".mlp.gate.weight"):
        weight = "gate.weight"
    if weight is None:
        return
    stacked = EXPERT_TARGETS[kind][weight]
    if targets != ["all-linear"] and not all(
        any(name == target or target.endswith(f".{name}") for target in targets) for name in stacked
    ):
        return
    # peft wraps the experts' module twice: the outer wrapper is of the projection down.
    module = {
        "gate.weight": tensor.name.removesuffix(".weight"),
        "gate_up_proj": f"{tensor.name.removesuffix('.gate_up_proj')}.base_layer",
        "down_proj": tensor.name.removesuffix(".down_proj"),
    }[weight]
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    outputs, inputs = tensor.shape[-2:]
    ranks = experts * len(stacked) * rank
    yield Tensor(f"{module}.lora_A.weight", (ranks, inputs), layer=tensor.layer, used=tensor.used)
    yield Tensor(f"{module}.lora_B.weight", (outputs, ranks), layer=tensor.layer, used=tensor.used)
