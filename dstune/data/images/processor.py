"""Apply a model's own processor to one image at a time: get the text in place of the image, and the tensors for the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from dstune.config.architectures import VisionFiles
from dstune.core.errors import Problem, UserError, files_of_others, first_line
from dstune.data.images.store import require_pillow
from dstune.data.problems import NO_TOWER, RowError

if TYPE_CHECKING:
    from torch import Tensor

BLANK = (32, 32)
"""Width and height of the blank image for a micro-batch that has none."""

Inputs = dict[str, "Tensor"]


@dataclass(frozen=True)
class Family:
    """How the images of a batch become a model's inputs."""

    images_along: int = 0
    """The dimension of `pixel_values` that counts images (or tiles, or patches)."""
    types: str = ""
    """The name of the input that marks which tokens belong to images; empty if there is none."""
    three_positions: bool = False
    """Whether positions count time, height and width of an image separately (M-RoPE, arXiv:2409.12191)."""
    unpackable: str = ""
    """Why rows cannot be packed; empty if they can."""


_LINEAR = "its linear attention carries what earlier samples of a row said on to later ones"
_SLIDING = (
    "transformers looks for the images of a packed row at the places of its first sample (in layers with a sliding window, release "
    "5.24; losses differ by 0.1% in a small model)"
)
_QWEN = Family(types="mm_token_type_ids", three_positions=True)
_TILES = Family(images_along=1)

FAMILIES = {
    "gemma3": Family(types="token_type_ids", unpackable=_SLIDING),
    "gemma4": Family(types="mm_token_type_ids", unpackable=_SLIDING),
    "idefics3": _TILES,
    "internvl": Family(),
    "llava": Family(),
    "mistral3": Family(),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": Family(types="mm_token_type_ids", three_positions=True, unpackable=_LINEAR),
    "qwen3_5_moe": Family(types="mm_token_type_ids", three_positions=True, unpackable=_LINEAR),
    "smolvlm": _TILES,
}
"""The families by `model_type`. Pixtral's checkpoints have the type `llava`."""

INPUTS = (
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_sizes",
    "image_position_ids",
)
"""The outputs of a processor that a model takes; all others (rows, columns, crops) concern only the text."""


def refusal(vision: VisionFiles | None, model: str) -> str:
    """Return why the model cannot be trained on images; empty if it can. model: its name for the message."""
    families = ", ".join(sorted(FAMILIES))
    if vision is None:
        return f"{model} {NO_TOWER} (models with one: {families})"
    if vision.model_type not in FAMILIES:
        return f"images are trained with {families}, and {model} is {vision.model_type}"
    if not vision.has_processor:
        return (
            f"{model} has no processor_config.json or preprocessor_config.json, which say how images become its inputs"
        )
    return ""


@lru_cache(maxsize=2)
def processor_of(vision: VisionFiles) -> ImageProcessor:
    """Return the processor of a model, loaded once per process. Raises UserError."""
    require_pillow("model.path")
    return ImageProcessor(vision)


