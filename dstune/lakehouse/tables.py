"""Opens and reads a Delta table at one version; anything that prevents reading is reported before training."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError, first_line
from dstune.core.network import METADATA_VARIABLE, ask_no_metadata_service
from dstune.lakehouse.address import Address
from dstune.lakehouse.inside import is_elsewhere, outside, path_inside, refuse_outside

LIBRARY = "pip install '.[delta]' in a clone of dstune"
_S3 = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
_AZURE = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_CLIENT_ID + AZURE_CLIENT_SECRET + AZURE_TENANT_ID",
    "AZURE_STORAGE_CLIENT_ID + AZURE_STORAGE_CLIENT_SECRET + AZURE_STORAGE_TENANT_ID",
    "AZURE_CLIENT_ID + AZURE_TENANT_ID + AZURE_FEDERATED_TOKEN_FILE",
)
_GOOGLE = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
CREDENTIALS = {"s3": _S3, "s3a": _S3, "abfss": _AZURE, "az": _AZURE, "gs": _GOOGLE}
"""Variables of which at least one (those joined by +: all) must be set: otherwise the libraries query the machine's metadata
service, and may hang."""


def require_library(key: str, spec: str) -> None:
    """Raises UserError if Delta tables cannot be read here."""
    if importlib.util.find_spec("deltalake") is None:
        raise UserError(Problem(key, "reading Delta tables needs the package deltalake", LIBRARY, spec))


def place_of(address: Address, key: str, *, to_write: bool = False) -> str:
    """Return the place of a `delta://` address's table in the library's form. Raises UserError."""
    location = address.location.removeprefix("file://")
    scheme, colon, _ = location.partition(":")
    if not colon or "/" in scheme:
        path = Path(location).expanduser().absolute()
        if not to_write and not (path / "_delta_log").is_dir():
            reason = "there is no Delta table (no _delta_log)" if path.exists() else "there is no such folder"
            raise UserError(Problem(key, reason, "give the folder of a Delta table", str(address)))
        return str(path)
    if scheme not in CREDENTIALS:
        schemes = ", ".join(f"{name}://" for name in CREDENTIALS)
        fix = f"a path (on Databricks /Volumes/...), uc://CATALOG.SCHEMA.TABLE, or an address after {schemes}"
        raise UserError(Problem(key, f"tables at {scheme}: are not read", fix, str(address)))
    ways = (*CREDENTIALS[scheme], METADATA_VARIABLE)
    if not any(all(os.environ.get(name) for name in way.split(" + ")) for way in ways):
        reason = f"there are no credentials for {scheme}://: none of {', '.join(CREDENTIALS[scheme])} is set"
        fix = f"export them; {METADATA_VARIABLE}=1 asks the metadata service of a cloud machine"
        raise UserError(Problem(key, reason, fix, str(address)))
    ask_no_metadata_service()
    return location


def refuse_parts(address: Address) -> None:
    """Raises UserError if an address to write to contains more than a table."""
    if address.version is not None or address.time or address.table_id or address.columns or address.where:
        fix = "leave version, columns and predicate out"
        raise UserError(Problem("--output", "is written to as a whole", fix, str(address)))


def open_table(place: str, address: Address, key: str, options: Mapping[str, str] | None = None) -> tuple[Any, Address]:
    """Open the table at the version that `address` names (by default the newest). Returns the table and the resolved address.
    Raises UserError if there is no table, the version does not exist (any more), or the table is not the one that the address
    names."""
    from deltalake import DeltaTable

    spec = str(address)
    with _user_errors_for(key, spec, "the table cannot be opened"):
        if "://" not in place:
            refuse_outside(Path(place), address, key)
        table = DeltaTable(place, storage_options=dict(options) if options else None)
        newest, table_id = table.version(), str(table.metadata().id)
    if address.table_id and address.table_id != table_id:
        reason = f"the table was made again since: it has the id {table_id} now, and its versions are others"
        fix = "restore the table, or start another run with it as it is (another run.dir)"
        raise UserError(Problem(key, reason, fix, spec))
    version = address.version
    if address.time:
        version = _version_at(table, place, address, key, options)
    if version is None:
        version = newest
    if version > newest:
        raise UserError(Problem(key, f"the newest version is {newest}", f"@{newest}, or no version", spec))
    if version != newest:
        try:
            table.load_as_version(version)
        except Exception as error:
            reason = (
                f"version {version} cannot be opened any more: the log does not reach back to it ({first_line(error)})"
            )
            raise UserError(Problem(key, reason, f"a version that it still has, such as @{newest}", spec)) from None
    return table, replace(address, version=version, time="", table_id=table_id)


def _commit_times(table: Any, place: str, options: Mapping[str, str] | None) -> dict[int, float]:
    """Return the time of each version in seconds, by the rule of the Delta protocol (Commit Provenance Information; In-Commit
    Timestamps): the commit's own timestamp once the table has them; before that, the time of the commit's file, but at least a
    millisecond after the previous version."""
    from deltalake.fs import DeltaStorageHandler
    from pyarrow.fs import FileSelector, PyFileSystem

    files = PyFileSystem(DeltaStorageHandler(place, dict(options) if options else None))
    commits = {}
    for file in files.get_file_info(FileSelector("_delta_log")):
        if match := re.fullmatch(r"(\d{20})\.json", file.base_name):
            commits[int(match[1])] = round(file.mtime.timestamp() * 1000)
    settings = table.metadata().configuration
    in_commits = settings.get("delta.enableInCommitTimestamps", "").lower() == "true"
    since = int(settings.get("delta.inCommitTimestampEnablementVersion", 0))
    times: dict[int, float] = {}
    last = 0
    for version, modified in sorted(commits.items()):
        if not (in_commits and version >= since):
            last = max(modified, last + 1)
            times[version] = last / 1000
    if in_commits:
        written = {int(entry["version"]): entry for entry in table.history() if "version" in entry}
        times |= {version: written[version]["inCommitTimestamp"] / 1000 for version in commits if version >= since}
    return times


def _version_at(table: Any, place: str, address: Address, key: str, options: Mapping[str, str] | None) -> int:
    """Return the newest version at a time. The library itself would take the first version for every earlier time. Raises
    UserError."""
    moment = address.moment
    with _user_errors_for(key, str(address), "the times of its versions cannot be read"):
        history = _commit_times(table, place, options)
    if moment > datetime.now(UTC):
        raise UserError(Problem(key, "this time is still to come", "leave it out for the newest version", str(address)))
    versions_before = [version for version, seconds in history.items() if seconds <= moment.timestamp()]
    if not versions_before:
        oldest = datetime.fromtimestamp(min(history.values()), UTC) if history else None
        reason = f"the log of the table begins at {oldest:%Y-%m-%dT%H:%M:%SZ}" if oldest else "the log holds no times"
        raise UserError(Problem(key, reason, "a later time, or a version", str(address)))
    return max(versions_before)


def files_of(table: Any, address: Address, key: str) -> list[dict[str, Any]]:
    """Return `path` and `size_bytes` of every data file of the version, as in its log. Raises UserError."""
    import pyarrow as pa

    with _user_errors_for(key, str(address), "its log cannot be read"):
        actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes"]).to_pylist()
    return sorted(actions, key=lambda file: str(file["path"]))


def check_files(actions: list[dict[str, Any]], place: str, address: Address, key: str) -> int:
    """Check every data file (`files_of`) as far as possible without reading it, and return their total size in bytes. Raises
    UserError for files that are missing, truncated, or outside the table's folder (the log may name any file of this machine)."""
    if "://" in place:
        for action in actions:
            if is_elsewhere(action["path"], place):
                raise UserError(outside(action["path"], address, key))
    else:
        bad = []
        inside = Path(place).resolve()
        for action in actions:
            name = action["path"]
            if (path := path_inside(name, inside)) is None:
                raise UserError(outside(name, address, key))
            size = path.stat().st_size if path.is_file() else None
            if size != action["size_bytes"]:
                bad.append(f"{name} is gone" if size is None else f"{name} has {size} of {action['size_bytes']} bytes")
        if bad:
            further = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            which = f"{len(bad)} of {len(actions)} data files of version {address.version}"
            reason = f"{which} are not whole: {'; '.join(bad[:3])}{further}"
            raise UserError(
                Problem(key, reason, "VACUUM removes them after a time: give a newer version", str(address))
            )
    return sum(action["size_bytes"] or 0 for action in actions)


