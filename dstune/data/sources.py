"""Find the files that `data.train` and similar keys name: paths, globs, folders, archives, saved data sets, the hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dstune import samples
from dstune.config.data_schema import DataConfig, TextRows
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in, parse_json, read_file
from dstune.data import hub, slices
from dstune.data.answers import flat, is_nested
from dstune.data.files import (
    COMPRESSIONS,
    DOCUMENTS,
    ENDINGS,
    TEXTS,
    DataFile,
    RawRow,
    ending_of,
    fingerprint,
    is_readable,
    members,
    opened,
    place,
)
from dstune.data.read_tables import count_rows, read_arrow, read_parquet
from dstune.data.read_tagged import read_tagged
from dstune.data.read_text import Lines, lines_of, read_csv, read_json, read_jsonl, read_text
from dstune.data.read_tsv import read_tsv
from dstune.protocols import DATA_SOURCES
from dstune.protocols.data_source import ReadsAddresses

__all__ = [
    "DataFile",
    "Lines",
    "RawRow",
    "data_source_of",
    "expand",
    "fingerprint",
    "has_lines",
    "of_part",
    "place",
    "read",
    "registered_source",
]

READABLE = (
    f"rows are read from {', '.join(ENDINGS)}; those of text also with {', '.join(COMPRESSIONS)} behind, or inside .zip"
)


def read(file: DataFile, skip: int = 0) -> Iterator[RawRow]:
    """Yield the rows of `file` in order, without the first `skip` rows (bad ones included).

    Raises UserError if the complete file cannot be read (a broken Parquet file).
    """
    if file.rows is not None:
        first, last = file.rows
        return islice(read(replace(file, rows=None), first + skip), max(last - first - skip, 0))
    match file.ending:
        case ".parquet":
            return read_parquet(file, skip)
        case ".arrow" | ".feather":
            return read_arrow(file, skip)
        case ".jsonl" | ".ndjson":
            rows = flat(read_jsonl(file))
        case ".json":
            rows = flat(read_json(file))
        case ".csv":
            rows = read_csv(file)
        case ".tsv":
            rows = read_tsv(file)
        case ".conll" | ".conllu" | ".bio" | ".iob":
            rows = read_tagged(file)
        case _:
            rows = read_tagged(file) if file.text_rows is TextRows.tagged else read_text(file)
    return islice(rows, skip, None)


def count(file: DataFile) -> int:
    """Return the number of rows in a file, bad ones included. Raises UserError if the file cannot be read."""
    return _count(file, file.path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _count(file: DataFile, changed: int) -> int:
    """Count the rows of a file. changed: when the file was last written; makes a changed file another cache entry."""
    if file.ending in (".jsonl", ".ndjson") and not _holds_articles(file, changed):
        with opened(file) as stream:
            return sum(line is None or bool(line.strip()) for _, line in lines_of(file, stream))
    recorded_count = count_rows(file)
    return sum(1 for _ in read(file)) if recorded_count is None else recorded_count


def has_lines(file: DataFile) -> bool:
    """Return whether each row of `file` is a line, so that `Lines` can start reading at any of them."""
    is_plain = file.ending in (".jsonl", ".ndjson") and not file.compression and not file.member
    return is_plain and not _holds_articles(file, file.path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _holds_articles(file: DataFile, changed: int) -> bool:
    """Return whether the first line has SQuAD's nested form, which is several rows. changed: when the file was last written."""
    first = next(iter(Lines(file)), None)
    return first is not None and is_nested(first.fields or {})


def of_part(data: DataConfig, part: str, key: str | None = None) -> list[DataFile]:
    """Return the files of `data.train` or another part; empty if it is not set. In a data set with several splits, `data.guard`
    and `data.ood` use the test split unless they name one.

    key: the key that problems name, if not `data.PART`. Raises UserError as `expand` does.
    """
    spec = getattr(data, part)
    if spec is None:
        return []
    key = key or f"data.{part}"
    split = part if part in ("train", "validation", "test") else "test"
    files = expand(spec, key, split=split, subset=data.subset, revision=data.revision, text_rows=data.text_rows)
    if data.streaming and part == "train" and any(file.rows for file in files):
        reason = "a stream enters its files anywhere, so it reads no slices of them"
        raise UserError(Problem(key, reason, "data.streaming=false, or name whole splits", str(spec)))
    return files


