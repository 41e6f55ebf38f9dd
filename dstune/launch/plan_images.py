"""The images of a run's rows, for its plan: as somebody states them, or as the first rows of its data hold them."""

from __future__ import annotations

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
"""Looked at of each source."""

Size = tuple[int, int]


def parse_images(text: str) -> tuple[int, int, int] | None:
    """Return `NxWxH` or `WxH` as number, width and height; None where it is neither."""
    match = re.fullmatch(r"(?:([1-9]\d{0,2})x)?([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return (int(match[1] or 1), int(match[2]), int(match[3])) if match else None


def images_of(config: RunConfig, stated: tuple[int, int, int] | None) -> Images | None:
    """Return the images of a row: stated ones, else those of the data's first rows; None where there are none or none is seen.

    Raises UserError where images are stated and the model, the task or `data.max_length` allows none.
    """
    try:
        whole = source.whole_config_json(config.model)
    except UserError:  # the plan itself tells
        return None
    if tower_of(whole) is None or not task_of(config.task).sees_images:
        if stated:
            sees = f"task={config.task.name} reads none" if tower_of(whole) else "it sees none"
            raise UserError(Problem("images", f"{config.model.path}: {sees}", "leave images= out", _written(*stated)))
        return None
    if stated is None:
        largest, number, rows = _images_in_rows(config)
        if largest is None:
            return None
        images = _cut(config, whole, number, largest, f"the most and the largest of {rows:,} rows")
    else:
        images = _cut(config, whole, stated[0], stated[1:], "as stated")
    if images is not None and images.in_row * images.tokens > config.data.max_length:
        reason = f"the images of a row are {images.in_row * images.tokens:,} tokens, and a row has {config.data.max_length:,}"
        fix = f"data.max_length={2 * images.in_row * images.tokens}"
        raise UserError(Problem("data.max_length", reason, fix, str(config.data.max_length)))
    return images


def images_in_text(s: Setup) -> list[str]:
    """Return what the plan says of images."""
    if s.tower is None:
        return []
    part = "trained" if s.tower.learns else "frozen"
    if s.tower.images is None:
        return [
            f"rows are taken to hold no images (images=1024x768 plans with some); the tower is {part}"
        ] * s.tower.learns
    i = s.tower.images
    count = f"{i.in_row} image{'s' * (i.in_row != 1)} of {i.width} x {i.height} pixels in a row ({i.origin})"
    cut = f"each {i.tokens:,} tokens and {i.patches:,} patches"
    return [f"{count}, {cut}; the tower of {s.tower.weights / 1e9:.3f}B is {part}"]


def _written(number: int, width: int, height: int) -> str:
    return f"{number}x{width}x{height}"


def _cut(config: RunConfig, whole: Mapping[str, Any], number: int, size: Size, origin: str) -> Images | None:
    """Return images as the model's processor cuts images of a size, where it is on this machine."""
    patch = whole["vision_config"].get("patch_size")
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
                return Images(number, *size, _patches(shape, patch), tokens, _product(shape), origin)
        except RowError as error:
            raise UserError(Problem("images", f"one {error}", "give another size", _written(number, *size))) from None
        except (UserError, OSError, ValueError):
            pass  # a run tells what is wrong with its files
    return approximate_images(whole, number, *size, f"{origin}; its processor is not here, so as they are")


def _patches(shape: tuple[int, ...], patch: int) -> int:
    """shape: of `pixel_values`: [patches, numbers], [images, patches, numbers], or [..., channels, height, width]."""
    if len(shape) < 4:
        return _product(shape[:-1])
    return _product(shape[:-3]) * (shape[-2] // patch) * (shape[-1] // patch)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _images_in_rows(config: RunConfig) -> tuple[Size | None, int, int]:
    """Return the size of the largest image in the first rows, the most images of one, and how many rows these are."""
    if not (config.data.train or config.data.mixture):
        return None, 0, 0
    try:
        rows = list(_sizes_in_rows(config))
    except (UserError, OSError, ValueError):
        return None, 0, 0  # a plan needs no rows; a run tells what is wrong with them
    sizes = [size for of_row in rows for size in of_row]
    largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
    return largest, max(map(len, rows), default=0), len(rows)


def _sizes_in_rows(config: RunConfig) -> Iterator[list[Size]]:
    from dstune.data import sources
    from dstune.data.images.places import COLUMN
    from dstune.data.images.store import content_of, require_pillow, root_of_images, size_of
    from dstune.data.inputs import of_training
    from dstune.data.rows import RowError, normalise, recognise

    for key, source_config in of_training(config).values():
        numbered = (raw for file in sources.of_part(source_config.data, "train", key) for raw in sources.read(file))
        for raw in islice(numbered, ROWS):
            if raw.fields is None:
                continue
            fmt = recognise(
                raw.fields, source_config.data.columns, source_config.data.format, source_config.task, raw.place
            )
            try:
                images = normalise(raw.fields, fmt, source_config.data.columns, source_config.task).get(COLUMN, ())
                if images:
                    require_pillow()
                root = root_of_images(source_config.data.image_folder, raw.file.path)
                yield [size_of(content_of(image, root)) for image in images]
            except RowError:
                continue  # told where rows are prepared
