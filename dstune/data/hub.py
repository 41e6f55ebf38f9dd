"""Data sets of the hub: parse their names, and find the files of one in the cache of `datasets`.

Nothing here asks the hub. Before the ranks start, `launch/hub_data.py` resolves a revision to a commit and lets
`datasets` download and prepare it. That cache has a folder for each commit, so the rows are exactly those of the commit.
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
    """`OWNER/NAME`, optionally with `@REVISION` and `:SPLIT`."""

    repository: str
    revision: str | None = None
    split: str | None = None
    """One split or several, or slices of them (`slices.parse`)."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.split}' if self.split else ''}"


def hub_name(spec: str) -> HubName | None:
    """Return the data set that `spec` names on the hub; None if `spec` is no such name, or exists as a path on this machine."""
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
    """Return the data sets of a repository in the cache of `datasets`, newest first."""
    import datasets.config
    from datasets.naming import camelcase_to_snakecase

    owner, name = repository.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{camelcase_to_snakecase(name)}"
    entries = []
    for description in root.glob("*/*/*/dataset_info.json"):  # configuration, version, commit
        folder = description.parent
        entry = Prepared(folder, folder.parent.parent.name, folder.name)
        # A data set loaded with custom options has a digest after the configuration's name: it is not the original one.
        if COMMIT.fullmatch(entry.commit) and entry.info.get("config_name") == entry.subset:
            entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.folder / "dataset_info.json").stat().st_mtime, reverse=True)


def cached(name: HubName, subset: str | None, key: str, why: str = "it was not prepared before") -> Prepared:
    """Return the cached data set at the commit `name.revision`, or the one prepared last if no revision is given.

    key: the configuration key of the name. why: the reason that the hub was not asked, for a message.
    Raises UserError if it is not in the cache, or has several configurations and `subset` names none.
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
    """Return the key that chooses the data set's configuration for a path's key: `data.subset` for `data.train`."""
    section = key.rsplit(".", 1)[0]
    return f"{section}.subset"


def _refuse_subset(key: str, subset: str | None, entries: list[Prepared]) -> list[Prepared]:
    names = sorted(entry.subset for entry in entries)
    raise UserError(subset_problem(subset_key(key), subset, names, "are in the cache"))


def subset_problem(key: str, subset: str | None, names: list[str], these: str = "are there") -> Problem:
    """Return the problem of a configuration (`subset`) that a data set lacks, or that has to be named because there are several.

    these: ends the list of `names` in the message.
    """
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
    # If the split is a single file, row numbers are those of the split; among several files, messages name the file.
    names = [where] if len(files) == 1 else [f"{where}/{file.name}" for file in files]
    return [DataFile(file, label=label, digest=digest + file.name) for file, label in zip(files, names, strict=True)]


def split_problem(key: str, path: str, split: str, splits: list[str]) -> Problem:
    """Return the problem of a split that does not exist, with the nearest one of `splits`."""
    close = difflib.get_close_matches(split, splits, n=1, cutoff=0.4)
    other = close[0] if close else splits[0] if splits else "SPLIT"
    reason = f"there is no split {split!r}; the splits are {', '.join(splits) or 'none'}"
    return Problem(where=key, value=path, reason=reason, fix=f"{key}={path}:{other}")
