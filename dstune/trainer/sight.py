"""Checks before the first step of runs whose rows have images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.images.batch import image_inputs
from dstune.data.images.places import COLUMN
from dstune.data.images.processor import BLANK, FAMILIES, processor_of
from dstune.data.prepared import PreparedData, Split
from dstune.models.heads.base import inputs_of
from dstune.models.packing import TOLERANCE
from dstune.protocols import method_of, parallelism_of
from dstune.zero.engine import Engine

TEXT_TOKENS = 6
"""Text tokens of each test sample, beside its image."""


def refuse_with_images(config: RunConfig, data: PreparedData) -> None:
    """Raise UserError with all settings that rows with images do not support, or for training a vision tower without images."""
    split = data.train
    if split.images is None:
        if config.model.train_vision:
            reason = "no training row holds an image, so the tower would only decay"
            raise UserError(Problem("model.train_vision", reason, "model.train_vision=false", "true"))
        return
    assert split.vision is not None
    family, kind = FAMILIES[split.vision.model_type], split.vision.model_type
    problems = []
    if config.data.packing and family.unpackable:
        problems.append(Problem("data.packing", f"{kind}: {family.unpackable}", "data.packing=false", "true"))
    if parallelism_of(config.parallel).size > 1:
        reason = "ranks that share rows or weights would each need all images of a row"
        problems.append(Problem("parallel", reason, "parallel=none", config.parallel.name))
    if method_of(config.method).in_front:
        reason = "trained positions in front of a row move the images in it"
        problems.append(Problem("method", reason, "method=lora", config.method.name))
    if problems:
        raise UserError(problems)


def prove_images(
    config: RunConfig, engine: Engine, data: PreparedData, world: World, message: Callable[[str], None]
) -> None:
    """Check with two samples, each an image and some text, that the model sees a sample's image, and that in packed rows no sample
    sees another's: replacing the image of the first sample must not change the logits of the second.

    Every rank calls it. Raises UserError on all ranks if a sample sees another one's image.
    """
    split = data.train
    if split.images is None:
        return
    engine.train(False)
    packed, single, other = _trial_batches(split, packing=config.data.packing)
    with torch.no_grad():
        logits_before, logits_after = (_logits(engine, batch) for batch in (packed, other))
        alone = _logits(engine, single) if config.data.packing else None
    engine.train(True)
    length = len(processor_of(split.vision).blank[0]) + TEXT_TOKENS if split.vision else 0
    largest = float(logits_before.abs().max())
    moved = float((logits_before[:1, :length] - logits_after[:1, :length]).abs().max()) / largest
    if not world.any(moved > 0):
        message("warning: another image gives the same logits: the model does not see")
    if alone is None:
        return
    second = slice(length, 2 * length)
    leaks = [logits_before[:1, second] - logits_after[:1, second], logits_before[:1, second] - alone[:1, :length]]
    worst = max((float(leak.abs().max()) / largest for leak in leaks), key=lambda value: (value != value, value))
    if world.any(not worst <= TOLERANCE[logits_before.dtype]):
        reason = f"a packed sample of {config.model.path} sees the image of another one (logits differ by {worst:.1%})"
        raise UserError(Problem("data.packing", reason, "data.packing=false", "true"))


class _TwoImages:
    """Test images of noise, by number, in place of a run's files."""

    folder = "the images of the proof"

    def image(self, number: int) -> Any:
        from PIL import Image

        pixels = np.random.default_rng(number).integers(0, 256, (*BLANK, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def _trial_batches(split: Split, *, packing: bool) -> tuple[Mapping[str, Any], ...]:
    """Return three batches of two equal rows: both samples packed (or the first one alone, without packing), the second sample
    alone, and the first batch with another image in its first sample."""
    assert split.vision is not None
    ids, _ = processor_of(split.vision).blank
    text = [token for token in range(3, 3 + 4 * TEXT_TOKENS) if token not in ids][:TEXT_TOKENS]
    drawn = replace(split, images=_TwoImages())  # type: ignore[arg-type]

    def sample(number: int, before: int) -> dict[str, Any]:
        return {"input_ids": np.array([*text[:before], *ids, *text[before:]]), COLUMN: np.array([number])}

    def batch(*samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        row = np.concatenate([each["input_ids"] for each in samples])
        positions = np.concatenate([np.arange(len(each["input_ids"])) for each in samples])
        tensors = {"input_ids": torch.from_numpy(np.stack([row, row]))}
        if packing:
            tensors["position_ids"] = torch.from_numpy(np.stack([positions, positions]))
        else:
            tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        return tensors | image_inputs(drawn, [samples, samples], tensors, packing=packing)

    # The images are at different positions of the samples: some models look for an image where the previous sample has its own.
    first, second, exchanged = sample(1, 0), sample(2, TEXT_TOKENS // 2), sample(3, 0)
    if not packing:
        return batch(first), batch(second), batch(exchanged)
    return batch(first, second), batch(second), batch(exchanged, second)


def _logits(engine: Engine, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(engine.module.parameters()).dtype
    inputs: dict[str, Any] = {name: value.to(engine.device) for name, value in inputs_of(batch, dtype).items()}
    inputs["use_cache"] = False
    logits: torch.Tensor = engine.forward(**inputs).logits
    return logits