def expand(
    spec: str,
    key: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    text_rows: TextRows = TextRows.line,
) -> list[DataFile]:
    """Return the files that `spec` names, sorted: a path, a glob, a folder, a hub id at a commit, a `sample://` URI, or an address
    of a registered data source.

    key: the configuration key of `spec`. split: the split to use from a folder or data set with several, if `spec` names none
    after a colon. subset, revision: of a data set on the hub, which has to be in the cache of `datasets`.
    Raises UserError if there is no such file, it is empty, or its ending names no known format.
    """
    if samples.is_sample(spec):
        uri, slice_text = samples.without_slice(spec)
        files = []
        for chosen in slices.parse(slice_text, key, spec):
            of_split = [DataFile(samples.resolve(f"{uri}:{chosen.name}" if chosen.name else uri, fetch=False))]
            files += slices.apply(chosen, of_split, count, key, spec)
        return files
    if (source := data_source_of(spec)) is not None:
        return source.files(spec, key)
    if "://" in spec:
        schemes = [
            f"{name}://" for name, source in DATA_SOURCES.classes().items() if issubclass(source, ReadsAddresses)
        ]
        reason = f"only files of this machine{', ' if schemes else ' and '}data sets of the hub"
        reason += f" and {', '.join(schemes)} are read" if schemes else " are read"
        raise UserError(Problem(where=key, value=spec, reason=reason, fix="download it and give the path of the file"))
    name = hub.hub_name(spec)
    if name is not None:
        name = hub.HubName(name.repository, name.revision or revision, name.split)
        entry = hub.cached(name, subset, key)
        files = []
        for chosen in slices.parse(name.split, key, spec):
            of_split = hub.files_of(entry, name, chosen.name or split, key)
            files += slices.apply(chosen, of_split, count, key, spec)
        return files
    path, slice_text = _local(spec)
    files = []
    for chosen in slices.parse(slice_text, key, spec):
        paths = _paths(path, key, spec, split, chosen.name or None)
        problems = [problem for file in paths if (problem := _unreadable(file, key, spec))]
        if problems:
            raise UserError(problems)
        of_split = [data_file for file in paths for data_file in _files_in(file, text_rows)]
        files += slices.apply(chosen, of_split, count, key, spec)
    return files


def data_source_of(spec: str | None) -> ReadsAddresses | None:
    """Return the data source that reads the address `spec`; None if `spec` is a path, or no source with its scheme reads."""
    source = registered_source(spec)
    return source if isinstance(source, ReadsAddresses) else None


def registered_source(spec: str | None) -> object:
    """Return the data source with the scheme of `spec`, whatever it can do (`protocols.data_source`); None if there is none."""
    scheme, colon, _ = (spec or "").partition("://")
    return DATA_SOURCES[scheme]() if colon and scheme in DATA_SOURCES else None


def _local(spec: str) -> tuple[Path, str | None]:
    """Return the path in `spec`, and the splits or slices after its colon; None without a colon."""
    path = Path(spec).expanduser()
    if os.path.exists(path):  # not `Path.exists`, which raises where the name is too long
        return path, None
    for colon in re.finditer(":", spec):
        head, split = Path(spec[: colon.start()]).expanduser(), spec[colon.end() :]
        whole = slices.SPLITS.fullmatch(split) and "[" not in spec[: colon.start()].rpartition("/")[2]
        if whole and split and (os.path.exists(head) or ("[" in split and glob.glob(str(head), recursive=True))):
            return head, split
    return path, None


def _paths(path: Path, key: str, spec: str, split: str, split_name: str | None) -> list[Path]:
    """Return the files of a path; of a folder with splits, those of `split_name`, or of `split` if that is None.

    Raises UserError if there is no file.
    """
    if os.path.isdir(path):
        return _of_folder(path, key, spec, split, split_name)
    if os.path.exists(path):
        paths = [path]
    else:
        paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not paths:
        raise UserError(_missing_file(spec, key))
    if split_name is not None:
        reason = "a file has no splits"
        raise UserError(
            Problem(where=key, value=spec, reason=reason, fix=f"{key}={path}, or a slice of it: '{path}:[:20%]'")
        )
    return paths


def _missing_file(spec: str, key: str) -> Problem:
    return Problem(
        where=key,
        value=spec,
        reason="no file matches" if glob.has_magic(spec) else "no such file",
        fix="give a file, a folder, a glob, a data set of the hub (OWNER/NAME), or a sample such as sample://chitchat",
    )


