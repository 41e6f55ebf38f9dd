"""Determines the images of a run's rows for its plan: as stated by the user, or as found in the first rows of its data."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.launch.commands import NO_TELEMETRY, OFFLINE
from dstune.planning import source
from dstune.planning.setup import Setup
from dstune.planning.vision import Images, approximate_images, tower_of
from dstune.protocols import task_of

ROWS = 200
"""The first rows of each source whose images are measured."""

Size = tuple[int, int]
"""Width and height in pixels."""


def parse_images(text: str) -> tuple[int, int, int] | None:
    """Parse `NxWxH` or `WxH` into number, width and height; None if `text` is neither."""
    match = re.fullmatch(r"(?:([1-9]\d{0,2})x)?([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return (int(match[1] or 1), int(match[2]), int(match[3])) if match else None


def images_of(config: RunConfig, stated: tuple[int, int, int] | None) -> Images | None:
    """Return the images of a row: those stated, else those of the data's first rows. None if there are none, or if the model or the
    task does not read images.

    Raises:
        UserError: images are stated, but the model or the task reads none, or they do not fit into `data.max_length`.
    """
    try:
        model_config = source.whole_config_json(config.model)
    except UserError:  # reported by the plan itself
        return None
    if tower_of(model_config) is None or not task_of(config.task).sees_images:
        if stated:
            reader = f"task={config.task.name}" if tower_of(model_config) else "this model"
            reason = f"{config.model.path}: {reader} reads no images"
            raise UserError(Problem("images", reason, "leave images= out", _format_images(*stated)))
        return None
    if stated is None:
        largest, number, rows = _images_in_rows(config)
        if largest is None:
            return None
        origin = f"the largest number and size in the first {rows:,} rows"
        images = _processed_images(config, model_config, number, largest, origin)
    else:
        images = _processed_images(config, model_config, stated[0], stated[1:], "as stated")
    if images is not None and images.in_row * images.tokens > config.data.max_length:
        reason = (
            f"the images of a row take {images.in_row * images.tokens:,} tokens, and a row has at most "
            f"{config.data.max_length:,}"
        )
        fix = f"data.max_length={2 * images.in_row * images.tokens}"
        raise UserError(Problem("data.max_length", reason, fix, str(config.data.max_length)))
    return images


def images_in_text(s: Setup) -> list[str]:
    """Return the lines of a plan about images."""
    if s.tower is None:
        return []
    state = "trained" if s.tower.learns else "frozen"
    images = s.tower.images
    if images is None:
        if not s.tower.learns:
            return []
        return [f"assuming rows without images (images=1024x768 plans with them); the vision tower is {state}"]
    count = f"{images.in_row} image{'s' * (images.in_row != 1)} of {images.width} x {images.height} pixels per row"
    cost = f"{images.tokens:,} tokens and {images.patches:,} patches each"
    return [f"{count} ({images.origin}), {cost}; the vision tower of {s.tower.weights / 1e9:.3f}B is {state}"]


def _format_images(number: int, width: int, height: int) -> str:
    return f"{number}x{width}x{height}"


def _processed_images(
    config: RunConfig, model_config: Mapping[str, Any], number: int, size: Size, origin: str
) -> Images | None:
    """Return the patches and tokens that the model's processor makes of images of this size; estimated if the processor is not on
    this machine."""
    patch = model_config["vision_config"].get("patch_size")
    if Path(config.model.path).is_dir() or source.cached_snapshot(config.model):
        os.environ.update(NO_TELEMETRY | OFFLINE)
        from dstune.config.architectures import vision_of
        from dstune.data.images.processor import processor_of, refusal
        from dstune.data.problems import RowError
        from dstune.models.load import load_tokenizer

        try:
            vision = vision_of(load_tokenizer(config.model))
            if vision is not None and not refusal(vision, config.model.path) and type(patch) is int:
                tokens, shape = processor_of(vision).cost(*size)
                return Images(number, *size, _count_patches(shape, patch), tokens, math.prod(shape), origin)
        except RowError as error:
            problem = Problem("images", f"one {error}", "give another size", _format_images(number, *size))
            raise UserError(problem) from None
        except (UserError, OSError, ValueError):
            pass  # a run reports what is wrong with its files
    return approximate_images(
        model_config,
        number,
        *size,
        f"{origin}; estimated without resizing, since the model's processor is not on this machine",
    )


def _count_patches(shape: tuple[int, ...], patch: int) -> int:
    """Return the number of patches. shape: of `pixel_values`, which is [patches, numbers], [images, patches, numbers] or [...,
    channels, height, width]. patch: the edge of a patch in pixels."""
    if len(shape) < 4:
        return math.prod(shape[:-1])
    return math.prod(shape[:-3]) * (shape[-2] // patch) * (shape[-1] // patch)


def _images_in_rows(config: RunConfig) -> tuple[Size | None, int, int]:
    """Return the size of the largest image in the first rows, the most images of a row, and the number of rows read."""
    if not (config.data.train or config.data.mixture):
        return None, 0, 0
    try:
        rows = list(_sizes_in_rows(config))
    except (UserError, OSError, ValueError):
        return None, 0, 0  # a plan needs no rows; a run reports what is wrong with them
    sizes = [size for row in rows for size in row]
    largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
    return largest, max(map(len, rows), default=0), len(rows)


def _sizes_in_rows(config: RunConfig) -> Iterator[list[Size]]:
    """Yield the sizes of the images of each of the first rows of every source."""
    from dstune.data import sources
    from dstune.data.images.places import COLUMN
    from dstune.data.images.store import content_of, require_pillow, root_of_images, size_of
    from dstune.data.inputs import of_training
    from dstune.data.rows import RowError, normalise, recognise

    for key, source_config in of_training(config).values():
        raw_rows = (raw for file in sources.of_part(source_config.data, "train", key) for raw in sources.read(file))
        for raw in islice(raw_rows, ROWS):
            if raw.fields is None:
                continue
            format_name = recognise(
                raw.fields, source_config.data.columns, source_config.data.format, source_config.task, raw.place
            )
            try:
                row = normalise(raw.fields, format_name, source_config.data.columns, source_config.task)
                images = row.get(COLUMN, ())
                if images:
                    require_pillow()
                root = root_of_images(source_config.data.image_folder, raw.file.path)
                yield [size_of(content_of(image, root)) for image in images]
            except RowError:
                continue  # reported when the rows are prepared
