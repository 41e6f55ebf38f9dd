"""Build the model inputs of a micro-batch's images. Pixels of training rows are decoded here, and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dstune.core.errors import Problem, UserError
from dstune.data.images.places import COLUMN
from dstune.data.images.positions import three_positions
from dstune.data.images.processor import ImageProcessor, Inputs, processor_of
from dstune.data.problems import RowError

if TYPE_CHECKING:
    from dstune.data.prepared import Split
    from dstune.data.sampler import MicroBatch

BLANK_NUMBER = -1
"""Number of the image in a `blank_sample`."""

Rows = Sequence[Sequence[Mapping[str, Any]]]


def with_images_everywhere(
    micro_batches: Sequence[MicroBatch], split: Split, *, needed: bool, trained: bool = False
) -> list[MicroBatch]:
    """Return the micro-batches of a step or an evaluation, all marked to need an image if one of them has an image.

    Ranks that gather the weights of the vision tower part by part would wait for a rank that does not run the tower. Each rank
    knows the complete global batch, so no communication is needed.

    needed: whether the tower is gathered this way, or trained. trained: whether this step trains the tower. Then all are marked
    even if none has an image: for a parameter without a gradient, ZeRO 3 would use the gradient of the previous step.
    """
    if not needed or split.images is None:
        return list(micro_batches)
    has_images = split.image_counts
    if not trained and not any(has_images[sample] for part in micro_batches for sample in part.samples):
        return list(micro_batches)
    return [replace(part, needs_image=True) for part in micro_batches]


def blank_sample(split: Split, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample with a small blank image and no target, with the columns of `like`; in a pair, both answers are the same."""
    ids, _ = _processor(split).blank
    token_columns = {"input_ids": np.array(ids), "labels": np.full(len(ids), -100)}
    blank = {COLUMN: np.array([BLANK_NUMBER])}
    for name in like.keys() - {COLUMN}:
        per_token = token_columns.get(name.removeprefix("rejected_"), np.zeros(len(ids), np.int64))
        blank[name] = per_token if np.ndim(like[name]) == 1 else like[name]
    return blank


def image_inputs(split: Split, rows: Rows, tensors: Mapping[str, Tensor], *, packing: bool) -> dict[str, Tensor]:
    """Return the inputs that a model gets for the images of `rows`, in the order of rows and samples, apart from the tokens.

    If the model reads token types, they mark the tokens of images. For packed rows of a model with separate positions of time,
    height and width, `position_ids` [4, rows, width], with the positions of the text first.
    tensors: `input_ids` [rows, width], and with `packing` their `position_ids`.
    Raises UserError if an image has changed since the rows were prepared.
    """
    processor = _processor(split)
    numbers = [[[int(number) for number in sample[COLUMN]] for sample in row] for row in rows]
    flat = [number for row in numbers for sample in row for number in sample]
    inputs = _inputs(split, processor, flat) if flat else {}
    family, model_inputs = processor.family, dict(inputs)
    is_image = _is_image(processor, tensors["input_ids"])
    model_inputs |= token_types(split, tensors["input_ids"])
    if family.three_positions and packing:
        grids = inputs["image_grid_thw"].numpy() if flat else np.empty((0, 3), dtype=np.int64)
        model_inputs["position_ids"] = _four_positions(
            tensors["position_ids"], rows, numbers, is_image.numpy(), grids, processor.merge
        )
    return model_inputs


def token_types(split: Split, ids: Tensor) -> dict[str, Tensor]:
    """Return the model's input that marks the tokens of images in `ids`, by its name; empty if the model has no such input."""
    processor = _processor(split)
    input_name = processor.family.types
    return {input_name: _is_image(processor, ids).long()} if input_name else {}


def _is_image(processor: ImageProcessor, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.from_numpy(processor.image_tokens))


def prompt_inputs(split: Split, ids: Sequence[int], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Return the inputs that a model gets for the images of one prompt, apart from its tokens; empty without images."""
    if not numbers:
        return {}
    row = [{"input_ids": np.array(ids), COLUMN: np.array(numbers)}]
    return image_inputs(split, [row], {"input_ids": torch.tensor([list(ids)])}, packing=False)


def _four_positions(
    text: Tensor,
    rows: Rows,
    numbers: Sequence[Sequence[Sequence[int]]],
    is_image: np.ndarray,
    grids: np.ndarray,
    merge: int,
) -> Tensor:
    positions = np.broadcast_to(text.numpy(), (4, *text.shape)).copy()
    used = 0
    for at, row in enumerate(rows):
        end = 0
        for sample, image_numbers in zip(row, numbers[at], strict=True):
            start, end = end, end + len(sample["input_ids"])
            of_sample = grids[used : used + len(image_numbers)]
            positions[1:, at, start:end] = three_positions(is_image[at, start:end], of_sample, merge)
            used += len(image_numbers)
    return torch.from_numpy(positions)


def _inputs(split: Split, processor: ImageProcessor, numbers: Sequence[int]) -> Inputs:
    assert split.images is not None
    inputs_by_number: dict[int, Inputs] = {}
    for number in numbers:
        if number not in inputs_by_number:
            inputs_by_number[number] = (
                processor.blank[1] if number == BLANK_NUMBER else processor.inputs([_image(split, number)])
            )
    return processor.join([inputs_by_number[number] for number in numbers])


def _image(split: Split, number: int) -> Any:
    assert split.images is not None
    try:
        return split.images.image(number)
    except RowError as error:
        reason = f"image {number} {error}"
        raise UserError(
            Problem("data.train", reason, "bring it back, or start another run", str(split.images.folder))
        ) from None


def _processor(split: Split) -> ImageProcessor:
    assert split.vision is not None, "a split with images and no model that sees"
    return processor_of(split.vision)
