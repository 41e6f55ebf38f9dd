"""Tiny checkpoints whose weights are stored in few bits, beside the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Of the four bits of E2M1 (OCP Microscaling Formats v1.0, table 5)."""
BLOCK = 32
"""Numbers with one scale in MXFP4."""


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


def _write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
