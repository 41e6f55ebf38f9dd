"""Validates images in training files by the limits of OpenAI's vision fine-tuning.

A row may have at most ten images of 10 MB (JPEG, PNG or WEBP), in user messages. Each image is decoded when its file is validated,
so that no job fails at a damaged one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.checkpoint.answer_files import base_folder
from dstune.checkpoint.contents import is_composite
from dstune.config.architectures import PROCESSOR_SETTINGS, VisionFiles
from dstune.core.errors import UserError
from dstune.core.parsing import object_in
from dstune.data.images.processor import refusal
from dstune.data.images.store import MAX_PIXELS_OF_ROW, content_of_data_url, decode, require_pillow, size_of
from dstune.data.problems import RowError, format_value
from dstune.finetuning.row_problems import FieldError
from dstune.serve.images import is_chat_image, problem_of_address

MOST_IMAGES = 10
"""Per row."""
MOST_BYTES = 10 << 20
"""Size of an image file."""
MOST_ROWS = 50_000
"""Rows with images per file."""
_BEGINNINGS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}


class ImageRows:
    """Validates the images of a file, row by row."""

    def __init__(self, blind: str = ""):
        """blind: why the model reads no images; empty if it does."""
        self._blind, self._rows = blind, 0

    def judge(self, row: Mapping[str, Any]) -> None:
        """Check the images of a row, which may have any shape. Raises FieldError for the first image that cannot be used."""
        pixels = 0
        for number, (at, part, role) in enumerate(_images_of(row)):
            if self._blind:
                raise FieldError(at, f"holds an image; {self._blind}")
            if role != "user":
                raise FieldError(at, f"holds an image, which only messages of the user may: this one is of the {role}")
            self._rows += number == 0
            if self._rows > MOST_ROWS:
                raise FieldError(
                    at, f"holds an image, as {MOST_ROWS:,} rows before it do: a file may have no more of them"
                )
            if number == MOST_IMAGES:
                raise FieldError(at, f"is one image too many: a row may have {MOST_IMAGES}")
            pixels += _pixels(part, at)
            if pixels > MAX_PIXELS_OF_ROW:
                raise FieldError(at, f"the images have more than {MAX_PIXELS_OF_ROW:,} pixels together")


def _images_of(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield place, content part and role of each image in the row's messages."""
    messages = row.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for index, part in enumerate(content if isinstance(content, list) else ()):
            if is_chat_image(part):
                yield f"messages[{number}].content[{index}]", part, str(message.get("role"))


def _pixels(part: Mapping[str, Any], at: str) -> int:
    """Count the pixels of an image. Raises FieldError if it cannot be used."""
    if unknown := [key for key in part if key not in ("type", "image_url")]:
        raise FieldError(f"{at}.{unknown[0][:60]}", "is no key of an image; known are type, image_url")
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise FieldError(f"{at}.image_url", f"must be an object with the text url, it is {format_value(image)}")
    if unknown := [key for key in image if key not in ("url", "detail")]:
        raise FieldError(f"{at}.image_url.{unknown[0][:60]}", "is no key of an image; known are url, detail")
    if image.get("detail") not in (None, "auto", "high"):
        reason = (
            "must be 'auto' or 'high': the model's processor chooses the size; make the image smaller for fewer tokens"
        )
        raise FieldError(f"{at}.image_url.detail", reason)
    if problem := problem_of_address(image["url"]):
        raise FieldError(f"{at}.image_url.url", problem.replace("for a request", "for a job"))
    try:
        content = content_of_data_url(image["url"])
        if len(content) > MOST_BYTES:
            raise RowError(f"has {len(content):,} bytes, and none may have more than {MOST_BYTES:,}")
        if not any(map(content.startswith, _BEGINNINGS.values())):
            raise RowError(f"is none of {', '.join(_BEGINNINGS)}")
        require_pillow("images")
        decode(content)
        width, height = size_of(content)  # refuses files with several frames, since decoding reads only the first
    except RowError as error:
        raise FieldError(f"{at}.image_url.url", str(error)) from None
    except UserError as error:
        raise FieldError(at, f"is an image, and on this server {error.problems[0].reason}") from None
    return int(width * height)


def why_blind(path: str, revision: str | None, name: str) -> str:
    """Return why jobs of a model cannot train on images; empty if they can, or if its files are not on this machine, in which case
    training finds out. name: the model's public name."""
    folder = base_folder(path, revision)
    config = object_in(Path(folder) / "config.json") if folder is not None else {}
    if folder is None or not config:
        return ""
    vision = None
    if is_composite(config) and isinstance(config.get("vision_config"), dict):
        settings = "\n".join(file.read_text("utf-8") for one in PROCESSOR_SETTINGS if (file := folder / one).is_file())
        vision = VisionFiles(path, revision, False, str(config.get("model_type")), settings)
    return refusal(vision, f"the model {name!r}")
