"""The reference of models that see: a plain loop in float64 over rows that the model's own processor prepares, one by one.

It shares nothing with dstune but the files: no rendering, no tokenizing, no masks, no batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.parity.reference import Reference


def samples(processor: Any, rows: Path) -> list[dict[str, torch.Tensor]]:
    """Inputs of each row with `labels`: the answer up to the end of its turn."""
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        images = [Image.open(rows.parent / name).convert("RGB") for name in row["images"]]
        asked, whole = (
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
            for messages, asks in ((row["messages"][:-1], True), (row["messages"], False))
        )
        given = {"images": images} if images else {}
        inputs = dict(processor(text=[whole], return_tensors="pt", add_special_tokens=False, **given))
        prompt = processor(text=[asked], return_tensors="pt", add_special_tokens=False, **given)["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :prompt] = -100
        labels[:, -1] = -100  # the line break behind the end of the turn
        found.append({**inputs, "labels": labels})
    return found


def train_plainly(
    folder: Path, rows: Path, *, steps: int, rate: float, sees: bool, dtype: torch.dtype = torch.float64
) -> Reference:
    """SGD over all rows at once. sees: the tower is trained too."""
    processor = AutoProcessor.from_pretrained(folder, backend="torchvision")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.train()
    language = {id(weight) for weight in model.get_decoder().parameters()}
    language |= {id(weight) for weight in model.get_output_embeddings().parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if sees or id(weight) in language}
    prepared = samples(processor, rows)
    result = Reference([], [], {})
    for _ in range(steps):
        losses, weight = [], 0
        for sample in prepared:
            inputs = {name: value for name, value in sample.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            expected = sample["labels"][0, 1:]
            losses.append(functional.cross_entropy(logits, expected, ignore_index=-100, reduction="sum"))
            weight += int((expected != -100).sum())
        loss = torch.stack(losses).sum() / weight
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        result.losses.append(float(loss.detach()))
        result.grad_norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                if gradient is not None:
                    parameter -= rate * gradient
    result.weights = {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
    return result
