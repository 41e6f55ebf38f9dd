"""Carries the data sets of another tool over: one becomes `data.train`, several become `data.mixture`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dstune.importing.result import DIFFERENT, Import


@dataclass
class Source:
    """One data set; the fields are those of `data.mixture.NAME`."""

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    max_rows: int | None = None

    def differences(self) -> dict[str, Any]:
        """Return the path and every field that differs from its default."""
        defaults = asdict(Source(self.path))
        return {name: value for name, value in asdict(self).items() if name == "path" or value != defaults[name]}


def with_split(path: str, split: str | None) -> str:
    """Return `path:split` for a hub id. A file has no split, and `train` is the default."""
    if not split or split == "train" or re.search(r"\.\w+$", path.rsplit("/", 1)[-1]):
        return path
    return f"{path}:{split}"


def name_of(path: str, taken: Sequence[str]) -> str:
    """Return a name for a source: the last part of its path, with a number if that name is taken."""
    stem = re.sub(r"\W+", "_", path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".jsonl").removesuffix(".json"))
    plain = stem.strip("_").lower() or "rows"
    numbered = (f"{plain}_{number}" for number in range(2, 1000))
    return plain if plain not in taken else next(name for name in numbered if name not in taken)


def put_sources(imported: Import, sources: Sequence[Source]) -> None:
    """Set the training data: one source as `data.train`, several as `data.mixture`."""
    if len(sources) == 1:
        (only,) = sources
        for name, value in only.differences().items():
            if name != "weight":
                imported.put(f"data.{'train' if name == 'path' else name}", value)
        if only.weight != 1:
            imported.drop("a single source needs no weight: every epoch has each of its rows once")
    elif sources:
        mixture: dict[str, dict[str, Any]] = {}
        for source in sources:
            mixture[name_of(source.path, list(mixture))] = source.differences()
        imported.put("data.mixture", mixture)


def report_lost_settings(imported: Import, source: Source, training: Sequence[Source]) -> None:
    """Report settings that validation rows lose.

    dstune reads validation rows with the settings of the only training source, or with the defaults if training uses a mixture.
    """
    read_as = training[0] if len(training) == 1 else Source(source.path)
    for name in ("format", "columns", "subset", "revision"):
        stored, used = getattr(source, name), getattr(read_as, name)
        if stored != used:
            imported.drop(
                f"{source.path}: its {name} ({stored}) is not carried; it is read with data.{name}={used}", DIFFERENT
            )
