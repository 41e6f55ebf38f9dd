"""What a server says about itself: jobs with their events and checkpoints, files, models."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from dstune.core import files
from dstune.core.api_client import ApiClient, RequestRefused
from dstune.recording.folder import Folder, file_name, hash_stored

PAGE = 100
MAX_LIST_BYTES = 2**27
"""Size limit of a list, as JSON: a server may have new pages for ever."""
MAX_FILE_BYTES = 2**33
"""Size limit of a file; the largest upload to OpenAI has 8 GB."""
KEY_REFUSED = 401
FINAL_STATES = ("succeeded", "failed", "cancelled")
ENDINGS = (".jsonl", ".json", ".csv", ".txt")


@dataclass
class Inventory:
    """What the server lists."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By id; those that only a job names have nothing but the id."""
    models: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why the server does not give something, by its name."""

    @property
    def fine_tuned(self) -> list[str]:
        """The names of the fine-tuned models, without duplicates."""
        return [*dict.fromkeys(str(job["fine_tuned_model"]) for job in self.jobs if job.get("fine_tuned_model"))]

    @property
    def shutdown_dates(self) -> dict[str, str]:
        """The date on which a model is switched off, by the model's name, where the server states it."""
        dates = {str(model.get("id")): _shutdown_date(model) for model in self.models}
        for job in self.jobs:
            tuned, base = str(job.get("fine_tuned_model") or ""), str(job.get("model") or "")
            if tuned and not dates.get(tuned) and dates.get(base):
                dates[tuned] = f"{dates[base]} (its base {base})"
        return {name: date for name, date in dates.items() if date}

    def files_of(self, part: str) -> list[str]:
        """Return the ids of the jobs' files. part: training or validation."""
        return [*dict.fromkeys(str(job[f"{part}_file"]) for job in self.jobs if job.get(f"{part}_file"))]


def _shutdown_date(model: Mapping[str, Any]) -> str:
    deprecation = model.get("deprecation")  # Azure's
    value = model.get("shutdown_date") or (deprecation.get("inference") if isinstance(deprecation, dict) else None)
    if isinstance(value, int | float) and 0 < value < 1e11:
        return datetime.datetime.fromtimestamp(value, datetime.UTC).date().isoformat()
    return str(value)[:40] if value else ""


def take_inventory(client: ApiClient) -> Inventory:
    """List jobs, files and models. Raises ServerUnreachable, and RequestRefused for a key that is refused."""
    inventory = Inventory()
    inventory.jobs = _listed(client, "/fine_tuning/jobs", "jobs", inventory.missing)
    inventory.models = _listed(client, "/models", "models", inventory.missing, in_pages=False)
    for entry in _listed(client, "/files", "files", inventory.missing):
        if str(entry.get("purpose") or "").startswith("fine-tune"):
            inventory.files[str(entry["id"])] = entry
    for job in inventory.jobs:
        results = job.get("result_files")
        named = [job.get("training_file"), job.get("validation_file"), *(results if isinstance(results, list) else [])]
        for identifier in named:
            if identifier:
                inventory.files.setdefault(str(identifier), {"id": str(identifier)})
    return inventory


def _listed(
    client: ApiClient, path: str, name: str, missing: dict[str, str], *, in_pages: bool = True
) -> list[dict[str, Any]]:
    """Return all entries with an id; say in `missing` why there are none, or fewer."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        for entry in _pages(client, path, in_pages=in_pages):
            if entry.get("id"):
                entries.setdefault(str(entry["id"]), entry)
            else:
                missing[name] = "an entry has no id"
    except RequestRefused as error:
        _raise_for_key(error)
        missing[name] = f"HTTP {error.status} {error.detail}".strip()
    except ValueError as error:
        missing[name] = str(error)
    return [*entries.values()]


def _pages(client: ApiClient, path: str, *, in_pages: bool) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list. Raises ValueError if an answer is no list, or its pages do not end or are too large together."""
    after: str | None = None
    size = 0
    cursors: set[str] = set()
    while True:
        query = {"limit": str(PAGE)} if in_pages else {}
        answer = client.get(path, query | ({"after": after} if after else {}))
        data = answer.get("data")
        if not isinstance(data, list):
            raise ValueError("the answer has no list `data`")
        size += len(json.dumps(data))
        if size > MAX_LIST_BYTES:
            raise ValueError(f"the list has more than {MAX_LIST_BYTES:,} bytes; the rest is left out")
        yield from (entry for entry in data if isinstance(entry, dict))
        if not answer.get("has_more"):
            return
        after = str(answer.get("last_id") or (data[-1].get("id") if data and isinstance(data[-1], dict) else "") or "")
        if not after or after in cursors:
            raise ValueError("the list's pages do not end")
        cursors.add(after)


