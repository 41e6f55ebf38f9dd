"""Images in the rows of a reference. The reference holds the image files themselves, so that any engine gets what training saw."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dstune.config.architectures import vision_of
from dstune.data.images.places import COLUMN, PLACE, is_place
from dstune.data.images.processor import processor_of, refusal
from dstune.data.images.request import PromptImages
from dstune.data.images.store import ImageFiles
from dstune.data.prepared import Split
from dstune.data.problems import RowError

MOST_ROWS = 8
"""Rows with images in a reference."""
MOST_BYTES = 24 << 20
"""Bytes of all images of a reference: base64 makes them a third larger, and an engine reads 64 MiB at most."""


class RowImages:
    """The images in the messages of one row, in order, by their numbers in `files`."""

    def __init__(self, files: ImageFiles | None, numbers: Sequence[int] = ()):
        self.files, self.numbers = files, list(numbers)

    @classmethod
    def of(cls, split: Split, sample: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> RowImages:
        """Return the images in `messages`, the first ones of `sample`. Raises RowError if the sample was cut before they end."""
        count = sum(is_place(part) for message in messages for part in _parts(message))
        numbers = np.asarray(sample[COLUMN]).tolist()[:count] if count else []
        if len(numbers) < count:
            raise RowError(f"{count} images are shown, and {len(numbers)} of them were trained")
        return cls(split.images, numbers)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def entries(self) -> dict[str, Any]:
        """Return the image column with which the row is tokenized; empty if it has no images."""
        lines = [(number, self._files.line(number)) for number in self.numbers]
        column = [
            {"digest": line["digest"], "number": number, "size": [line["width"], line["height"]]}
            for number, line in lines
        ]
        return {COLUMN: column} if column else {}

    @property
    def bytes(self) -> int:
        return sum(self._files.line(number)["bytes"] for number in self.numbers)

    def shown(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return `messages` with the images in their places, as clients send them. Raises RowError if a file is gone."""
        contents = iter([url_of(self._files.content(number)) for number in self.numbers])
        return [
            {**message, "content": [_image(next(contents)) if is_place(part) else part for part in parts]}
            if (parts := _parts(message))
            else dict(message)
            for message in messages
        ]

    @property
    def _files(self) -> ImageFiles:
        assert self.files is not None, "only a split with images has places for them"
        return self.files


class Answer(NamedTuple):
    """The assistant's turn of a row, as text and in tokens."""

    text: str
    ids: list[int]


class Allowance:
    """How many rows with images a reference may still have."""

    def __init__(self) -> None:
        self._rows, self._bytes = MOST_ROWS, MOST_BYTES

    def take(self, images: RowImages) -> bool:
        """Return whether the reference has room for a row with these images; if so, count it."""
        if not images:
            return True
        if not self._rows or images.bytes > self._bytes:
            return False
        self._rows -= 1
        self._bytes -= images.bytes
        return True


def drawn_row(tokenizer: Any, date: str | None, question: str, answer: Answer) -> dict[str, Any] | None:
    """Make a row with a drawn image, and what the model gets of it as `inputs`.

    Returns None if the model sees no images, or its template has no place for them. date: the date that the template writes.
    """
    from dstune.data.chat.prompt import ChatPrompts
    from dstune.data.chat.template import RenderError

    vision = vision_of(tokenizer)
    if vision is None or refusal(vision, "the model"):
        return None
    content = _draw_picture()
    with_place = [{"role": "user", "content": [dict(PLACE), {"type": "text", "text": question}]}]
    images = PromptImages(processor_of(vision), [content])
    try:
        prompt = ChatPrompts(tokenizer, date).ids(with_place, place_images=images.measured().place)
    except (RenderError, RowError):
        return None
    messages = [{"role": "user", "content": [_image(url_of(content)), with_place[0]["content"][1]]}]
    inputs = images.all_inputs([*prompt, *answer.ids])
    return {
        "messages": messages,
        "answer": answer.text,
        "prompt_ids": prompt,
        "target_ids": answer.ids,
        "inputs": inputs,
    }


def _draw_picture() -> bytes:
    """Return a PNG of colour gradients, 96 pixels wide and 64 high."""
    from PIL import Image

    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    pixels = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def url_of(content: bytes) -> str:
    """Return the data URL of an image file. It always says PNG: decoders look at the bytes, not at the type in the URL."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []
