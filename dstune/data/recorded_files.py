"""Tells which files of rows changed since a run was trained, by the digests in its `data_report.json`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.data.row_sources import Inputs, find_inputs

REPORT, KEY = "data_report.json", "files"

FileDigests = dict[str, list[list[str]]]
"""By configuration key: name and digest of each file, in the order in which they are read."""


CHARACTERS = 32
"""Length of the digest of a file's bytes, which the options that decide how they are read follow."""


def file_digests(inputs: Inputs) -> FileDigests:
    """Return the digests of all files of rows, except those of a hub's commit or a table's version, which cannot change."""
    sources = [source for by_name in inputs.values() for source in by_name.values() if source.is_local]
    return {
        source.key: [[name, digest if source.stream else digest[:CHARACTERS]] for name, digest in source.file_digests]
        for source in sources
    }


def changed_files(run_dir: Path, config: RunConfig) -> dict[str, str]:
    """Return by configuration key the first file whose content changed since the training of `run_dir`.

    A file may have moved. Runs of versions that recorded no digests have no changed files. Raises UserError if files are missing.
    """
    recorded = object_in(run_dir / REPORT).get(KEY)
    if not isinstance(recorded, Mapping):
        return {}
    changed = {}
    for key, files in file_digests(find_inputs(config)).items():
        before = [digest for _, digest in recorded[key]] if key in recorded else [digest for _, digest in files]
        if before != [digest for _, digest in files]:
            different = (name for number, (name, digest) in enumerate(files) if before[number : number + 1] != [digest])
            changed[key] = next(different, files[-1][0])  # the last ones are gone if all others are the same
    return changed


def refuse_changed_files(run_dir: Path, config: RunConfig, other_rows: str, except_keys: Collection[str] = ()) -> None:
    """Raise UserError if files that `config` reads changed since the training of `run_dir`.

    other_rows: how a user can have the command read other rows than the run's. except_keys: configuration keys that name other
    rows than the run's.
    """
    problems = [
        Problem(key, f"the file changed since {run_dir} was trained", f"bring back its rows, or {other_rows}", name)
        for key, name in changed_files(run_dir, config).items()
        if key not in except_keys
    ]
    if problems:
        raise UserError(problems)