def _quoted(identifier: str) -> str:
    """Return an identifier as a part of a path."""
    return quote(identifier, safe="", errors="replace")


def _raise_for_key(error: RequestRefused) -> None:
    if error.status == KEY_REFUSED:
        raise error


def record_inventory(client: ApiClient, folder: Folder, inventory: Inventory, user_columns: Sequence[str]) -> None:
    """Write models, jobs and files into `folder`, except what is there. Raises like `take_inventory`."""
    folder.save("models.json", {"data": inventory.models})
    for job in inventory.jobs:
        _record_job(client, folder, job, inventory.missing)
    for entry in inventory.files.values():
        _record_file(client, folder, entry, inventory.missing, user_columns)


def _record_job(client: ApiClient, folder: Folder, job: dict[str, Any], missing: dict[str, str]) -> None:
    identifier = str(job["id"])
    name = f"jobs/{file_name(identifier)}.json"
    recorded = folder.load(name)
    if recorded and recorded.get("complete") and recorded.get("job", {}).get("status") in FINAL_STATES:
        return
    parts: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    for part in ("events", "checkpoints"):
        path = f"/fine_tuning/jobs/{_quoted(identifier)}/{part}"
        parts[part] = _listed(client, path, f"{part} of {identifier}", refusals)
    missing |= refusals
    folder.save(name, {"job": job, **parts, "complete": not refusals})


def content_path(folder: Folder, entry: Mapping[str, Any]) -> Path:
    """Return where the content of a file is stored."""
    ending = PurePosixPath(str(entry.get("filename") or "")).suffix.lower()
    if ending not in ENDINGS:
        ending = ".csv" if entry.get("purpose") == "fine-tune-results" else ".jsonl"
    if ending == ".json":  # the records of files end so
        ending = ".jsonl"
    return folder.path / "files" / f"{file_name(str(entry['id']))}{ending}"


def _record_file(
    client: ApiClient, folder: Folder, entry: dict[str, Any], missing: dict[str, str], user_columns: Sequence[str]
) -> None:
    identifier = str(entry["id"])
    record = f"files/{file_name(identifier)}.json"
    if folder.load(record) is not None:
        return
    partial = folder.path / "files" / f"{file_name(identifier)}.partial"
    stated = entry.get("bytes")
    try:
        if set(entry) == {"id"}:
            entry = {**client.get(f"/files/{_quoted(identifier)}"), "id": identifier}
            stated = entry.get("bytes")
        size = _download(client, identifier, partial)
        if isinstance(stated, int) and size != stated:
            partial.unlink()  # its beginning may be of another attempt
            size = _download(client, identifier, partial)
    except RequestRefused as error:
        _raise_for_key(error)
        missing[f"file {identifier}"] = f"HTTP {error.status} {error.detail}".strip()
        return
    except _FileTooLarge:
        partial.unlink()
        missing[f"file {identifier}"] = f"it has more than {MAX_FILE_BYTES:,} bytes"
        return
    digest = hash_stored(partial)
    path = content_path(folder, entry)
    if folder.changes_files:
        folder.rewrite(path, lambda line: folder.stored_line(line, user_columns), partial)
        partial.unlink()
    else:
        partial.replace(path)
    stored_digest = hash_stored(path) if folder.changes_files else digest
    content = {"file": entry, "content": path.name, "bytes": size, "sha256": digest, "stored_sha256": stored_digest}
    if isinstance(stated, int) and size != stated:
        missing[f"file {identifier}"] = f"the server states {stated:,} bytes and sent {size:,}"
    folder.save(record, content)


class _FileTooLarge(Exception):
    """A file exceeds MAX_FILE_BYTES."""


def _download(client: ApiClient, identifier: str, partial: Path) -> int:
    """Download a file's content to `partial`, or the rest of it; return its size in bytes. Raises _FileTooLarge."""
    with files.append(partial, mode=0o600) as stream:

        def write(position: int, block: bytes) -> None:
            if position + len(block) > MAX_FILE_BYTES:
                raise _FileTooLarge
            if position == 0:
                stream.truncate(0)
            stream.write(block)

        return client.download(f"/files/{_quoted(identifier)}/content", stream.tell(), write)
