"""Orders the parameters of any transformer by layer, from the bottom to the top."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from dstune.models.unreached import unreached_parameters, unreached_parts
from dstune.zero.parts import full_count


@dataclass(frozen=True)
class Layers:
    """Names of a model's parameters by depth. Each parameter is in one part, a tied one by its first name; parameters that
    rows never reach (`models.unreached`) are in none."""

    embeddings: tuple[str, ...]
    """Parameters before the first block: embeddings of tokens and positions. A tied vocabulary projection is the same weight."""
    blocks: tuple[tuple[str, ...], ...]
    """Parameters of each block, from the first one; blocks of an encoder come before those of its decoder."""
    top: tuple[str, ...]
    """Parameters after the last block: norm, pooler, head."""

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Embeddings, each block, top: those that have parameters."""
        return tuple(part for part in (self.embeddings, *self.blocks, self.top) if part)


def layers_of(model: PreTrainedModel) -> Layers:
    """Return the layers of `model`. Its blocks are the members of the outermost module lists in its body, of those that have at
    least half as many parameters as the largest list: a list of small modules (projections, poolers) has no blocks."""
    blocks = list(_blocks(model))
    block_of = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    body = {id(parameter) for parameter in model.base_model.parameters()}
    inputs = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    embeddings: list[str] = []
    inside: list[list[str]] = [[] for _ in blocks]
    top: list[str] = []
    unreached = {id(parameter) for _, parameter in unreached_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in unreached:
            continue
        if id(parameter) in block_of:
            inside[block_of[id(parameter)]].append(name)
        elif id(parameter) in inputs or (id(parameter) in body and not any(inside)):
            embeddings.append(name)
        else:
            top.append(name)
    return Layers(tuple(embeddings), tuple(map(tuple, inside)), tuple(top))


def _blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    lists = list(_outermost_lists(model.base_model, _unreached_modules(model)))
    sizes = [sum(full_count(parameter) for parameter in module_list.parameters()) for module_list in lists]
    for module_list, size in zip(lists, sizes, strict=True):
        if 2 * size >= max(sizes):
            yield from module_list


def _unreached_modules(model: nn.Module) -> set[nn.Module]:
    parts = unreached_parts(model)
    return {module for name, module in model.named_modules() if name in parts}


def _outermost_lists(module: nn.Module, left_out: set[nn.Module]) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if child in left_out:
            continue
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child, left_out)


def decayed_rates(layers: Layers, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate: 1 for the top, and for each other part `decay` times that of the part
    above it (Howard and Ruder 2018, section 3.2)."""
    return {name: decay**depth for depth, part in enumerate(reversed(layers.parts)) for name in part}
