"""Losses and gradient norms that are known beforehand: faults that both sides of a comparison share show here.

Weights and tokens come from the formula. The numbers were computed in float64 with torch 2.13 and transformers 5.24;
`python -m dstune_verify.golden` prints them anew.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import nn

from dstune_verify.cases import CannotRun, CheckCase, installed
from dstune_verify.models import KINDS, Batch, TinyModel, fill, make_batches, to_device
from dstune_verify.network import Network
from dstune_verify.reference import norm
from dstune_verify.world import World

BOUND = 1e-4
PADDING_BOUND = 1e-4
Figures = tuple[str, dict[str, float], dict[str, float]]

DECODER: dict[str, Any] = {
    "vocab_size": 123, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": DECODER | {"model_type": "llama"},
    "qwen2": DECODER | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": DECODER | {"model_type": "qwen3"},
    "mistral-window": DECODER | {"model_type": "mistral", "sliding_window": 4},
    "gemma2": DECODER | {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 4, "tie_word_embeddings": True},
    "mixtral": DECODER | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 123, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
IN_FLOAT32 = ("mixtral",)
"""Models whose code in transformers mixes types in float64."""
GOLDEN: dict[str, tuple[float, float]] = {
    "plain": (4.50006723, 7.74386668),
    "repeated": (4.20643234, 6.58285457),
    "two-inputs": (4.18162584, 5.39369685),
    "experts": (4.20874786, 6.77759897),
    "llama": (4.95946884, 12.160946),
    "qwen2": (4.72073364, 14.2817515),
    "qwen3": (4.87158346, 12.628135),
    "mistral-window": (5.37318277, 12.2976209),
    "gemma2": (5.86300659, 41.5906128),
    "mixtral": (4.65411186, 8.68119468),
    "gpt2": (5.63514805, 11.4428625),
}
"""Loss and norm of the gradient."""
LAYOUTS = {"mixtral": 140245413}
"""`layout` of models whose weights had other names or shapes in an earlier version: the formula gives those other values."""


def layout(model: nn.Module) -> int:
    """Return a number that names and shapes of the model's weights determine."""
    return zlib.crc32("\n".join(f"{name} {tuple(weight.shape)}" for name, weight in model.named_parameters()).encode())


def loss_and_norm(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the loss and the norm of the gradient of a micro-batch."""
    loss = model(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), norm(gradients)


def check_tiny(world: World) -> Figures:
    """Compare the tiny models with what they give elsewhere."""
    return _compare({name: TinyModel(name) for name in KINDS}, world)


def check_networks(world: World) -> Figures:
    """Compare models of transformers with what they give elsewhere."""
    models: dict[str, nn.Module] = {}
    for name, config in NETWORKS.items():
        try:
            model = Network(config, small=True)
        except CannotRun:  # a model that this version of transformers does not have
            continue
        if layout(model) == LAYOUTS.get(name, layout(model)):
            models[name] = model
    if not models:
        raise CannotRun("this version of transformers has none of the models")
    return _compare(models, world)


def _compare(models: dict[str, Any], world: World) -> Figures:
    batch = to_device(make_batches(0, 1, 1, rows=2, length=13)[0][0], world.device)
    wrong, worst = [], 0.0
    for name, model in models.items():
        measured = loss_and_norm(fill(model).to(world.device), batch)
        for what, value, expected in zip(("loss", "gradient's norm"), measured, GOLDEN[name], strict=True):
            error = abs(value / expected - 1)
            error = error if error == error else math.inf
            worst = max(worst, error)
            if not error <= BOUND:
                wrong.append(f"{name}: the {what} is {value:.6g}, expected {expected:.6g}")
    return "; ".join(wrong[:3]), {"relative error": worst}, {"relative error": BOUND}


def check_padding(world: World) -> Figures:
    """Compare the logits of a row alone with those of the same row with padding on its left and on its right."""
    wrong, worst = [], 0.0
    tokens = make_batches(0, 1, 1, rows=1, length=11)[0][0].tokens.to(world.device)
    length = tokens.shape[1]
    for name in ("llama", "qwen2", "mixtral"):
        for implementation in ("eager", "sdpa"):
            model: Any = fill(Network(NETWORKS[name], small=True)).to(world.device).model
            if not hasattr(model, "set_attn_implementation"):
                raise CannotRun("this version of transformers cannot choose the attention of a model")
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                alone = model(input_ids=tokens, use_cache=False).logits[0]
                for side in ("left", "right"):
                    first = 5 if side == "left" else 0
                    padded = torch.full((2, length + 5), 7, device=world.device)
                    mask = torch.zeros_like(padded)
                    padded[0, first : first + length], mask[0, first : first + length] = tokens[0], 1
                    padded[1], mask[1] = 9, 1
                    positions = (mask.cumsum(-1) - 1).clamp_min(0)
                    logits = model(
                        input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False
                    ).logits
                    error = float((logits[0, first : first + length] - alone).norm() / alone.norm())
                    worst = max(worst, error if error == error else math.inf)
                    if not error <= PADDING_BOUND:
                        wrong.append(f"{name}, {implementation}, padding on the {side}: logits differ by {error:.2g}")
    return "; ".join(wrong[:3]), {"relative error": worst}, {"relative error": PADDING_BOUND}


def _needs_transformers(device: str) -> str:
    return "" if installed("transformers") else "transformers is not installed"


CASES = (
    CheckCase("golden-tiny", "torch", check_tiny),
    CheckCase("golden-transformers", "torch", check_networks, _needs_transformers),
    CheckCase("padding-transformers", "torch", check_padding, _needs_transformers),
)


def main() -> None:
    """Print the numbers, computed in float64."""
    batch = make_batches(0, 1, 1, rows=2, length=13)[0][0]
    models: dict[str, Any] = {name: TinyModel(name) for name in KINDS}
    models |= {name: Network(config, small=True) for name, config in NETWORKS.items()}
    for name, model in models.items():
        exact = model if name in IN_FLOAT32 else model.double()
        loss, size = loss_and_norm(fill(exact), batch)
        print(f'    "{name}": ({loss:.9g}, {size:.9g}),  # layout {layout(model)}')


if __name__ == "__main__":
    main()
