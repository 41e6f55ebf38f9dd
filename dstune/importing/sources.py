"""Data sets of another tool as `data.train`, or as `data.mixture` where there are several."""

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
        """Return what is not the default."""
        plain = asdict(Source(self.path))
        return {name: value for name, value in asdict(self).items() if name == "path" or value != plain[name]}


def with_split(path: str, split: str | None) -> str:
    """Return a hub id with its split behind a colon; `train` is what training rows have by themselves."""
    if not split or split == "train" or re.search(r"\.\w+$", path.rsplit("/", 1)[-1]):
        return path
    return f"{path}:{split}"


def name_of(path: str, taken: Sequence[str]) -> str:
    """Return a name for a source: the last part of its path, with a number where it is taken."""
    stem = re.sub(r"\W+", "_", path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".jsonl").removesuffix(".json"))
    plain = stem.strip("_").lower() or "rows"
    numbered = (f"{plain}_{number}" for number in range(2, 1000))
    return plain if plain not in taken else next(name for name in numbered if name not in taken)


def put_sources(imported: Import, sources: Sequence[Source]) -> None:
    """Carry the training rows; sources of one format share `data.format`."""
    if len(sources) == 1:
        (only,) = sources
        for name, value in only.differences().items():
            if name != "weight":
                imported.put(f"data.{'train' if name == 'path' else name}", value)
        if only.weight != 1:
            imported.drop("the weight of the only source: all of its rows come once an epoch")
    elif sources:
        mixture: dict[str, dict[str, Any]] = {}
        for source in sources:
            mixture[name_of(source.path, list(mixture))] = source.differences()
        imported.put("data.mixture", mixture)


def report_lost_settings(imported: Import, source: Source, training: Sequence[Source]) -> None:
    """Report settings that validation rows lose: they are read as those of the only training source, or with the defaults beside
    a mixture."""
    read_as = training[0] if len(training) == 1 else Source(source.path)
    for name in ("format", "columns", "subset", "revision"):
        stored, used = getattr(source, name), getattr(read_as, name)
        if stored != used:
            imported.drop(f"{source.path}: its {name} ({stored}); it is read with data.{name}={used}", DIFFERENT)
