"""Prepare the images of one prompt for a model: the same steps for `dstune generate`, references and the local engine.

Each step handles one image, so that a server can do other work in between.
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
"""Limit of the model inputs of all images of a prompt. Some models pad all images to the largest, so a few large images among
many small ones would otherwise need any amount of memory."""


class PromptImages:
    """The images of one prompt, in their order.

    First `measure` each image, then `place` them in the rendered text. Once the prompt is known not to be too long, `look` at
    each image, and take the `inputs`. root: the folder that relative paths start from; None: paths are refused.
    """

    def __init__(self, processor: ImageProcessor, references: Sequence[Reference], root: Path | None = None):
        self.processor, self.references = processor, references
        self._root = root
        self._contents: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []
        self._expansions: list[str] = []
        self._inputs: list[Inputs] = []

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
        """Return the rendered text with its placeholders expanded. Raises RowError if their number differs from that of images."""
        return expand(text, self.processor.placeholder, self._expansions, [len(self)]).text

    def look(self, number: int) -> None:
        """Decode an image, compute its model inputs, and drop its bytes. Raises RowError, also if the inputs of all images so far
        exceed MAX_INPUT_BYTES."""
        try:
            image = decode(self._contents[number])
            if image.size != self._sizes[number]:
                raise RowError(f"has {image.width} x {image.height} pixels, and says that it has another number")
            self._inputs.append(self.processor.inputs([image]))
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
        """Size of the inputs of all images after `look`."""
        return self.processor.joined_bytes(self._inputs)

    def inputs(self, ids: Sequence[int]) -> Inputs:
        """Return the inputs that the model gets for the images, apart from the prompt's tokens `ids`."""
        inputs = self.processor.join(self._inputs)
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
        """Measure each image, and return this object."""
        for number in range(len(self)):
            self.measure(number)
        return self

    def _error(self, number: int, error: RowError) -> RowError:
        reference = self.references[number]
        is_path = isinstance(reference, str) and not reference.startswith("data:")
        return RowError(f"image {number + 1}{f' ({reference!r:.80})' if is_path else ''} {error}")