_SENTINEL = "no such column of any table"


def check_predicate(table: Any, address: Address, key: str) -> None:
    """Raise UserError if the predicate compares with NULL, or contains more than one expression: the library reads the first one
    and silently drops the rest."""
    if not address.where:
        return
    _refuse_compared_null(address, key)
    if _is_read_completely(table, address.where):
        return
    with _user_errors_for(key, str(address), "the predicate cannot be read"):
        table.scan(predicate=address.where)  # refusals of the library itself, in its own words
    ends = [match.start() for match in re.finditer(r"\b|\W", address.where)]
    end = next((end for end in reversed(ends) if _is_read_completely(table, address.where[:end])), 0)
    leftover = address.where[end:].strip()
    reason = f"the predicate ends before position {len(address.where) - len(leftover) + 1}, and this is left over: {leftover}"
    raise UserError(Problem(key, reason, "join conditions with AND or OR", str(address)))


_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|--[^\n]*|/\*.*?\*/""", re.DOTALL)
"""Texts, quoted names and comments of SQL."""
_COMPARED_NULL = re.compile(r"(?<!\bIS )(?<!\bIS NOT )(?<!\bDISTINCT FROM )\bNULL\b", re.IGNORECASE)


def _refuse_compared_null(address: Address, key: str) -> None:
    """Raise UserError for NULL other than in `IS NULL` and `IS DISTINCT FROM NULL`.

    In SQL a comparison with it, and `NOT IN` with a list that has it, are true for no row. The library leaves such a condition out.
    """
    if _COMPARED_NULL.search(" ".join(_QUOTED.sub(" '' ", address.where).split())):
        reason = (
            "the predicate compares with NULL, which in SQL is true for no row; the library returns rows nevertheless"
        )
        fix = "IS NULL or IS NOT NULL, and lists for IN and NOT IN without NULL"
        raise UserError(Problem(key, reason, fix, str(address)))


def _is_read_completely(table: Any, predicate: str) -> bool:
    """Return whether the library reads `predicate` to its end: only then does it reach the unknown name after it. The predicate is
    tried in parentheses, since `n BETWEEN 1` would take that name as its bound, and without them, since `n = 1) OR (n = 2` would
    close them."""
    for text in (f"{predicate}\n", _enclosed(predicate)):
        try:
            table.scan(predicate=f'{text} AND "{_SENTINEL}"')
        except Exception as error:  # the library raises classes of its own
            if _SENTINEL in str(error):
                continue
        return False
    return True


def _enclosed(predicate: str) -> str:
    return f"({predicate}\n)"  # a comment ends with its line


def scan(table: Any, address: Address, key: str) -> Iterator[Any]:
    """Yield batches (pyarrow) of the selected columns and rows, in no particular order. Raises UserError, also while they are
    read."""
    import pyarrow as pa

    with _user_errors_for(key, str(address), f"version {address.version} cannot be read"):
        reader = table.scan(
            columns=list(address.columns) or None, predicate=_enclosed(address.where) if address.where else None
        )
        yield from pa.RecordBatchReader.from_stream(reader)


@contextmanager
def _user_errors_for(key: str, spec: str, action: str) -> Iterator[None]:
    """Convert errors of the library to UserError: it raises Exception, OSError, ArrowInvalid and classes of its own for the same
    causes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{action}: {first_line(error)}"
        fix = "look at the table, the columns and the predicate; files that VACUUM has removed need a newer version"
        raise UserError(Problem(key, reason, fix, spec)) from None
