"""The parameters that peft puts beside a frozen model, from the configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.config.architectures import adapted_experts_problem, rounded_experts_problem
from dstune.config.method_schema import (
    AdapterConfig,
    Ia3Config,
    LoraConfig,
    OftConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    PTuningEncoder,
    QloraConfig,
    VeraConfig,
)
from dstune.errors import Problem
from dstune.planning.architecture import Architecture, Tensor
from dstune.protocols.method import MethodConfig


def added(method: AdapterConfig, model: Architecture) -> tuple[Tensor, ...]:
    """The trained tensors of an adapter, exactly; of IA3 on an architecture that peft has no choice of modules for, and of OFT no
    less than there are."""
    targets = list(getattr(method, "target_modules", [])) or ["all-linear"]
    match method:
        case LoraConfig():
            return tuple(lora(model, targets, method.rank, ranks=method.rank_pattern, magnitudes=method.dora))
        case Ia3Config() if method.target_modules or model.kind in IA3_MODULES:
            return tuple(_scales(method, model))
        case VeraConfig():
            return tuple(_vectors(method.rank, model, targets))
        case OftConfig():  # the entries above the diagonal of each block
            return tuple(lora(model, targets, -(-method.block_size // 2), experts=False))
        case PromptConfig() | PrefixConfig() | PTuningConfig():
            return tuple(Tensor(f"prompt_encoder.{name}", shape) for name, shape in _prompt(method, model))
        case _:
            return tuple(lora(model, targets, 1, experts=False))


IA3_MODULES = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    ),
    **dict.fromkeys(("bert", "roberta"), (("key", "value", "output.dense"), ("output.dense",))),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "t5": (("k", "v", "wo"), ("wo",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
}
"""By architecture, the modules that peft's IA3 scales, and those of them whose inputs it scales (its constants, 0.21)."""


def _scales(method: Ia3Config, model: Architecture) -> Iterator[Tensor]:
    """A number for each output of a scaled module, of a feed-forward one for each input."""
    if method.target_modules:
        chosen, feed_forward = method.target_modules, method.feedforward_modules
    else:
        chosen, feed_forward = map(list, IA3_MODULES[model.kind])
    for module, (outputs, inputs), layer in _modules(model, chosen):
        of_inputs = any(module.endswith(f".{ending}") for ending in feed_forward)
        shape = (1, inputs) if of_inputs else (outputs, 1)
        yield Tensor(f"{module}.ia3_l", shape, layer=layer)


def _vectors(rank: int, model: Architecture, targets: list[str]) -> Iterator[Tensor]:
    """VeRA: a number for each row of the shared matrix, and for each output."""
    for module, (outputs, _), layer in _modules(model, targets):
        yield Tensor(f"{module}.vera_lambda_b", (outputs,), layer=layer)
        yield Tensor(f"{module}.vera_lambda_d", (rank,), layer=layer)


def _modules(model: Architecture, targets: list[str]) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """(name, [out, in], layer) of the linear layers that `targets` names, as `lora` reads it."""
    for tensor in model.tensors:
        module = tensor.name.removesuffix(".weight")
        if targets == ["all-linear"]:
            wanted = module not in ("lm_head", "score", "classifier") and not module.startswith("classifier.")
        else:
            wanted = any(module == ending or module.endswith(f".{ending}") for ending in targets)
        if tensor.linear and wanted:
            yield module, tensor.shape, tensor.layer


def lora(
    model: Architecture,
    targets: list[str],
    rank: int,
    *,
    ranks: dict[str, int] | None = None,
    magnitudes: bool = False,
    experts: bool = True,
) -> Iterator[Tensor]:
    """The two matrices of rank `rank` that LoRA puts beside each linear layer that `targets` names, and DoRA's magnitudes.

    targets: endings of module names; `["all-linear"]` is every linear layer except the output head, as in peft, and routers
    and experts. ranks: others than `rank`, by ending of the module's name or regular expression; the first that matches counts.
    experts: whether the adapter can be on stacked weights.
    """
    for module, (outputs, inputs), layer in _modules(model, targets):
        own = next((n for pattern, n in (ranks or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), rank)
        yield Tensor(f"{module}.lora_A.weight", (own, inputs), layer=layer, used=1.0)
        yield Tensor(f"{module}.lora_B.weight", (outputs, own), layer=layer, used=1.0)
        if magnitudes:
            yield Tensor(f"{module}.lora_magnitude_vector.weight", (outputs,), layer=layer)
    for tensor in model.tensors if experts else ():
        if not tensor.linear:
            yield from _of_experts(tensor, model.kind, targets, rank)


def experts_problem(method: MethodConfig, model: Architecture) -> Problem | None:
    """What the method cannot do with stacked experts; the ranks refuse it for models too that the planner does not know."""
    if not model.experts:
        return None
    if isinstance(method, QloraConfig):
        experts = sum(tensor.count for tensor in model.tensors if ".experts." in tensor.name)
        return rounded_experts_problem(experts / model.parameters)
    if isinstance(method, LoraConfig) and any(".experts." in tensor.name for tensor in added(method, model)):
        return adapted_experts_problem(method)
    return None


EXPERT_TARGETS = {
    "mixtral": {"gate.weight": ("gate",), "gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": {"gate.weight": ("gate",), "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
"""Weights of routers and experts as transformers stacks them, and the modules whose names stand for them in peft."""


def _of_experts(tensor: Tensor, kind: str, targets: list[str], rank: int) -> Iterator[Tensor]:
    """The matrices beside a router or all experts of a layer: a rank for each expert, and for each of the stacked modules."""
    weight = next((name for name in EXPERT_TARGETS.get(kind, ()) if tensor.name.endswith(f".mlp.experts.{name}")), None)
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


def _prompt(
    method: PromptConfig | PrefixConfig | PTuningConfig, m: Architecture
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a trained prompt and of the network that makes it. An encoder-decoder has a prompt for each half."""
    tokens = method.virtual_tokens * (2 if m.encoder_decoder else 1)
    match method:
        case PromptConfig():
            yield "embedding.weight", (tokens, m.hidden)
        case PrefixConfig():
            width = m.kv_heads * m.head_dim
            of_layers = m.layers * 2 * width
            if method.projection_size is None:
                yield "embedding.weight", (method.virtual_tokens, of_layers)
            else:
                yield "embedding.weight", (method.virtual_tokens, width)
                yield from _linear("transform.0", width, method.projection_size)
                yield from _linear("transform.2", method.projection_size, of_layers)
        case PTuningConfig():
            size = method.encoder_size
            yield "embedding.weight", (tokens, m.hidden)
            if method.encoder is PTuningEncoder.mlp:
                yield from _linear("mlp_head.0", m.hidden, size)
                yield from _linear("mlp_head.2", size, size)
                yield from _linear("mlp_head.4", size, m.hidden)
            else:
                for layer in range(method.encoder_layers):
                    inputs = m.hidden if layer == 0 else 2 * size
                    for direction in ("", "_reverse"):
                        at = f"l{layer}{direction}"
                        yield f"lstm_head.weight_ih_{at}", (4 * size, inputs)
                        yield f"lstm_head.weight_hh_{at}", (4 * size, size)
                        yield f"lstm_head.bias_ih_{at}", (4 * size,)
                        yield f"lstm_head.bias_hh_{at}", (4 * size,)
                yield from _linear("mlp_head.0", 2 * size, 2 * size)
                yield from _linear("mlp_head.2", 2 * size, m.hidden)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