class ImageProcessor:
    """See `processor_of`."""

    def __init__(self, vision: VisionFiles):
        try:
            import torchvision  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            reason = "the processors of images need torchvision"
            raise UserError(
                Problem("model.path", reason, "pip install '.[vision]' in a clone of dstune", vision.path)
            ) from None
        from transformers import AutoProcessor

        self.family, self.merge = FAMILIES[vision.model_type], vision.merge
        revision = {} if vision.revision is None else {"revision": vision.revision}
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with files_of_others("model.path", vision.path, "its processor", "give a model with processor files"):
            # The same backend everywhere: those of Pillow and torchvision differ by up to 0.03 in a pixel.
            self._processor: Any = AutoProcessor.from_pretrained(
                vision.path,
                backend="torchvision",
                trust_remote_code=vision.trust_remote_code,
                local_files_only=True,
                **revision,
            )
        self.placeholder: str = self._processor.image_token
        """The text that a chat template prints in place of an image."""
        self.image_tokens = np.array(sorted(set(self._processor.image_token_ids)), dtype=np.int64)
        """Ids of the tokens whose embeddings the model replaces with those of the image."""

    @lru_cache(maxsize=4096)  # noqa: B019  (the object lives as long as the process)
    def expansion(self, width: int, height: int) -> str:
        """Return the text that replaces `placeholder` for an image of this size; it depends only on the size.

        Raises RowError if the processor refuses an image of this size.
        """
        from PIL import Image

        try:
            processed = self._processor(
                text=[self.placeholder],
                images=[Image.new("RGB", (width, height))],
                return_text_replacement_offsets=True,
                add_special_tokens=False,
            )
        except Exception as error:
            raise RowError(
                f"of {width} x {height} pixels is refused by the model's processor: {first_line(error)}"
            ) from None
        ((replaced,),) = processed["text_replacement_offsets"]
        text: str = replaced["replacement"]
        return text

    def inputs(self, images: Sequence[Any]) -> Inputs:
        """Return the model's inputs for `images` (of PIL, RGB), in their order, by the names of INPUTS. Each image is processed
        alone, so that its inputs do not depend on the others."""
        return self.join([self._inputs_of(image) for image in images])

    def _inputs_of(self, image: Any) -> Inputs:
        processed = self._processor(
            text=[self.placeholder], images=[image], return_tensors="pt", add_special_tokens=False
        )
        return {name: processed[name] for name in INPUTS if name in processed}

    def join(self, of_images: Sequence[Inputs]) -> Inputs:
        """Return the inputs of several images as one batch; smaller images are padded with zeros at the right and bottom."""
        return {name: _joined([each[name] for each in of_images], self._along(name)) for name in of_images[0]}

    def joined_bytes(self, of_images: Sequence[Inputs]) -> int:
        """Return the size in bytes of what `join` returns for these inputs."""
        total = 0
        for name in of_images[0] if of_images else ():
            tensors, along = [each[name] for each in of_images], self._along(name)
            filled = [size for dim, size in enumerate(_largest(tensors)) if dim != along]
            total += prod(filled) * sum(tensor.shape[along] for tensor in tensors) * tensors[0].element_size()
        return total

    def _along(self, name: str) -> int:
        return self.family.images_along if name.startswith("pixel") else 0

    @cached_property
    def blank(self) -> tuple[list[int], Inputs]:
        """Token ids and inputs of a small blank image, for a micro-batch that has none."""
        from PIL import Image

        ids: list[int] = self._processor.tokenizer(self.expansion(*BLANK), add_special_tokens=False)["input_ids"]
        return ids, self._inputs_of(Image.new("RGB", BLANK))

    def cost(self, width: int, height: int) -> tuple[int, tuple[int, ...]]:
        """Return the number of tokens of an image of this size, and the shape of its `pixel_values`. Raises RowError."""
        from PIL import Image

        ids = self._processor.tokenizer(self.expansion(width, height), add_special_tokens=False)["input_ids"]
        return len(ids), tuple(self._inputs_of(Image.new("RGB", (width, height)))["pixel_values"].shape)

    def tokens(self, text: str, images: Sequence[Any], tokenizer: Any) -> list[int]:
        """Return the token ids of a rendered conversation as a server makes them: by the processor itself, but with `tokenizer`
        instead of the one in its files."""
        if not images:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        processor = copy.copy(self._processor)
        processor.tokenizer = tokenizer
        token_ids = processor(text=[text], images=list(images), add_special_tokens=False)["input_ids"][0]
        return [int(token) for token in token_ids]  # some processors return tensors


def _joined(tensors: Sequence[Tensor], along: int) -> Tensor:
    """Return the tensors concatenated along dimension `along`, padded with zeros to the largest size in every other dimension."""
    import torch
    from torch.nn import functional

    largest, filled = _largest(tensors), []
    for tensor in tensors:
        missing = [
            0 if dim == along else most - size
            for dim, (most, size) in enumerate(zip(largest, tensor.shape, strict=True))
        ]
        padding = [amount for size in reversed(missing) for amount in (0, size)]
        filled.append(functional.pad(tensor, padding) if any(padding) else tensor)
    return torch.cat(filled, dim=along)


def _largest(tensors: Sequence[Tensor]) -> list[int]:
    """Return the largest size of each dimension."""
    return [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
