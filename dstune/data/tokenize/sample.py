"""One tokenized sample, and what turns rows into samples."""

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
"""Normalised rows, as `rows.normalise` gives them."""


@dataclass
class Sample:
    """One tokenized sample, or the reason why the row gives none."""

    row: int
    """Number of the row that it came from."""
    input_ids: np.ndarray
    columns: dict[str, Any]
    """What else it holds, by the names of `Encoder.columns`: a list with a value for each token, or a value."""
    weight: float
    """Targets that it adds to the loss."""
    truncated: bool = False
    problem: str = ""
    length: int = 0
    """Tokens before truncation."""

    @property
    def labels(self) -> np.ndarray:
        return self.columns["labels"]


class SourcePrompts(Protocol):
    """Asks for the target of a source, where rows are sources and targets."""

    def prompt_text(self, source: str) -> str:
        """Return the prompt with the source in it."""

    def prompt_ids(
        self, source: str, arguments: Mapping[str, Any] | None = None, target: str | None = None
    ) -> list[int]:
        """Return what the model reads before it writes the target. arguments: of the row, for a chat template. target: as far as it
        is known.

        Raises RenderError where the chat template refuses it."""


class Encoder:
    """Makes samples of one task's rows; picklable."""

    renderer: ChatRenderer | None = None
    """What renders conversations, where there is a template."""
    trains_on_prompt: bool = False
    only_prompts: bool = False
    """Whether samples are prompts, to which the model is still to write the answers: no turn of them trains."""
    sources: SourcePrompts | None = None
    images: ImageFiles | None = None
    """Where rows with images find them; None where no row has any."""

    def images_of(self, row: dict[str, Any]) -> list[Any]:
        """Return the images that a row shows, in order: of PIL. Raises RowError."""
        numbered = row.get(COLUMN) or []
        assert self.images is not None or not numbered, "images of which nobody knows the files"
        return [self.images.image(image["number"]) for image in numbered] if self.images else []

    later_columns: frozenset[str] = frozenset()
    """Columns that samples of earlier versions did not have. Where no row has any of one, it does not count in the content by which
    a run knows its rows again, so that runs of those versions continue."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """Types (of `datasets`) of what a sample holds beside `input_ids`. `collate` knows which ones a batch gets."""
        raise NotImplementedError

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Make samples of `rows`, those of one row one behind the other; `numbers` is how the rows are called."""
        raise NotImplementedError

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        """Return the conversations of a row, to be compared with its samples."""
        raise NotImplementedError("only conversations are rendered")

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Return tokens of a text that the model is to continue: with the first special tokens, without an end."""
        raise NotImplementedError("only a language model continues a text")
