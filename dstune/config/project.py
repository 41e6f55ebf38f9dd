"""Reads the plugins that `dstune.yaml` in the working directory names. They run only after the user has trusted them.

Any folder may come from a stranger, and a command that is given in it must not run its code. `dstune trust FOLDER` records the
SHA-256 of each plugin in a file of this user, next to the signing key (`core/signing.py`). A command reads a plugin once, compares
the digest of these bytes with the record, and executes the same bytes. `--trust plugins` trusts them for one command.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dstune.config import trust
from dstune.config.convert import yaml_problem
from dstune.config.names import nearest
from dstune.core import files, parsing, plugin_files, signing
from dstune.core.errors import Problem, UserError, collected
from dstune.core.paths import PROJECT_FILE
from dstune.core.plugin_files import KEY, Source
from dstune.core.text import one_line

INSTALLED = "installed"
"""Recorded instead of a digest for an installed module, which the user may update."""
EXAMPLE = "plugins=[./file.py,package.module]"


def read_project(folder: Path) -> list[str]:
    """Return the plugins that `dstune.yaml` in `folder` names, as written; empty if there is no such file.

    Raises:
        UserError: the file is broken, too large or not a regular file, or has other keys.
    """
    file = folder / PROJECT_FILE
    try:
        content = parsing.parse_yaml(parsing.read_file(file).decode("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(str(file), f"cannot be read: {error}")) from None
    except yaml.YAMLError as error:
        raise UserError(yaml_problem(error, str(file))) from None
    unknown = [str(key) for key in content or {} if key != KEY] if isinstance(content, dict | None) else [str(content)]
    if unknown:
        similar = nearest(unknown[0], [KEY])
        fix = f"did you mean {similar}?" if similar else "it has one key: plugins: [./file.py, package.module]"
        raise UserError(Problem(f"{file}: {unknown[0]}", f"{PROJECT_FILE} has no such key", fix))
    return list(dict.fromkeys(texts((content or {}).get(KEY), f"{file}: {KEY}")))


def texts(value: Any, where: str) -> list[str]:
    """Return `value`, one plugin or a list of them, as a list. Raises UserError if it is something else."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise UserError(Problem(where, "expected a list of files and modules", EXAMPLE, str(value)))
    return list(value)


# ---- what a command loads ----

_skipped: ContextVar[list[str] | None] = ContextVar("skipped", default=None)
"""Inside `optional_plugins`: the files whose plugins were left out."""


@contextmanager
def optional_plugins() -> Iterator[None]:
    """Skip plugins that are not trusted with a note on stderr instead of an error, for code that can do without them."""
    skipped: list[str] = []
    token = _skipped.set(skipped)
    try:
        yield
    finally:
        _skipped.reset(token)
        for reason in dict.fromkeys(skipped):
            print(f"dstune: note: runs without the plugins of {PROJECT_FILE}: {reason}", file=sys.stderr)


def trusted_plugins(named: Sequence[str]) -> tuple[list[str], dict[str, Source]]:
    """Return the plugins that `dstune.yaml` in the working directory names, and the code to execute for those that were read.

    named: plugins that the command itself names, which the user thereby trusts.

    Raises:
        UserError: the file is broken, or a plugin is missing, is not trusted, or has changed since it was trusted.
    """
    skipped = _skipped.get()
    try:
        requested = read_project(Path())
        if not requested or trust.is_believed_by_command(KEY):
            return requested, {}
        return requested, _checked(requested, named)
    except UserError as error:
        if skipped is None:
            raise
        problem = error.problems[0]
        advice = f"; {problem.fix}" if problem.fix else ""
        skipped.append(one_line(f"{problem.value or problem.where}: {problem.reason}{advice}"))
        return [], {}


def _checked(requested: Sequence[str], named: Sequence[str]) -> dict[str, Source]:
    record = read_record(Path())
    named_places = {_identity(spec) for spec in named}
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    for spec in requested:
        if _identity(spec) in named_places:
            continue
        place, _ = plugin_files.split(spec)
        with collected(problems):
            sources[place] = _source(spec, place, record)
    if problems:
        raise UserError(problems)
    return sources


def _identity(spec: str) -> str:
    place, _ = plugin_files.split(spec)
    return str(Path(place).expanduser().absolute()) if plugin_files.is_path(place) else place


