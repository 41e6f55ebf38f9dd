"""Data sets of the hub: how they are named, and the files of one that `datasets` has prepared in its cache.

Nothing here asks the hub: before the ranks start, `launch/hub_data.py` turns a revision into a commit and lets
`datasets` download and prepare it. Its cache has a folder for each commit, so that the rows are exactly those.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dstune.core.errors import Problem, UserError
from dstune.data import slices
from dstune.data.files import DataFile, is_readable

_NAME = re.compile(
    rf"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s:@]+))?(:(?P<split>(?!$){slices.SPLITS.pattern}))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """`OWNER/NAME`, with `@REVISION` and `:SPLIT` where they are given."""

    repository: str
    revision: str | None = None
    split: str | None = None
    """One split or several, perhaps slices of them (`slices.parse`)."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.split}' if self.split else ''}"


def hub_name(spec: str) -> HubName | None:
    """Return what `spec` names on the hub; None if it is a path of this machine (which wins) or no such name."""
    match = _NAME.fullmatch(spec)
    if match is None or Path(spec).exists() or Path(match["repository"]).exists() or is_readable(match["repository"]):
        return None
    return HubName(match["repository"], match["revision"], match["split"])


@dataclass(frozen=True)
class Prepared:
    """One data set in the cache of `datasets`, at one commit."""

    folder: Path
    subset: str
    commit: str

    @property
    def info(self) -> dict:
        return json.loads((self.folder / "dataset_info.json").read_text(encoding="utf-8"))


def prepared(repository: str) -> list[Prepared]:
    """Return what the cache of `datasets` has of a repository, newest first."""
    import datasets.config
    from datasets.naming import camelcase_to_snakecase

    owner, name = repository.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{camelcase_to_snakecase(name)}"
    entries = []
    for description in root.glob("*/*/*/dataset_info.json"):  # configuration, version, commit
        folder = description.parent
        entry = Prepared(folder, folder.parent.parent.name, folder.name)
        # Loaded with options of their own, they have a digest behind the configuration's name: not what is meant here.
        if COMMIT.fullmatch(entry.commit) and entry.info.get("config_name") == entry.subset:
            entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.folder / "dataset_info.json").stat().st_mtime, reverse=True)


def cached(name: HubName, subset: str | None, key: str, why: str = "it was not prepared before") -> Prepared:
    """Return the data set in the cache: at the commit `name.revision`, or the one prepared last if there is none given.

    key: where the name came from. why: why the hub cannot be asked.
    Raises UserError where it is not there, or it has several configurations and none is named.
    """
    page = f"https://huggingface.co/datasets/{name.repository}"
    entries = prepared(name.repository)
    if name.revision is not None:
        entries = [entry for entry in entries if entry.commit == name.revision]
    elif entries:
        entries = [entry for entry in entries if entry.commit == entries[0].commit]
    if not entries:
        at = f" at revision {name.revision}" if name.revision else ""
        reason = f"there is no such file or folder, and the cache of datasets has no such data set{at} ({why})"
        fix = (
            f"give a file that exists, or run once where there is a connection to {page}; if the data set is gated, first "
            "accept its terms there and log in with `hf auth login`"
        )
        if cached_entries := prepared(name.repository):
            fix = f"{key}={replace(name, revision=cached_entries[0].commit)} is in the cache; else {fix}"
        raise UserError(Problem(where=key, value=str(name), reason=reason, fix=fix))
    if subset is not None:
        entries = [entry for entry in entries if entry.subset == subset] or _refuse_subset(key, subset, entries)
    if len(entries) > 1:
        entries = [entry for entry in entries if entry.subset == "default"] or _refuse_subset(key, None, entries)
    return entries[0]


def subset_key(key: str) -> str:
    """Return the key of the configuration that goes with the key of a path: `data.subset` with `data.train`."""
    section = key.rsplit(".", 1)[0]
    return f"{section}.subset"


def _refuse_subset(key: str, subset: str | None, entries: list[Prepared]) -> list[Prepared]:
    names = sorted(entry.subset for entry in entries)
    raise UserError(subset_problem(subset_key(key), subset, names, "are in the cache"))


def subset_problem(key: str, subset: str | None, names: list[str], these: str = "are there") -> Problem:
    """Return the problem with a configuration that a data set lacks, or that has to be named because it has several."""
    listed = ", ".join(names)
    if subset is None:
        reason = f"the data set has several configurations, and one has to be named; {listed} {these}"
        return Problem(where=key, value="null", reason=reason, fix=f"{key}={names[0]}")
    close = difflib.get_close_matches(subset, names, n=1, cutoff=0.4)
    fix = f"{key}={close[0] if close else names[0]}"
    return Problem(where=key, value=subset, reason=f"no such configuration; {listed} {these}", fix=fix)


def files_of(entry: Prepared, name: HubName, split: str, key: str) -> list[DataFile]:
    """Return the Arrow files of a split, in order. Raises UserError if there is no such split."""
    info = entry.info
    splits = info.get("splits") or {}
    if split not in splits:
        raise UserError(split_problem(key, name.repository, split, list(splits)))
    stem = f"{info['dataset_name']}-{split}"
    files = sorted(entry.folder.glob(f"{stem}.arrow")) or sorted(entry.folder.glob(f"{stem}-*-of-*.arrow"))
    where = f"{name.repository}@{entry.commit[:12]}:{split}"
    digest = f"{name.repository}@{entry.commit} {entry.subset} {split} "
    # One file is the whole split, so its rows are those of the split; among several the file has to be named.
    names = [where] if len(files) == 1 else [f"{where}/{file.name}" for file in files]
    return [DataFile(file, label=label, digest=digest + file.name) for file, label in zip(files, names, strict=True)]


def split_problem(key: str, path: str, split: str, splits: list[str]) -> Problem:
    """Return a split that is not there, with those that are."""
    close = difflib.get_close_matches(split, splits, n=1, cutoff=0.4)
    other = close[0] if close else splits[0] if splits else "SPLIT"
    reason = f"there is no split {split!r}; the splits are {', '.join(splits) or 'none'}"
    return Problem(where=key, value=path, reason=reason, fix=f"{key}={path}:{other}")
