"""Tiny checkpoints whose weights are stored in few bits, beside the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Of the four bits of E2M1 (OCP Microscaling Formats v1.0, table 5)."""
BLOCK = 32
"""Numbers with one scale in MXFP4."""

Store = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""Weight -> the tensors that are stored of it, by the last part of their names, and the values that they stand for."""


def store_in_fp8(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Store the linear layers of the decoder in `folder` in FP8 with a scale for each square of `block`, as DeepSeek and Qwen do.
    Returns all weights as they stand."""
    tensors, stored, values = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = values[name] = weight
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        scales = torch.empty(rows, columns)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        values[name] = torch.empty(weight.shape)
        for row in range(rows):
            for column in range(columns):
                at = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
                scales[row, column] = weight[at].abs().max() / 448
                codes[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
                values[name][at] = codes[at].float() * scales[row, column]
        stored |= {name: codes, f"{name}_scale_inv": scales}
    _write(folder, stored, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]})
    return values


def store_in_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Store the experts of the gpt-oss in `folder` in MXFP4, as OpenAI does. Returns all weights as they stand."""
    tensors, stored, values = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = values[name] = weight
            continue
        by_row = weight.transpose(1, 2).contiguous()  # in the files the numbers that are summed lie beside each other
        groups = by_row.reshape(*by_row.shape[:2], -1, BLOCK)
        exponents = (groups.abs().amax(-1).clamp_min(2.0**-100).log2().floor() - 2).clamp(-127, 127)
        scaled = groups / 2 ** exponents[..., None]
        codes = (scaled[..., None] - FP4).abs().argmin(-1)
        values[name] = (FP4[codes] * 2 ** exponents[..., None]).reshape(by_row.shape).transpose(1, 2).contiguous()
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    _write(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return values


def store_each(folder: Path, store: Store, settings: dict[str, object] | None) -> dict[str, torch.Tensor]:
    """Store each linear layer of the decoder in `folder` by `store`. Returns all weights as they stand."""
    stored, values = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors, values[name] = store(weight)
            stored |= {f"{name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in tensors.items()}
        else:
            stored[name] = values[name] = weight
    _write(folder, stored, settings)
    return values


def in_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """E4M3 with a scale for the whole weight, as AutoFP8, ModelOpt and compressed-tensors name the tensors."""
    scale = weight.abs().max().reshape(1) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, codes.float() * scale


def in_int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Integers from -8 to 7 with a scale and a zero for 16 of them, eight in 32 bits."""
    groups = weight.reshape(len(weight), -1, 16)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    codes = (groups / scale + zero).round().clamp(-8, 7)
    shifts = torch.arange(0, 32, 4)
    packed = ((codes.reshape(len(weight), -1, 8).long() + 8) << shifts).sum(-1).int()
    zeros = ((zero[..., 0].T.reshape(-1, len(weight) // 8, 8).long() + 8) << shifts).sum(-1).int().T.contiguous()
    shape = torch.tensor(weight.shape)
    tensors = {
        "weight_packed": packed,
        "weight_shape": shape,
        "weight_scale": scale[..., 0],
        "weight_zero_point": zeros,
    }
    return tensors, ((codes - zero) * scale).reshape(weight.shape)


def in_nvfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """E2M1 with a scale in E4M3 for 16 numbers, and one in fp32, by which scales are divided, for all."""
    whole = (448 * 6 / weight.abs().max()).reshape(1)
    groups = weight.reshape(len(weight), -1, 16)
    scales = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    steps = (scales.float() / whole)[..., None]
    codes = ((groups / steps)[..., None] - FP4).abs().argmin(-1)
    flat = codes.reshape(weight.shape)
    packed = (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8)
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
    return tensors, (FP4[codes] * steps).reshape(weight.shape)


def compressed(format_name: str, **weights: object) -> dict[str, object]:
    """The settings of compressed-tensors for `store_each`."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    settings = {"quant_method": "compressed-tensors", "format": format_name, "quantization_status": "compressed"}
    return settings | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def _write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object] | None) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