def _unreadable(file: Path, key: str, spec: str) -> Problem | None:
    """Return the problem that keeps a file from being read; None if there is none."""
    name = file.name.lower()
    if not is_readable(name) and not name.endswith(".zip"):
        reason = f"{file}: unknown ending {''.join(Path(name).suffixes[-2:])!r}"
        return Problem(where=key, value=spec, reason=reason, fix=READABLE)
    if not file.is_file():
        reason = f"{file} is a pipe or a device, and rows are read several times"
        return Problem(where=key, value=spec, reason=reason, fix="write its rows to a file")
    try:
        with file.open("rb") as stream:
            if not stream.read(1):
                return Problem(
                    where=str(file), reason=f"the file is empty (named by {key})", fix="give a file with rows"
                )
    except OSError as error:
        return Problem(where=key, value=spec, reason=f"{file} cannot be read: {error.strerror}")
    if name.endswith(".zip") and not members(file):
        reason = f"the archive holds no file of rows (named by {key})"
        return Problem(where=str(file), reason=reason, fix=f"endings that are read: {', '.join(TEXTS)}")
    return None


def _files_in(file: Path, text_rows: TextRows) -> list[DataFile]:
    if file.name.lower().endswith(".zip"):
        return [DataFile(file, member, text_rows) for member in members(file)]
    return [DataFile(file, text_rows=text_rows)]


# -- folders ----------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, key: str, spec: str, split: str, split_name: str | None) -> list[Path]:
    """Return the files of a folder: a data set that `datasets` saved (with or without splits), or data files by split."""
    description = folder / "dataset_dict.json"
    if description.is_file():  # DatasetDict.save_to_disk
        splits = object_in(description).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) and _is_name(name) for name in splits):
            reason = f"{folder} is no saved data set: dataset_dict.json has no names of splits"
            raise UserError(Problem(where=key, value=spec, reason=reason, fix="save it again with save_to_disk"))
        chosen = split_name or split
        if chosen not in splits:
            raise UserError(hub.split_problem(key, str(folder), chosen, splits))
        return _saved(folder / chosen, key, spec)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():  # Dataset.save_to_disk
        if split_name is not None:
            reason = "this saved data set has no splits"
            raise UserError(Problem(where=key, value=spec, reason=reason, fix=f"{key}={folder}"))
        return _saved(folder, key, spec)
    by_split = _data_files(folder)
    if not by_split:
        fix = f"a glob says which files, for example {key}='{folder}/**/*.jsonl'; {READABLE}"
        raise UserError(Problem(where=key, value=spec, reason="this folder holds no file of rows", fix=fix))
    if split_name is None and list(by_split) == [""]:
        return by_split[""]
    chosen = split_name or split
    if chosen not in by_split:
        names = [name for name in by_split if name]
        problem = hub.split_problem(key, str(folder), chosen, names)
        fix = (
            f"{key}='{folder}/**/*{by_split[next(iter(by_split))][0].suffix}' takes all files"
            if not names
            else problem.fix
        )
        raise UserError(Problem(problem.where, f"{problem.reason} (by the names of the files)", fix, problem.value))
    return by_split[chosen]


def _saved(folder: Path, key: str, spec: str) -> list[Path]:
    """Return the Arrow files that `Dataset.save_to_disk` wrote. Raises UserError."""
    try:
        state = parse_json(read_file(folder / "state.json"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{folder} is no whole saved data set: {error}"
        raise UserError(Problem(where=key, value=spec, reason=reason, fix="save it again with save_to_disk")) from None
    if strange := [name for name in names if not isinstance(name, str) or not _is_name(name)]:
        reason = f"state.json of {folder} names a file outside of it: {strange[0]}"
        raise UserError(Problem(where=key, value=spec, reason=reason, fix="save it again with save_to_disk"))
    files = [folder / name for name in names]
    if state.get("_indices_data_files"):
        reason = "saved by a release of datasets before 2.0, with an order of its own"
        fix = "load it with that release and write it with to_parquet"
        raise UserError(Problem(where=key, value=spec, reason=reason, fix=fix))
    return files


def _is_name(name: str) -> bool:
    """Return whether `name` is a plain name of a file or folder, not a path that leads elsewhere."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _data_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files with rows below `folder` by split. `datasets` infers the splits from the names of files and folders; if
    the names show none, all files are under the name ""."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.resolve())
    try:
        patterns = get_data_patterns(base)
        files_by_split = DataFilesDict.from_patterns(patterns, base_path=base)
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    has_no_splits = list(patterns.values()) == [["**"]]
    by_split = {}
    for split, names in files_by_split.items():
        inside = [folder / Path(name).relative_to(base) for name in names if _holds_rows(name)]
        if inside:
            by_split["" if has_no_splits else str(split)] = sorted(_without_notes(inside))
    return by_split


def _holds_rows(name: str) -> bool:
    return is_readable(name) or name.lower().endswith(".zip")


def _without_notes(files: Sequence[Path]) -> list[Path]:
    """Return `files` without documents if there are other files: a text next to data files describes the data."""
    rows = [file for file in files if ending_of(file.name) not in DOCUMENTS]
    return rows or list(files)