def _source(spec: str, place: str, record: Mapping[str, str] | None) -> Source:
    """Read a plugin and compare it with the record. Raises UserError if it is missing or not trusted."""
    if record is None:
        raise UserError(_refusal(spec, "this code would run as you, and you have not trusted this folder"))
    if place not in record:  # checked before looking for a module, which may import the package above it
        raise UserError(_refusal(spec, "this plugin was added after you trusted this folder"))
    source = plugin_files.find(place)
    if (digest := source.sha256 if source.is_file else INSTALLED) != record[place]:
        change = f"{record[place][:12]} then, {digest[:12]} now"
        raise UserError(_refusal(spec, f"this plugin has changed since you trusted this folder (sha256 {change})"))
    return source


def _refusal(spec: str, reason: str) -> Problem:
    fix = f"read it; then `dstune trust .`, or add {trust.FLAG} {KEY} to believe it in this command alone"
    return Problem(f"{PROJECT_FILE}: {KEY}", reason, fix, spec)


# ---- what a user trusts ----


@dataclass(frozen=True)
class Candidate:
    """A plugin of a folder that a user may trust."""

    place: str
    """File or module, as `dstune.yaml` has it."""
    digest: str
    """SHA-256 of the file, or `INSTALLED`."""
    remarks: tuple[str, ...] = ()
    """Notes for the user: other users who can change the file, and its place if that is outside of the folder."""


def candidates(folder: Path) -> list[Candidate]:
    """Return the plugins that `dstune.yaml` in `folder` names, with their digests. Executes nothing.

    Raises:
        UserError: the file is broken, or a plugin is missing.
    """
    plugins_of_folder: list[Candidate] = []
    problems: list[Problem] = []
    for place in plugin_files.distinct(read_project(folder)).values():
        with collected(problems):
            plugins_of_folder.append(_candidate(folder, place))
    if problems:
        raise UserError(problems)
    return plugins_of_folder


def _candidate(folder: Path, place: str) -> Candidate:
    if not plugin_files.is_path(place):
        # An installed plugin is not read: looking for its file would import the package above it.
        digest = INSTALLED if plugin_files.is_installed(place) else plugin_files.find(place).sha256
        return Candidate(place, digest)
    file = folder / Path(place).expanduser()
    source = plugin_files.find(str(file))
    target = file.resolve()
    status = target.stat()
    remarks = []
    if not target.is_relative_to(folder.resolve()):
        remarks.append(f"is outside of this folder: {target}")
    if status.st_uid != os.getuid():
        remarks.append("belongs to another user, who can change it; you will be asked to trust the change")
    elif status.st_mode & 0o022:
        remarks.append("other users can change it; you will be asked to trust the change")
    return Candidate(place, source.sha256, tuple(remarks))


def record_file(folder: Path) -> Path:
    """Return the file that records that this user trusts `folder`. Raises RuntimeError if there is no home folder."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return signing.key_file().parent / "trusted" / f"{name[:32]}.json"


def read_record(folder: Path) -> dict[str, str] | None:
    """Return the plugins of `folder` that this user trusts, with their digests; None if the folder is not trusted.

    Raises:
        UserError: another user can have written the record.
    """
    try:
        file = record_file(folder)
    except RuntimeError:
        return None
    read = _read(file)
    return read[1] if read is not None and read[0] == str(folder.resolve()) else None


def write_record(folder: Path, trusted: Sequence[Candidate]) -> None:
    """Record that this user trusts these plugins of `folder`. Raises UserError if it cannot be written."""
    import json

    content = {"folder": str(folder.resolve()), "plugins": {plugin.place: plugin.digest for plugin in trusted}}
    try:
        file = record_file(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, json.dumps(content, indent=1) + "\n", mode=0o600, sync=True)
    except (OSError, RuntimeError) as error:
        fix = f"set XDG_CONFIG_HOME to a folder of yours, or use {trust.FLAG} {KEY}"
        raise UserError(Problem("trust", f"it cannot be recorded: {error}", fix, str(folder))) from None


def trusted_folders() -> dict[str, dict[str, str]]:
    """Return the folders that this user trusts, with their plugins and digests. Raises UserError as `read_record`."""
    try:
        records = sorted((signing.key_file().parent / "trusted").glob("*.json"))
    except (OSError, RuntimeError):
        return {}
    return dict(sorted(read for read in map(_read, records) if read is not None))


def _read(file: Path) -> tuple[str, dict[str, str]] | None:
    """Return the folder and the plugins of a record; None if there is no valid record."""
    try:
        content = parsing.parse_json(files.read_own(file))
        return str(content["folder"]), {str(place): str(digest) for place, digest in content["plugins"].items()}
    except PermissionError:
        reason = "what you trust must be a file of yours that nobody else can read or write"
        raise UserError(Problem(str(file), reason, f"rm {file}, then `dstune trust FOLDER` again")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
