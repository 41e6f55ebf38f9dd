"""Architectures without a closed form: a child process builds the model on the meta device and lists its tensors.

The child (`dstune.models.inventory`) takes some seconds for torch and transformers, once: its answer is kept in the cache by the
digest of `config.json`. All tensors are exact. What memory and time depend on beside them is estimated: an `Architecture` whose
layers keep as much as these matrices give.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import read_object
from dstune.core.paths import cache_root
from dstune.planning.architectures.tensors import Architecture, Tensor

CHILD_SECONDS, SECONDS_OF_MODEL = 60, 5
"""Time limit of the child in seconds, and more for each further model; the largest published models take one."""
FORMAT = 3
"""Format of the cached inventories."""

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
ATTENTION = re.compile(r"attn|attention|\.[qkvo]_proj\.")
LINEAR = re.compile(r"linear|mamba|conv|recurrent|lightning")
"""Kinds of layers without direct attention between positions."""
LINEAR_CHUNK = 64
"""Positions that a linear attention or state space layer processes at once: its cost grows linearly with the row, not
quadratically."""


def count(configs: Sequence[Mapping[str, Any]], head: str, labels: int) -> list[dict[str, Any]]:
    """Return the inventory of each whole `config.json`, from the cache or from one child for all that are not in it.

    An inventory of a model that cannot be built is `{"error": reason}`, which is not cached: a package may have been missing, or
    room in the temporary folder.

    Raises:
        UserError: the child ended otherwise, or took too long.
    """
    places = [_place(values, head, labels) for values in configs]
    inventories = [read_object(place) for place in places]
    missing = [index for index, inventory in enumerate(inventories) if inventory is None or "error" in inventory]
    if missing:
        answers = _ask([configs[index] for index in missing], head, labels)
        for index, answer in zip(missing, answers, strict=True):
            inventories[index] = answer
            if "error" in answer:
                continue
            places[index].parent.mkdir(parents=True, exist_ok=True)
            files.write(places[index], json.dumps(answer))
    return [inventory or {} for inventory in inventories]


def _place(values: Mapping[str, Any], head: str, labels: int) -> Path:
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = ""
    identity = json.dumps([FORMAT, installed, head, labels, values], sort_keys=True)
    return cache_root() / "architectures" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


def _ask(configs: Sequence[Mapping[str, Any]], head: str, labels: int) -> list[dict[str, Any]]:
    request = json.dumps({"head": head, "labels": labels, "configs": configs})
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    limit = CHILD_SECONDS + SECONDS_OF_MODEL * (len(configs) - 1)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dstune.models.inventory"],
            input=request,
            capture_output=True,
            text=True,
            timeout=limit,
            env=child_environment() | offline,
        )
        answers: list[dict[str, Any]] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        lines = [] if isinstance(error, subprocess.TimeoutExpired) else done.stderr.strip().splitlines()
        reason = lines[-1][:200] if lines else f"no answer within {limit} s"
        fix = "choose a model with a correct config.json"
        raise UserError(Problem("model.path", f"its tensors cannot be counted: {reason}", fix)) from None
    return answers


def counted(whole: Mapping[str, Any], head: str, labels: int) -> Architecture:
    """Return the architecture of a complete `config.json`, counted by building the model without memory.

    Raises:
        UserError: transformers has no such model.
    """
    kind = whole.get("model_type")
    if not isinstance(kind, str) or not kind:
        reason = f"its config.json has {'no model_type' if kind is None else 'a model_type that is no name'}"
        raise UserError(Problem("model.path", reason, "give a whole config.json, of a model for transformers"))
    (inventory,) = count([whole], head, labels)
    if "error" in inventory:
        reason = f"transformers cannot build the architecture {kind[:100]} from its config.json: {inventory['error']}"
        raise UserError(Problem("model.path", reason, "a whole config.json, of an architecture that transformers has"))
    return from_inventory(inventory)


def from_inventory(inventory: Mapping[str, Any]) -> Architecture:
    """Return the architecture from the tensors and the numbers of the language model's configuration."""
    values = inventory["values"]
    tensors = _tensors(values, inventory)
    layers = 1 + max((tensor.layer for tensor in tensors if tensor.layer is not None), default=-1)
    embedding_shape = next((t.shape for t in tensors if t.name == inventory["embedding"]), (0, 0))
    hidden = _number(values, "hidden_size", "d_model", "n_embd", "dim") or embedding_shape[1]
    heads = _number(values, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads") or 1
    latent = _number(values, "kv_lora_rank") > 0
    split = _number(values, "qk_nope_head_dim") + _number(values, "qk_rope_head_dim")
    kv_heads = heads if latent else _number(values, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    widths = [_feed_forward_width(layer, hidden) for layer in _by_layer(tensors, layers)]
    kinds = values.get("layer_types") or ()
    linear = sum(bool(LINEAR.search(str(kind))) for kind in kinds) or sum(
        not any(_attends(t) for t in layer) for layer in _by_layer(tensors, layers)
    )
    window, windowed = _windows(values, layers, linear)
    experts_per_token = _experts_per_token(values)
    return Architecture(
        kind=str(values.get("model_type")),
        tensors=tensors,
        layers=layers,
        hidden=hidden,
        intermediate=round(sum(widths) / max(1, layers)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=(split if latent and split else 0) or _number(values, "head_dim") or hidden // heads,
        vocabulary=_number(values, "vocab_size") or embedding_shape[0],
        gated=True,
        tied=inventory["output"] is not None and inventory["output"] == inventory["embedding"],
        norms=_norms(tensors, hidden, layers),
        query_norm=any("q_norm" in tensor.name for tensor in tensors),
        encoder=inventory["output"] is None and not bool(values.get("is_encoder_decoder")) and _is_encoder(values),
        encoder_decoder=bool(values.get("is_encoder_decoder")),
        window=window,
        windowed_layers=windowed,
        soft_capped=bool(values.get("final_logit_softcapping")),
        experts=experts_per_token if any(_is_expert(tensor) for tensor in tensors) else 0,
        expert_pattern=inventory["expert_pattern"],
        unadapted=tuple(inventory["unadapted"]),
        unreached=int(inventory["unreached"]),
    )


def _tensors(values: Mapping[str, Any], inventory: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the tensors, the embedding first, with the layer of each, and the share of positions that it is used by."""
    layers: dict[str, int] = {}
    experts_per_token = _experts_per_token(values)
    tensors = []
    for name, shape, is_linear in inventory["tensors"]:
        layer = None
        if at := LAYER.search(name):
            layer = layers.setdefault(name[: at.end(1)], len(layers))
        share_of_positions = 1.0 if is_linear else 0.0
        if len(shape) == 3 and layer is not None and "expert" in name:
            share_of_positions = min(1.0, experts_per_token / shape[0])
        tensors.append(Tensor(name, tuple(shape), linear=is_linear, layer=layer, used=share_of_positions))
    return tuple(sorted(tensors, key=lambda tensor: tensor.name != inventory["embedding"]))


def _by_layer(tensors: Sequence[Tensor], layers: int) -> list[list[Tensor]]:
    tensors_by_layer: list[list[Tensor]] = [[] for _ in range(layers)]
    for tensor in tensors:
        if tensor.layer is not None:
            tensors_by_layer[tensor.layer].append(tensor)
    return tensors_by_layer


def _is_expert(tensor: Tensor) -> bool:
    return len(tensor.shape) == 3 and tensor.used > 0


def _attends(tensor: Tensor) -> bool:
    """Return whether the tensor is a matrix of attention over all positions; models that mix both call the other kind
    `linear_attn` or so."""
    return tensor.linear and bool(ATTENTION.search(tensor.name)) and "linear_att" not in tensor.name


def _feed_forward_width(layer: Sequence[Tensor], hidden: int) -> float:
    """Return the width of the gated feed-forward network that keeps as much as the layer's matrices outside attention: half of
    their outputs per position, without the projections back to the hidden size."""
    width = 0.0
    for tensor in layer:
        if _is_expert(tensor):  # [experts, 2 x width, hidden], or the last two turned around
            width += tensor.used * tensor.count / hidden if "up" in tensor.name else 0.0
        elif (
            tensor.linear
            and not _attends(tensor)
            and not re.search(r"down|out|fc2|w2|c_proj|router|\.gate\.", tensor.name)
        ):
            width += tensor.shape[0]
    return width / 2


def _norms(tensors: Sequence[Tensor], hidden: int, layers: int) -> int:
    norms = sum(t.layer is not None and t.shape == (hidden,) and "norm" in t.name for t in tensors)
    return max(1, round(norms / max(1, layers)))


def _windows(values: Mapping[str, Any], layers: int, linear: int) -> tuple[int | None, int]:
    """Return the window of attention and how many layers have it; layers without attention have one of `LINEAR_CHUNK`."""
    kinds = values.get("layer_types")
    sliding = sum("sliding" in str(kind) for kind in kinds) if isinstance(kinds, list) else 0
    window = _number(values, "sliding_window", "attention_chunk_size")
    if window and (sliding or not isinstance(kinds, list)):
        return window, sliding or (linear or layers)
    return (LINEAR_CHUNK, linear) if linear else (None, 0)


def _experts_per_token(values: Mapping[str, Any]) -> int:
    """Return the number of experts that a position is sent to."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")
    return _number(values, *names) or 1


def _is_encoder(values: Mapping[str, Any]) -> bool:
    return not bool(values.get("is_decoder")) and not any(key in values for key in ("num_key_value_heads", "n_embd"))


def _number(values: Mapping[str, Any], *names: str) -> int:
    """Return the first of `names` whose value is an integer; 0 if there is none."""
    return next(_numbers(values, names), 0)


def _numbers(values: Mapping[str, Any], names: Sequence[str]) -> Iterator[int]:
    for name in names:
        value = values.get(name)
        if isinstance(value, list) and value and type(value[0]) is int:  # one for each layer
            yield max(number for number in value if type(number) is int)
        elif type(value) is int:
            yield value
