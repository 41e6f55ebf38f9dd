"""The reference of models that see: a plain loop in float64 over rows that the model's own processor prepares, one by one.

It shares nothing with dstune but the files: no rendering, no tokenizing, no masks, no batches.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.parity.reference import Reference

Sample = dict[str, torch.Tensor]


def samples(processor: Any, rows: Path) -> list[Sample]:
    """Inputs of each row with `labels`: the answer up to the end of its turn."""
    return [_sample(processor, rows.parent, row["images"], row["messages"]) for row in _read(rows)]


def _read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


def _sample(processor: Any, folder: Path, names: Sequence[str], messages: Sequence[Any]) -> Sample:
    images = [Image.open(folder / name).convert("RGB") for name in names]
    asked, whole = (
        processor.apply_chat_template(part, tokenize=False, add_generation_prompt=asks)
        for part, asks in ((messages[:-1], True), (messages, False))
    )
    given = {"images": images} if images else {}
    inputs = dict(processor(text=[whole], return_tensors="pt", add_special_tokens=False, **given))
    prompt = processor(text=[asked], return_tensors="pt", add_special_tokens=False, **given)["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    labels[:, -1] = -100  # the line break behind the end of the turn
    return {**inputs, "labels": labels}


def train_plainly(
    folder: Path, rows: Path, *, steps: int, rate: float, sees: bool, dtype: torch.dtype = torch.float64
) -> Reference:
    """SGD over all rows at once. sees: the tower is trained too."""
    processor, model = _load(folder, dtype)
    prepared = samples(processor, rows)

    def loss() -> torch.Tensor:
        sums = [_log_probability(model, sample) for sample in prepared]
        return -torch.stack([total for total, _ in sums]).sum() / sum(count for _, count in sums)

    return _descend(model, loss, steps=steps, rate=rate, sees=sees)


def prefer_plainly(folder: Path, rows: Path, kind: str, *, steps: int, rate: float, sees: bool) -> Reference:
    """The same with the loss `kind` of compared or (`kto`) judged answers, of which the reference is the model at the start.

    Formulas as in the papers, one answer at a time: of `dstune.tasks.preference.head`, beta 0.1 (`simpo` 2, gamma 1).
    """
    processor, model = _load(folder, torch.float64)
    start, table = copy.deepcopy(model), _read(rows)

    def answered(row: dict[str, Any], answer: list[Any]) -> Sample:
        return _sample(processor, rows.parent, row["images"], [*row["prompt"], *answer])

    def ratio(sample: Sample) -> torch.Tensor:
        with torch.no_grad():
            before = _log_probability(start, sample)[0]
        return _log_probability(model, sample)[0] - before

    if kind == "kto":
        judged = [answered(row, row["completion"]) for row in table]
        others = [answered(row, _of_another_prompt(table, at)["completion"]) for at, row in enumerate(table)]
        signs = [1 if row["label"] else -1 for row in table]

        def loss() -> torch.Tensor:
            with torch.no_grad():
                point = torch.stack([ratio(sample) for sample in others]).mean().clamp(min=0)
            above = [sign * 0.1 * (ratio(sample) - point) for sign, sample in zip(signs, judged, strict=True)]
            return 1 - torch.sigmoid(torch.stack(above)).mean()

        return _descend(model, loss, steps=steps, rate=rate, sees=sees)

    pairs = [[answered(row, row[name]) for name in ("chosen", "rejected")] for row in table]

    def of_pair(pair: list[Sample]) -> torch.Tensor:
        if kind in ("dpo", "ipo"):
            better, worse = (ratio(sample) for sample in pair)
            if kind == "dpo":
                return -torch.log(torch.sigmoid(0.1 * (better - worse)))
            counts = [_log_probability(start, sample)[1] for sample in pair]
            return (better / counts[0] - worse / counts[1] - 5) ** 2
        better, worse = (total / count for total, count in (_log_probability(model, sample) for sample in pair))
        if kind == "simpo":
            return -torch.log(torch.sigmoid(2 * (better - worse) - 1))
        odds = [mean - torch.log(1 - torch.exp(mean)) for mean in (better, worse)]
        return -better - 0.1 * torch.log(torch.sigmoid(odds[0] - odds[1]))

    return _descend(
        model, lambda: torch.stack([of_pair(pair) for pair in pairs]).mean(), steps=steps, rate=rate, sees=sees
    )


def _of_another_prompt(table: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """The next row that asks something else, or about another image, and whose answer is as good or bad."""
    following = [*table[at + 1 :], *table[:at]]
    asked = {key: table[at][key] for key in ("prompt", "images")}
    others = [row for row in following if {key: row[key] for key in asked} != asked]
    return next(row for row in others if row["label"] == table[at]["label"])


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(folder, backend="torchvision")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return processor, model.train()


def _log_probability(model: Any, sample: Sample) -> tuple[torch.Tensor, int]:
    """Of all targets of a sample together, and their number."""
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    expected = sample["labels"][0, 1:]
    total = -functional.cross_entropy(logits, expected, ignore_index=-100, reduction="sum")
    return total, int((expected != -100).sum())


def _descend(model: Any, loss_of: Callable[[], torch.Tensor], *, steps: int, rate: float, sees: bool) -> Reference:
    language = {id(weight) for weight in model.get_decoder().parameters()}
    language |= {id(weight) for weight in model.get_output_embeddings().parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if sees or id(weight) in language}
    result = Reference([], [], {})
    for _ in range(steps):
        loss = loss_of()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        result.losses.append(float(loss.detach()))
        result.grad_norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                if gradient is not None:
                    parameter -= rate * gradient
    result.weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return result
