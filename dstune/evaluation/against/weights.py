"""Names what differs between the weights of two models, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dstune.evaluation.against.difference import Difference, listed
from dstune.evaluation.against.sides import Side, coarser

ROUNDING = {
    "float32": 1e-5,
    "float16": 1e-3,
    "bfloat16": 4e-3,
    "fp8": 0.05,
    "8 bits": 0.03,
    "6 bits": 0.06,
    "5 bits": 0.1,
    "4 bits": 0.2,
    "3 bits": 0.4,
    "2 bits": 0.7,
}
"""Largest root-mean-square difference of a matrix, relative to its own size, that storing it in this precision makes; with
bf16, for two roundings: before and after a merge."""
LEAST_SHARE, MOST_SHARE = 0.5, 1.5
"""Of an adapter's change of a matrix, what a merged file must show: rounding does not point in the direction of the change."""
LARGEST_F16 = 65504.0
_LAYER = re.compile(r"^(.*?\.)(\d+)(\..+)$")


def compare_weights(model: Side, expected: Side) -> Iterator[Difference]:
    """Yield what differs in the weights, the most specific name for each tensor."""
    weights, expected_weights = model.weights, expected.weights
    explained: set[str] = set()
    precision = coarser(model.precision, expected.precision)
    for finding, names in (
        *_lost(model, expected),
        *_overflown(weights, expected_weights, model, expected),
        *_head(model, expected, precision),
        *_embedding(model, expected, weights, expected_weights, precision),
        *_layers(weights, expected_weights, model, expected, precision),
    ):
        explained |= names
        yield finding
    if any(name.endswith("embed_tokens.weight") for name in explained) and model.module.config.tie_word_embeddings:
        explained |= {name for name in weights if name.startswith("lm_head")}
    shared = [name for name in expected_weights if name in weights and name not in explained]
    differing = {
        name
        for name in shared
        if weights[name].shape != expected_weights[name].shape
        or relative_difference(weights[name], expected_weights[name]) > ROUNDING[precision]
    }
    yield from _adapter(model, expected, weights, expected_weights, differing, explained, shared)


