"""The data that training gets: memory-mapped samples, their lengths and weights, and prompts to show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from dstune.config.architectures import VisionFiles
from dstune.data.images.places import COLUMN
from dstune.data.images.store import ImageFiles

TOKENS = ("input_ids", "target_ids")
"""Endings of the names of columns with a sample's tokens; a pair has two such columns."""
TEXTS = ("source", "target")
"""Columns of a seq2seq sample that hold text."""
HELD_OUT = "held_out.npy"
"""File with the hashes of the rows that later blocks of a stream leave out."""


@dataclass(frozen=True)
class TargetStates:
    """A vector for each target of each row of a table."""

    values: np.ndarray
    """[targets of all rows, size of a vector]: float32, or int16 with the bits of two-byte floats."""
    starts: np.ndarray
    """Index in `values` at which each row begins, int64 [rows + 1]."""

    def of(self, row: int) -> np.ndarray:
        """Return the vectors of a row, [targets of the row, size of a vector]."""
        return self.values[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class Split:
    """Samples of one part (train, validation or test)."""

    name: str
    table: datasets.Dataset
    """`input_ids` list<int32>, and by task:

    - `labels` list<int32>: -100 is no target; for language models not shifted, with the first one always -100;
    - for classification `label`: an int, or with `task.multi_label` a list of 0 and 1;
    - `token_type_ids` for pairs of texts, if the model reads them;
    - for seq2seq the texts `source` and `target`; for an encoder-decoder `target_ids` list<int32> instead of `labels`.

    The task's encoder defines any other columns (`data.tokenize`)."""
    lengths: np.ndarray
    """Number of tokens of each sample, including `target_ids`, int32 [samples]."""
    weights: np.ndarray
    """Number of targets that each sample adds to the loss, int64 [samples]; with class weights the sum of their weights,
    float64."""
    sources: np.ndarray | None = None
    """Number of each sample's source in `data.mixture`, int16 [samples]; None without a mixture."""
    rows: np.ndarray | None = None
    """Row of `table` that each sample is, if the split is a part of it; None for all rows in order."""
    reference: np.ndarray | None = None
    """The reference model's log-probabilities of the answers in each row of `table`, float32 [rows, answers]."""
    target_states: TargetStates | None = None
    """Another model's vectors for each row's targets."""
    origins: np.ndarray | None = None
    """Number of the row that each sample comes from, int32 [samples], from 0 in the split's order; not for training rows."""
    texts: datasets.Dataset | None = None
    """The normalised rows (`row`) and their values of `evaluate.slices` (`slices`), both JSON text, indexed by `origins`; None
    if no metric needs them."""
    places: Path | None = None
    """File with a JSON list of each row's FILE:LINE, indexed by `origins`."""
    images: ImageFiles | None = None
    """The images that the column `images` of `table` refers to by number; None if no row has any."""
    vision: VisionFiles | None = None
    """The files of the model's image processor."""
    content: str = ""
    """Digest of all columns of the complete `table`."""

    @cached_property
    def image_counts(self) -> np.ndarray:
        """Number of images of each sample, [samples]."""
        if self.images is None:
            return np.zeros(len(self.lengths), np.int32)
        counts = pc.list_value_length(self.table.data.column(COLUMN)).to_numpy()
        return counts if self.rows is None else counts[self.rows]

    @cached_property
    def _arrays(self) -> datasets.Dataset:
        numbers = [name for name in self.table.column_names if name not in TEXTS]
        return self.table.with_format("numpy", columns=numbers)

    def select(self, samples: np.ndarray) -> Split:
        """Return the split with only some of its samples. samples: their indices, int [samples]."""
        return replace(
            self,
            lengths=self.lengths[samples],
            weights=self.weights[samples],
            sources=None if self.sources is None else self.sources[samples],
            rows=np.asarray(samples) if self.rows is None else self.rows[samples],
            origins=None if self.origins is None else self.origins[samples],
        )

    def column(self, name: str) -> np.ndarray:
        """Return the value of a column for each sample, [samples]."""
        values = np.asarray(self.table.select_columns([name]).with_format("numpy")[:][name])
        return values if self.rows is None else values[self.rows]

    def tokens(self) -> dict[str, np.ndarray]:
        """Return the number of tokens of each sample by column, [samples], for the columns that hold tokens."""
        names = [name for name in self.table.column_names if name.endswith(TOKENS)]
        counts = {name: pc.list_value_length(self.table.data.column(name)).to_numpy() for name in names}
        return counts if self.rows is None else {name: count[self.rows] for name, count in counts.items()}

    def sample(self, index: int) -> dict[str, Any]:
        """Return one sample as numpy arrays, without texts."""
        return self._arrays[self.row(index)]

    def row(self, index: int) -> int:
        """Return the row number in `table` of the sample `index`."""
        return index if self.rows is None else int(self.rows[index])

    def neighbour(self, index: int, distance: int = 1) -> dict[str, Any]:
        """Return the sample that is `distance` rows after that of `index` in `table`; the first row follows the last."""
        return self._arrays[(self.row(index) + distance) % len(self.table)]

    def source_and_target(self, index: int) -> dict[str, str]:
        """Return the texts of a seq2seq sample: `source` and `target`."""
        row = self.table[self.row(index)]
        return {name: row[name] for name in TEXTS}


@dataclass(frozen=True)
class Swapped:
    """The held-out rows that contain terms of `evaluate.counterfactual`, with these terms swapped."""

    split: Split
    of: np.ndarray
    """Number of the original row of each row, int32 [rows of `split`]."""
    names: list[list[str]]
    """The swaps of each row, as `he -> she`."""


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt that the model answers before and after training."""

    input_ids: list[int]
    """The rendered prompt, the generation prompt included."""
    text: str
    """The prompt as shown to the user."""
    reference: str
    """The answer in the data."""
    images: list[int] = field(default_factory=list)
    """Numbers of its images (in `Split.images`)."""


@dataclass(frozen=True)
class StreamStart:
    """What the first block of a stream passes on to the later ones."""

    held_out: Path
    """Hashes of the rows that no block may train on, sorted uint64 (.npy)."""
    identity: str
    """Digest of the shards of the stream."""
    shards: list[list[str]]
    """Name and identity of each shard; later blocks check that they are the same."""
    begun: float
    """Number of passes over the stream before the first block."""
    passes: float
    """Number of passes over the stream after it."""
    end: dict[str, Any]
    """The position after its last row (`stream.Position`)."""


@dataclass(frozen=True)
class PreparedData:
    """Everything that `build.prepare` returns."""

    train: Split
    validation: Split | None
    test: Split | None
    labels: tuple[str, ...] = ()
    """Label names in the order of their indices; empty except for classification."""
    prompts: list[SamplePrompt] = field(default_factory=list)
    """Held-out prompts, always the same ones; empty without a validation split or if the task generates nothing."""
    report: dict[str, Any] = field(default_factory=dict)
    """By part: rows read, bad rows skipped, truncated, dropped, samples, tokens, targets."""
    swapped: dict[str, Swapped] = field(default_factory=dict)
    """With `evaluate.counterfactual`: rows with swapped terms, by part."""
    guard: Split | None = None
    """Rows that the model must not forget (`data.guard`)."""
    ood: Split | None = None
    """Rows of another domain (`data.ood`)."""
    fingerprint: str = ""
    """Digest of content, tokenizer, settings and code: equal for equal samples."""
    files: dict[str, list[list[str]]] = field(default_factory=dict)
    """By configuration key: name and digest of each local file of rows (`recorded_files`)."""
    evidence: Path | None = None
    """File with rows of conversations and the places of their samples in `train`, to be proven before the first step."""
    stream: StreamStart | None = None
    """With `data.streaming`, whose first block is `train`: where that ends, and what later blocks leave out."""

    @property
    def splits(self) -> list[Split]:
        """The splits that exist, training rows first."""
        return [split for split in (self.train, self.validation, self.test, self.guard, self.ood) if split is not None]


def load_split(folder: Path, part: str) -> Split:
    """Return the samples of a part that were written to `folder`, memory-mapped."""
    table, images = datasets.Dataset.from_file(str(folder / f"{part}.arrow")), ImageFiles.of(folder)
    lengths, weights = (np.load(folder / f"{part}.{name}.npy", mmap_mode="r") for name in ("lengths", "weights"))
    sources_file, origins_file, texts, places = (
        folder / f"{part}.{name}" for name in ("sources.npy", "origins.npy", "texts.arrow", "places.json")
    )
    return Split(
        part,
        table,
        lengths,
        weights,
        sources=np.load(sources_file, mmap_mode="r") if sources_file.exists() else None,
        origins=np.load(origins_file, mmap_mode="r") if origins_file.exists() else None,
        texts=datasets.Dataset.from_file(str(texts)) if texts.exists() else None,
        places=places if places.exists() else None,
        images=images,
        content=" ".join([(folder / f"{part}.content").read_text(), *([images.digest()] if images else [])]),
    )
