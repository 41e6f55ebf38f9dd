"""The images of one prompt on their way into a model: the same steps for `dstune generate`, references and the local engine.

Each step is about one image, so that a server can take others' turns in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dstune.data.images.expand import expand
from dstune.data.images.places import Reference
from dstune.data.images.processor import ImageProcessor, Inputs
from dstune.data.images.store import content_of, decode, refuse_many_pixels, size_of
from dstune.data.problems import RowError

MAX_INPUT_BYTES = 2**30
"""Of all images of a prompt as a model gets them: some models take them filled up to the largest, so that a few large images
among many small ones would need any amount of memory."""


class PromptImages:
    """Images that stand in one prompt, in their order. First `measure` each of them, then `place` them in the rendered text; when
    the prompt is known not to be too long, `look` at each, and take the `inputs`."""

    def __init__(self, processor: ImageProcessor, references: Sequence[Reference], root: Path | None = None):
        """root: where paths begin; None where there may be none."""
        self.processor, self.references = processor, references
        self._root = root
        self._contents: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []
        self._expansions: list[str] = []
        self._seen: list[Inputs] = []

    def __len__(self) -> int:
        return len(self.references)

    def measure(self, number: int) -> None:
        """Read the bytes and the size of an image, and find the text that stands for it. Raises RowError."""
        try:
            content = content_of(self.references[number], self._root)
            self._sizes.append(size_of(content))
            refuse_many_pixels(self._sizes)
            self._expansions.append(self.processor.expansion(*self._sizes[-1]))
        except RowError as error:
            raise self._error(number, error) from None
        self._contents.append(content)

    def place(self, text: str) -> str:
        """Return a rendered text with what stands for each image. Raises RowError where it has another number of places."""
        return expand(text, self.processor.placeholder, self._expansions, [len(self)]).text

    def look(self, number: int) -> None:
        """Decode an image and make a model's inputs of it; its bytes are dropped. Raises RowError, also where the inputs of all so
        far are too much."""
        try:
            image = decode(self._contents[number])
            if image.size != self._sizes[number]:
                raise RowError(f"has {image.width} x {image.height} pixels, and says that it has another number")
            self._seen.append(self.processor.inputs([image]))
        except RowError as error:
            raise self._error(number, error) from None
        self._contents[number] = b""
        if self.bytes > MAX_INPUT_BYTES:
            raise RowError(
                f"the images are more than {MAX_INPUT_BYTES:,} bytes as the model takes them together, and no more are computed; "
                "images of one size take least"
            )

    @property
    def bytes(self) -> int:
        """Return the size of the inputs of all images that were looked at."""
        return self.processor.joined_bytes(self._seen)

    def inputs(self, ids: Sequence[int]) -> Inputs:
        """Return what a model gets of the images beside the tokens of the prompt."""
        inputs = self.processor.join(self._seen)
        if kind := self.processor.family.types:
            is_image = np.isin(np.asarray(ids, dtype=np.int64), self.processor.image_tokens)
            inputs[kind] = torch.from_numpy(is_image)[None].long()
        return inputs

    def all_inputs(self, ids: Sequence[int]) -> Inputs:
        """Decode each image (`look`), then return `inputs(ids)`."""
        for number in range(len(self)):
            self.look(number)
        return self.inputs(ids)

    def measured(self) -> PromptImages:
        """Measure each image; returns this object."""
        for number in range(len(self)):
            self.measure(number)
        return self

    def _error(self, number: int, error: RowError) -> RowError:
        reference = self.references[number]
        is_path = isinstance(reference, str) and not reference.startswith("data:")
        return RowError(f"image {number + 1}{f' ({reference!r:.80})' if is_path else ''} {error}")
