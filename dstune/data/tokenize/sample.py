"""Define a tokenized sample, and the interface of the encoders that turn rows into samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dstune.data.chat.evidence import Exchange
from dstune.data.images.places import COLUMN
from dstune.data.images.store import ImageFiles
from dstune.data.render import ChatRenderer

Rows = list[dict[str, Any]]
"""Normalised rows, as returned by `rows.normalise`."""


@dataclass
class Sample:
    """One tokenized sample, or the reason why the row gives none."""

    row: int
    """Number of the row that the sample came from."""
    input_ids: np.ndarray
    columns: dict[str, Any]
    """Its other columns, by the names of `Encoder.columns`: a list of values, or a single value."""
    weight: float
    """Number of targets that the sample adds to the loss, or its weight."""
    truncated: bool = False
    problem: str = ""
    length: int = 0
    """Tokens before truncation."""

    @property
    def labels(self) -> np.ndarray:
        return self.columns["labels"]


class SourcePrompts(Protocol):
    """Makes the prompts that ask for the target of a source, for rows with a source and a target."""

    def prompt_text(self, source: str) -> str:
        """Return the prompt that contains the source."""

    def prompt_ids(
        self, source: str, arguments: Mapping[str, Any] | None = None, target: str | None = None
    ) -> list[int]:
        """Return the token ids that the model reads before it writes the target.

        arguments: the row's arguments of the chat template. target: the target if it is known. Raises RenderError if the chat
        template refuses the prompt.
        """


class Encoder:
    """Makes samples of one task's rows; picklable."""

    renderer: ChatRenderer | None = None
    """The renderer of conversations; None if there is no chat template."""
    trains_on_prompt: bool = False
    only_prompts: bool = False
    """Whether samples are prompts whose answers the model has yet to write, so that no turn of a row is trained."""
    sources: SourcePrompts | None = None
    images: ImageFiles | None = None
    """The images of the rows; None if no row has any."""

    def images_of(self, row: dict[str, Any]) -> list[Any]:
        """Return the images of a row as PIL images, in order. Raises RowError."""
        numbered = row.get(COLUMN) or []
        assert self.images is not None or not numbered, "images of which nobody knows the files"
        return [self.images.image(image["number"]) for image in numbered] if self.images else []

    later_columns: frozenset[str] = frozenset()
    """Columns that samples of earlier versions did not have. If no row has a value in such a column, it is left out of the content
    by which a run recognises its rows, so that runs of those versions can continue."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """Types (of `datasets`) of a sample's columns other than `input_ids`. `collate` decides which of them a batch gets."""
        raise NotImplementedError

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Return the samples of `rows`; those of one row are consecutive. numbers: the number of each row."""
        raise NotImplementedError

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        """Return the conversations of a row, for comparison with its samples."""
        raise NotImplementedError("only conversations are rendered")

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a text for the model to continue: with the first special tokens, without an end token."""
        raise NotImplementedError("only a language model continues a text")
