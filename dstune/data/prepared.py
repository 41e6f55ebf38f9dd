"""What the data path hands to training: memory-mapped samples, their lengths and weights, and prompts to show."""

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
"""What the names of columns with a sample's tokens end in: a pair has two of them."""
TEXTS = ("source", "target")
"""Columns of a seq2seq sample that hold text."""
HELD_OUT = "held_out.npy"
"""Hashes of the rows that later blocks of a stream leave out."""


@dataclass(frozen=True)
class TargetStates:
    """A vector for each target of each row of a table."""

    values: np.ndarray
    """[targets of all rows, size of a vector], float32, or the bits of numbers of two bytes as int16."""
    starts: np.ndarray
    """Where those of each row begin, int64 [rows + 1]."""

    def of(self, row: int) -> np.ndarray:
        """[targets of the row, size of a vector]."""
        return self.values[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class Split:
    """Samples of one part (train, validation or test)."""

    name: str
    table: datasets.Dataset
    """`input_ids` list<int32> with `labels` list<int32> (-100 = no target; of language models not shifted, the first one
    always -100), or for classification with `label`: an int, or with `task.multi_label` a list of 0 and 1. For pairs of
    texts with `token_type_ids` too, where the model is told them. For seq2seq with the texts `source`
    and `target`, and for an encoder-decoder with `target_ids` list<int32> in place of `labels`. What else there is, the
    task's encoder says (`data.tokenize`)."""
    lengths: np.ndarray
    """Tokens of each sample, those of `target_ids` included, int32 [samples]."""
    weights: np.ndarray
    """Targets that each sample adds to the loss, int64 [samples]; with class weights their weights, float64."""
    sources: np.ndarray | None = None
    """Number of each sample's source in `data.mixture`, int16 [samples]; None without a mixture."""
    rows: np.ndarray | None = None
    """Which row of `table` each sample is, where the split is a part of it; None for all rows in order."""
    reference: np.ndarray | None = None
    """What the reference model says of each row of `table`: log-probabilities, float32 [rows, answers]."""
    target_states: TargetStates | None = None
    """What another model makes of each row's targets."""
    origins: np.ndarray | None = None
    """Number of the row that each sample is of, int32 [samples], from 0 in the split's order; validation and test only."""
    texts: datasets.Dataset | None = None
    """The normalised rows as JSON text (`row`) with the values of `evaluate.slices` (`slices`, JSON text), by the numbers in
    `origins`, where metrics need them."""
    places: Path | None = None
    """JSON list of FILE:LINE of each row, by the numbers in `origins`."""
    images: ImageFiles | None = None
    """What the column `images` of `table` numbers; None where no row of the entry has any."""
    vision: VisionFiles | None = None
    """What turns them into the model's inputs."""
    content: str = ""
    """Digest of all columns of `table`; that of the whole where the split is a part of it."""

    @cached_property
    def image_counts(self) -> np.ndarray:
        """Images of each sample, [samples]."""
        if self.images is None:
            return np.zeros(len(self.lengths), np.int32)
        counts = pc.list_value_length(self.table.data.column(COLUMN)).to_numpy()
        return counts if self.rows is None else counts[self.rows]

    @cached_property
    def _arrays(self) -> datasets.Dataset:
        numbers = [name for name in self.table.column_names if name not in TEXTS]
        return self.table.with_format("numpy", columns=numbers)

    def select(self, samples: np.ndarray) -> Split:
        """Return the split with some of its samples, int [samples]."""
        return replace(
            self,
            lengths=self.lengths[samples],
            weights=self.weights[samples],
            sources=None if self.sources is None else self.sources[samples],
            rows=np.asarray(samples) if self.rows is None else self.rows[samples],
            origins=None if self.origins is None else self.origins[samples],
        )

    def column(self, name: str) -> np.ndarray:
        """Return a value of each sample, [samples]."""
        values = np.asarray(self.table.select_columns([name]).with_format("numpy")[:][name])
        return values if self.rows is None else values[self.rows]

    def tokens(self) -> dict[str, np.ndarray]:
        """Return tokens of each sample in each column that has some, [samples] by column."""
        names = [name for name in self.table.column_names if name.endswith(TOKENS)]
        counts = {name: pc.list_value_length(self.table.data.column(name)).to_numpy() for name in names}
        return counts if self.rows is None else {name: count[self.rows] for name, count in counts.items()}

    def sample(self, index: int) -> dict[str, Any]:
        """Return one sample as numpy arrays, without texts."""
        return self._arrays[self.row(index)]

    def row(self, index: int) -> int:
        """Return the row of `table` that the sample `index` is."""
        return index if self.rows is None else int(self.rows[index])

    def neighbour(self, index: int, distance: int = 1) -> dict[str, Any]:
        """Return the sample of the row of `table` so far behind that of `index`; behind the last row comes the first."""
        return self._arrays[(self.row(index) + distance) % len(self.table)]

    def source_and_target(self, index: int) -> dict[str, str]:
        """Return the texts of a seq2seq sample: `source` and `target`."""
        row = self.table[self.row(index)]
        return {name: row[name] for name in TEXTS}


@dataclass(frozen=True)
class Swapped:
    """The held-out rows that hold terms of `evaluate.counterfactual`, with these swapped."""

    split: Split
    of: np.ndarray
    """Number of the row that each of its rows was, int32 [rows of `split`]."""
    names: list[list[str]]
    """What was swapped in each row, as `he -> she`."""


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt that the model answers before and after training."""

    input_ids: list[int]
    """The rendered prompt, the generation prompt included."""
    text: str
    """The prompt as shown to the user."""
    reference: str
    """What the data answers."""
    images: list[int] = field(default_factory=list)
    """Numbers of the images that it shows (`Split.images`)."""


@dataclass(frozen=True)
class StreamStart:
    """What the first block of a stream leaves to the later ones."""

    held_out: Path
    """Hashes of the rows that no block may train on, sorted uint64 (.npy)."""
    identity: str
    """Changes with the shards of the stream."""
    shards: list[list[str]]
    """Name and identity of each shard, for later blocks to find the same ones."""
    begun: float
    passes: float
    """Passes over the stream before and after it."""
    end: dict[str, Any]
    """The position behind its last row (`stream.Position`)."""


@dataclass(frozen=True)
class PreparedData:
    train: Split
    validation: Split | None
    test: Split | None
    labels: tuple[str, ...] = ()
    """Label names in the order of their indices; empty except for classification."""
    prompts: list[SamplePrompt] = field(default_factory=list)
    """Held-out prompts, always the same ones; empty where there is no validation split or nothing to generate."""
    report: dict[str, Any] = field(default_factory=dict)
    """By part: rows read, bad rows skipped, truncated, dropped, samples, tokens, targets."""
    swapped: dict[str, Swapped] = field(default_factory=dict)
    """By part, with `evaluate.counterfactual`."""
    guard: Split | None = None
    """What the model is not to forget."""
    ood: Split | None = None
    """Another domain."""
    fingerprint: str = ""
    """Digest of content, tokenizer, settings and code: equal for equal samples."""
    evidence: Path | None = None
    """Rows of conversations with the places of their samples in `train`, to be proven before the first step."""
    stream: StreamStart | None = None
    """With `data.streaming`, where `train`, its first block, ends and what later blocks leave out."""

    @property
    def splits(self) -> list[Split]:
        """Those that there are, training rows first."""
        return [split for split in (self.train, self.validation, self.test, self.guard, self.ood) if split is not None]


def load_split(folder: Path, part: str) -> Split:
    """Return the samples that were written to `folder`; nothing but their pages in use is in memory."""
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