def relative_difference(weight: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference relative to that of `expected`; infinite for NaN."""
    weight, expected = weight.detach().float(), expected.detach().float()
    length = float(expected.norm())
    value = float((weight - expected).norm()) / (length or 1.0)
    return value if value == value else float("inf")


Findings = Iterator[tuple[Difference, set[str]]]
"""Differences with the names of the tensors that they explain."""


def _lost(model: Side, expected: Side) -> Findings:
    """Yield weights that the files lack or hold in another shape."""
    missing = set(model.missing) - set(expected.missing)
    if head := {name for name in missing if name.startswith(("lm_head", "output", "embed_out"))}:
        detail = (
            f"its files hold no {listed(sorted(head))}, and its configuration does not tie it to the embeddings: the head is "
            "random"
        )
        yield Difference("head_missing", detail, "save it again with its head, or merge the adapter again"), head
    if other := missing - head:
        detail = f"its files lack {len(other):,} weights, which would be random: {listed(sorted(other))}"
        yield (
            Difference("weights_missing", detail, "copy all shards, and model.safetensors.index.json that names them"),
            other,
        )
    expected_weights = expected.weights
    for name in model.misshapen:
        stored, wanted = model.stored(name), expected_weights.get(name)
        if stored is None or wanted is None:
            continue
        if stored.ndim == 2 and stored.shape == wanted.T.shape and _equal(stored.T, wanted):
            yield _transposed(name, expected), {name}
        elif "embed" in name or name.startswith("lm_head"):
            detail = f"{name} has {len(stored):,} rows, its configuration says {model.module.config.vocab_size:,}"
            fix = "write the number of rows as vocab_size into config.json"
            yield Difference("embedding_resized", detail, fix), {name}
        else:
            detail = f"{name} has the shape {list(stored.shape)}, {expected.name} has {list(wanted.shape)}"
            yield Difference("shape", detail, f"convert it again from {expected.name}"), {name}
    if unread := [name for name in model.unread if name not in expected.unread and not name.startswith("lm_head")]:
        layers = sorted({match[2] for match in map(_LAYER.match, unread) if match}, key=int)
        adapters = [name for name in unread if "lora_" in name or ".base_layer." in name]
        if adapters:
            detail = (
                f"its files hold the parts of an adapter beside the weights, which nothing reads: {listed(adapters)}"
            )
            yield Difference("adapter_unmerged", detail, "merge the adapter (merge_and_unload), then save"), set()
        elif layers:
            detail = f"its files hold layers that its configuration leaves out: {listed(layers)}"
            yield (
                Difference("layers_unread", detail, f"write num_hidden_layers of {expected.name} into config.json"),
                set(),
            )
        else:
            detail = f"its files hold {len(unread):,} tensors that nothing reads: {listed(unread)}"
            yield Difference("weights_unread", detail, "rename them as the architecture names them"), set()


def _overflown(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: Side, expected: Side) -> Findings:
    names = set()
    for name, weight in weights.items():
        if name not in wanted or weight.shape != wanted[name].shape or not weight.is_floating_point():
            continue
        clipped = weight.abs() >= LARGEST_F16
        if not weight.isfinite().all() or bool((clipped & (wanted[name].abs() > weight.abs())).any()):
            names.add(name)
    if names:
        shown = listed(sorted(names))
        detail = (
            f"{len(names):,} tensors hold values that overflowed in {model.precision} (infinite, NaN or cut): {shown}"
        )
        yield Difference("overflow", detail, "save it in bf16 or fp32, whose largest number is 3e38"), names


def _head(model: Side, expected: Side, precision: str) -> Findings:
    """Yield a head that was tied to the embeddings although training untied it."""
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    wanted, wanted_head = expected.module.get_input_embeddings(), expected.module.get_output_embeddings()
    if head is None or wanted_head is None or _equal(wanted.weight, wanted_head.weight):
        return
    tied = head.weight is embedding.weight or _equal(embedding.weight, head.weight)
    flagged = bool(model.module.config.tie_word_embeddings)
    if tied or (flagged and not expected.module.config.tie_word_embeddings):
        detail = f"its output head is its input embedding, {expected.name} has two different matrices"
        if not tied:
            detail = (
                "its files hold a head of its own, but config.json says tie_word_embeddings: engines drop that head"
            )
        fix = "write tie_word_embeddings: false into config.json, and save both matrices"
        yield Difference("head_retied", detail, fix), {name for name in model.weights if name.startswith("lm_head")}


def _embedding(
    model: Side, expected: Side, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], precision: str
) -> Findings:
    name = next((name for name, value in weights.items() if value is model.module.get_input_embeddings().weight), None)
    name = name or next(
        (name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))), None
    )
    if name is None or name not in wanted or name in model.misshapen:
        return
    rows, wanted_rows = weights[name], wanted[name]
    names = {name, *(key for key in weights if key.startswith(("lm_head", "embed_out")))}
    if len(rows) != len(wanted_rows):
        detail = f"its embedding has {len(rows):,} rows, that of {expected.name} {len(wanted_rows):,}"
        fix = f"resize_token_embeddings({len(wanted_rows)}), or do not pad the vocabulary"
        yield Difference("embedding_resized", detail, fix), names
        return
    if relative_difference(rows, wanted_rows) <= ROUNDING[precision]:
        return
    for shift in (*range(1, 9), *range(-8, 0)):
        moved, held = (rows[shift:], wanted_rows[:-shift]) if shift > 0 else (rows[:shift], wanted_rows[-shift:])
        if len(held) and relative_difference(moved, held) <= ROUNDING[precision]:
            detail = f"the rows of its embedding are those of {expected.name}, {abs(shift)} {'later' if shift > 0 else 'earlier'}"
            fix = "add tokens behind the vocabulary, and copy the rows in the order of the tokenizer's numbers"
            yield Difference("vocabulary_shifted", detail, fix), names
            return


def _layers(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: Side, expected: Side, precision: str
) -> Findings:
    """Yield layers that were dropped or stand in another order."""
    layers, wanted_layers = _by_layer(weights), _by_layer(wanted)
    if not layers or not wanted_layers:
        return
    matches = {}
    for number, tensors in layers.items():
        if number in wanted_layers and _same_layer(tensors, wanted_layers[number], precision):
            matches[number] = number
            continue
        match = [other for other, held in wanted_layers.items() if _same_layer(tensors, held, precision)]
        if match:
            matches[number] = match[0]
    every = {name for name in weights if _LAYER.match(name)}
    if len(layers) != len(wanted_layers) and any(map(_LAYER.match, model.unread)):  # named by `_lost`
        return
    if len(layers) != len(wanted_layers):
        lost = sorted(set(wanted_layers) - set(matches.values()))
        detail = f"has {len(layers)} layers, {expected.name} has {len(wanted_layers)}"
        if matches and len(lost) == len(wanted_layers) - len(layers):
            detail += f"; layer {listed(map(str, lost))} is missing"
        yield Difference("layer_missing", detail, f"convert it again from {expected.name}"), every
    elif moved := {number: match for number, match in matches.items() if number != match}:
        places = listed(f"layer {number} is layer {match}" for number, match in moved.items())
        detail = f"its layers stand in another order than in {expected.name}: {places}"
        names = {name for name in every if _number(name) in moved}
        yield Difference("layers_moved", detail, "sort layers by number, not by text (10 comes after 9)"), names


def _number(name: str) -> int:
    match = _LAYER.match(name)
    assert match is not None
    return int(match[2])


def _by_layer(weights: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if (match := _LAYER.match(name)) and weight.ndim == 2:
            layers.setdefault(int(match[2]), {})[match[3]] = weight
    return layers


def _same_layer(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor], precision: str) -> bool:
    return tensors.keys() == others.keys() and all(
        weight.shape == others[key].shape and relative_difference(weight, others[key]) <= ROUNDING[precision]
        for key, weight in tensors.items()
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and relative_difference(first, second) < 1e-6


def _transposed(name: str, expected: Side) -> Difference:
    detail = f"{name} is transposed"
    return Difference(
        "transposed", detail, f"convert it again from {expected.name}: Conv1D and Linear store other axes first"
    )


def _adapter(
    model: Side,
    expected: Side,
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    differing: set[str],
    explained: set[str],
    shared: list[str],
) -> Iterator[Difference]:
    """Yield what is wrong with a merge, where one side is a base with its adapter; then the tensors that nothing explains."""
    for name in sorted(differing):
        if (
            weights[name].ndim == 2
            and weights[name].shape == wanted[name].T.shape
            and _equal(weights[name].T, wanted[name])
        ):
            yield _transposed(name, expected)
            explained.add(name)
    differing = differing - explained
    adapter = expected if expected.base_weights else model
    base = {name: weight for name, weight in adapter.base_weights.items() if name in shared and name not in explained}
    base = {name: weight for name, weight in base.items() if weight.shape == weights[name].shape == wanted[name].shape}
    rounding = _rounding_of_merge(weights, wanted, base, differing)
    if rounding:
        detail = (
            f"{len(differing):,} matrices are rounded as by {rounding} before the adapter was added: it was merged into "
            "quantized weights"
        )
        yield Difference("merge_quantized", detail, f"merge the adapter into {adapter.base or 'the base'} in 16 bits")
        return
    untouched = differing - set(base)
    if base and untouched and len(untouched) >= 0.5 * len(set(shared) - set(base)):
        other = f"the base of {model.name} is {model.base}" if model.base and expected.base else f"base: {adapter.base}"
        detail = f"{len(untouched):,} tensors that the adapter does not change differ ({other}): the adapter is on another base"
        yield Difference("wrong_base", detail, f"put the adapter on {expected.base or model.base}")
        return
    if base:
        yield from _effect(model, expected, weights, wanted, base, differing)
        differing = untouched
    if differing:
        count, total = len(differing), len(shared)
        worst = max(differing, key=lambda name: relative_difference(weights[name], wanted[name]))
        share = relative_difference(weights[worst], wanted[worst])
        detail = f"{count:,} of {total:,} tensors differ, most {worst} by {share:.0%} of its size"
        yield Difference(
            "weights", detail, f"another model, another step of its training, or a faulty conversion of {expected.name}"
        )


def _effect(
    model: Side,
    expected: Side,
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    differing: set[str],
) -> Iterator[Difference]:
    """Yield how much of the adapter's change the model shows, if not all of it."""
    shares, unexplained = {}, set()
    for name, before in base.items():
        change, shown = wanted[name].float() - before.float(), weights[name].float() - before.float()
        if model.base_weights and not expected.base_weights:
            change, shown = shown, change
        squared = float(change.square().sum())
        if squared == 0:
            continue
        share = float((change * shown).sum()) / squared
        shares[name] = share
        rest = float((shown - share * change).norm()) / squared**0.5
        if name in differing and rest > 0.2:
            unexplained.add(name)
    absent = sorted(name for name, share in shares.items() if abs(share) < 0.05 and name not in unexplained)
    if shares and len(absent) == len(shares):
        yield Difference(
            "adapter_not_merged", "its weights are those of the base: the adapter has no effect", "merge it again"
        )
        return
    if absent:
        detail = f"{len(absent):,} of {len(shares):,} matrices that the adapter changes are those of the base: {listed(absent)}"
        yield Difference("adapter_partly_merged", detail, "merge all of the adapter's modules")
    scaled = {
        name: share
        for name, share in shares.items()
        if name not in absent and name not in unexplained
        and (not LEAST_SHARE <= share <= MOST_SHARE or (name in differing and abs(share - 1) > 0.02))
    }  # fmt: skip
    if scaled:
        factor = sum(scaled.values()) / len(scaled)
        detail = f"the adapter's change of {len(scaled):,} matrices is {factor:.3g} times that of {expected.name}"
        yield Difference(
            "adapter_scale", detail, "compare lora_alpha, r and use_rslora; a factor of 2 is an adapter merged twice"
        )
    if unexplained:
        detail = (
            f"{len(unexplained):,} matrices that the adapter changes have other values: {listed(sorted(unexplained))}"
        )
        yield Difference("weights", detail, "another adapter or another step of its training was merged")


def _rounding_of_merge(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: Mapping[str, Tensor], differing: set[str]
) -> str:
    """Return the format whose rounding of the base explains the differences; empty if there is none."""
    matrices = [
        name for name in sorted(differing) if weights[name].ndim == 2 and weights[name].shape == wanted[name].shape
    ]
    if not matrices or not base or len(matrices) < 0.5 * len(differing):
        return ""
    for label, rounded in _roundings().items():
        for name in matrices[:8]:
            before = (base.get(name, wanted[name])).float()
            change = wanted[name].float() - before
            try:
                guess = rounded(before) + change
            except (RuntimeError, ValueError):  # a shape that the format does not take
                break
            distance = float((weights[name].float() - wanted[name].float()).norm())
            if float((weights[name].float() - guess).norm()) > 0.3 * distance:
                break
        else:
            return label
    return ""


def _roundings() -> dict[str, Any]:
    roundings: dict[str, Any] = {"FP8": _rounded_to_fp8, "8 bits a row": _rounded_to_rows_of_int8}
    try:
        from bitsandbytes import functional
    except (ImportError, RuntimeError):
        return roundings

    def four_bits(kind: str) -> Any:
        def rounded(weight: Tensor) -> Tensor:
            codes, state = functional.quantize_4bit(weight.contiguous(), quant_type=kind, blocksize=64)
            return functional.dequantize_4bit(codes, state).float()

        return rounded

    return {"NF4": four_bits("nf4"), "FP4": four_bits("fp4"), **roundings}


def _rounded_to_fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 448.0
    return (weight / scale.clamp_min(1e-12)).to(torch.float8_e4m3fn).float() * scale


def _rounded_to_rows_of_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127.0
    return (weight / scale).round() * scale
