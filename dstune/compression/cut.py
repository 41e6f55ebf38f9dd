"""Chooses the layers and neurons of a decoder to keep, and removes the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstune.core.errors import Problem, UserError

GATED = ("gate_proj", "up_proj", "down_proj")
"""Layers of a feed-forward block whose neurons can be chosen: rows of the first two, columns of the last."""


def evenly_spaced(layers: int, count: int) -> list[int]:
    """Return the numbers of `count` evenly spaced layers, including the first and the last."""
    if count == 1:
        return [0]
    return [round(number * (layers - 1) / (count - 1)) for number in range(count)]


def most_influential(influences: Sequence[float], count: int) -> list[int]:
    """Return the numbers of the `count` layers that change their input most, in ascending order."""
    return sorted(sorted(range(len(influences)), key=lambda layer: -influences[layer])[:count])


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers. Raises UserError if the model is not a plain decoder."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1 or model.config.is_encoder_decoder:
        reason = f"{type(model).__name__} is not a decoder with a single list of layers"
        raise UserError(Problem("MODEL", reason, "a causal language model"))
    return lists[0]


@torch.no_grad()
def influences_of(model: PreTrainedModel, samples: Iterable[Tensor]) -> list[float]:
    """Return the block influence of each layer: 1 - the mean cosine of its input and its output, over the tokens of the samples
    (Men et al. 2024, arXiv:2403.03853, equation 1). samples: token ids [tokens]."""
    blocks = blocks_of(model)
    turned, count = torch.zeros(len(blocks), dtype=torch.float64), 0

    def measure(
        number: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        states_before = arguments[0] if arguments else keywords["hidden_states"]
        states_after = output[0] if isinstance(output, tuple) else output
        turned[number] += (
            torch.cosine_similarity(states_before.float(), states_after.float(), dim=-1).double().sum().cpu()
        )

    with _hooks(
        block.register_forward_hook(partial(measure, number), with_kwargs=True) for number, block in enumerate(blocks)
    ):
        for tokens in samples:
            model(input_ids=tokens[None].to(model.device), use_cache=False)
            count += len(tokens)
    return [1 - float(total) / max(1, count) for total in turned]


@torch.no_grad()
def activations_of(model: PreTrainedModel, samples: Iterable[Tensor]) -> list[Tensor]:
    """Return, for each layer, the mean magnitude of each feed-forward neuron over the tokens of the samples, fp64 [neurons]
    (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2).

    Raises:
        UserError: a layer has no gated feed-forward block.
    """
    sums: list[Tensor] = []
    count = 0

    def measure(number: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        sums[number] += arguments[0].abs().flatten(0, -2).double().sum(dim=0).cpu()

    downs = [feed_forward_of(block).down_proj for block in blocks_of(model)]
    sums += [torch.zeros(down.in_features, dtype=torch.float64) for down in downs]
    with _hooks(down.register_forward_pre_hook(partial(measure, number)) for number, down in enumerate(downs)):
        for tokens in samples:
            model(input_ids=tokens[None].to(model.device), use_cache=False)
            count += len(tokens)
    return [total / max(1, count) for total in sums]


def feed_forward_of(block: nn.Module) -> Any:
    """Return the gated feed-forward block of a layer. Raises UserError if the layer does not have exactly one."""
    blocks = [
        module
        for module in block.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in GATED)
    ]
    if len(blocks) != 1:
        reason = f"a layer has {len(blocks)} feed-forward blocks with {', '.join(GATED)}"
        raise UserError(
            Problem("--feed-forward", reason, "leave it out, or use a model like Llama, Qwen, Gemma or Mistral")
        )
    return blocks[0]


def keep_layers(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Remove all layers except those with these numbers, also from the lists in the configuration that have an entry per layer."""
    blocks = blocks_of(model)
    layer_count = len(blocks)
    remaining = [blocks[number] for number in numbers]
    del blocks[:]
    blocks.extend(remaining)
    config = model.config.get_text_config(decoder=True)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layer_count:
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)


def keep_neurons(model: PreTrainedModel, activations: Sequence[Tensor], count: int) -> None:
    """Remove all but the `count` most active neurons of each feed-forward block. activations: of each remaining layer, as from
    `activations_of`."""
    for block, active in zip(blocks_of(model), activations, strict=True):
        indices = active.topk(count).indices.sort().values
        feed_forward = feed_forward_of(block)
        for name in GATED:
            linear = getattr(feed_forward, name)
            rows = name != "down_proj"
            weight = linear.weight.detach()
            weight = weight[indices.to(weight.device)] if rows else weight[:, indices.to(weight.device)]
            linear.weight = nn.Parameter(weight.clone())
            if linear.bias is not None and rows:
                linear.bias = nn.Parameter(linear.bias.detach()[indices.to(weight.device)].clone())
            linear.out_features, linear.in_features = weight.shape
        if hasattr(feed_forward, "intermediate_size"):
            feed_forward.intermediate_size = count
    model.config.get_text_config(decoder=True).intermediate_size = count


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    handle_list = list(handles)
    try:
        yield
    finally:
        for handle in handle_list:
            handle.remove()
