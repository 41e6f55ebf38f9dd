"""The folder of a recording: private files, written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.core.secrets import texts_mapped

MANIFEST, DELETIONS = "manifest.json", "deletions.json"
PARTS = ("jobs", "files", "answers")
FORMAT = 1
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,127}")
USER_COLUMNS = ("user", "user_id", "safety_identifier")


def file_name(identifier: str) -> str:
    """Return a file name for an identifier of the server, which may contain anything."""
    return (
        identifier
        if SAFE_NAME.fullmatch(identifier)
        else f"sha256-{_sha256(identifier.encode('utf-8', 'surrogatepass'))[:32]}"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of_user(user: str) -> str:
    """Return what stands for a user in answers and deletions, so that their files do not name the user."""
    return _sha256(user.encode("utf-8", "surrogatepass"))


def hash_stored(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def users_in(row: Mapping[str, Any], columns: Sequence[str] = ()) -> set[str]:
    """Return the users that a row, the body of its request or their metadata name. columns: further ones with a user."""
    names = (*USER_COLUMNS, *columns)
    places = [row, row.get("body"), row.get("metadata")]
    if isinstance(row.get("body"), dict):
        places.append(row["body"].get("metadata"))
    return {
        str(place[name]) for place in places if isinstance(place, dict) for name in names if place.get(name) is not None
    }


class Folder:
    """A recording. One process at a time may use it, from any thread that does not write the same file."""

    def __init__(self, path: Path, redact: Callable[[str], str] | None = None, key: str = "", *, create: bool = True):
        """redact: masks a text of users. key: never written, wherever it may come from.

        Raises:
            UserError: it holds other files, or another process writes to it.
        """
        self.path, self._redact, self._key = path, redact, key
        if path.exists() and (not path.is_dir() or path.is_symlink()):
            raise UserError(Problem("FOLDER", "is no folder", "another one", str(path)))
        if not create and not (path / MANIFEST).is_file():
            raise UserError(Problem("FOLDER", "there is no recording", "the folder of `dstune record`", str(path)))
        if path.exists() and any(path.iterdir()) and not (path / MANIFEST).exists():
            raise UserError(Problem("FOLDER", "it holds other files", "an empty folder, or a new one", str(path)))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if not (path / MANIFEST).exists():
            files.write(path / MANIFEST, "{}\n", mode=0o600)
        lock = files.try_lock(files.open_plain(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600))
        if lock is None:
            raise UserError(Problem("FOLDER", "another process writes to it", "wait for it", str(path)))
        self._lock = lock
        for part in PARTS:
            if (path / part).is_symlink():
                raise UserError(Problem("FOLDER", f"{part} is a link", "another folder", str(path)))
            (path / part).mkdir(mode=0o700, exist_ok=True)
        for left in path.rglob(f".*{files.INCOMPLETE}"):  # of a killed process
            left.unlink()
        self.manifest: dict[str, Any] = self.load(MANIFEST) or {}
        deletions = self.load(DELETIONS) or {}
        self._deleted: set[str] = {str(digest) for digest in deletions.get("users", [])}

    def close(self) -> None:
        os.close(self._lock)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in the file `name`; None if there is none."""
        try:
            content = parse_json(files.read_plain(self.path / name))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(Problem("FOLDER", f"{name} is damaged", "another folder", str(self.path))) from None
        return content if isinstance(content, dict) else None

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON object, without the key."""
        text = json.dumps(self.without_key(content), indent=2, ensure_ascii=False) + "\n"
        files.write(self.path / name, text.encode("utf-8", "surrogatepass"), mode=0o600)

    def without_key(self, content: Any) -> Any:
        return texts_mapped(content, lambda text: text.replace(self._key, "<KEY>")) if self._key else content

    def redacted(self, content: Any) -> Any:
        """Return `content` with every text of it masked, if the recording is redacted."""
        return texts_mapped(content, self._redact) if self._redact else content

    @property
    def redacts(self) -> bool:
        return self._redact is not None

    # -- users

    def is_deleted(self, users: set[str]) -> bool:
        """Return whether one of `users` has been deleted."""
        return self.has_deleted(map(digest_of_user, users))

    def has_deleted(self, digests: Iterable[str]) -> bool:
        """Return whether a user with one of these digests has been deleted."""
        return not self._deleted.isdisjoint(digests)

    def delete_user(self, user: str, columns: Sequence[str]) -> int:
        """Delete a user's rows and answers, also from later recordings into this folder; return their number."""
        self._deleted.add(digest_of_user(user))
        self.save(DELETIONS, {"users": sorted(self._deleted)})
        for partial in (self.path / "files").glob("*.partial"):
            partial.unlink()
        count = 0
        for part in ("answers", "files"):
            for path in sorted((self.path / part).glob("*.jsonl")):
                count += self._delete_rows(path, user, columns)
        return count

    def _delete_rows(self, path: Path, user: str, columns: Sequence[str]) -> int:
        def names(line: bytes) -> bool:
            row = _row_of(line)
            if path.parent.name == "answers":
                listed = row.get("users")
                return isinstance(listed, list) and digest_of_user(user) in listed
            return user in users_in(row, columns)

        with path.open("rb") as stream:
            count = sum(names(line) for line in stream)
        if count:
            self.rewrite(path, lambda line: None if names(line) else line)
            name = f"files/{path.stem}.json"
            if path.parent.name == "files" and (record := self.load(name)):
                self.save(name, {**record, "stored_sha256": hash_stored(path), "rows_deleted": True})
        return count

    def rewrite(self, path: Path, change: Callable[[bytes], bytes | None], source: Path | None = None) -> None:
        """Replace `path` by the changed lines of `source` (by default its own), less those that become None."""
        temporary = path.with_name(f".{path.name}{files.INCOMPLETE}")
        with (source or path).open("rb") as stream, files.create_or_truncate(temporary, mode=0o600) as output:
            for line in stream:
                if (changed := change(line)) is not None:
                    output.write(changed)
        temporary.replace(path)

    def stored_line(self, line: bytes, columns: Sequence[str]) -> bytes | None:
        """Return a line of a downloaded file as it is stored: masked; None if it names a deleted user."""
        row = _row_of(line)
        if self.is_deleted(users_in(row, columns)):
            return None
        if not self.redacts:
            return line
        if row:
            return json.dumps(self.redacted(row), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        return str(self.redacted(line.decode("utf-8", "replace"))).encode()

    @property
    def changes_files(self) -> bool:
        """Whether a downloaded file is not stored as it came."""
        return self.redacts or bool(self._deleted)

    # -- the manifest

    def hold_settings(self, **settings: Any) -> None:
        """Write settings into the manifest. Raises UserError if the folder was recorded with other ones."""
        if changed := [name for name, value in settings.items() if self.manifest.get(name, value) != value]:
            reason = f"it was recorded with another value of: {', '.join(changed)}"
            fix = "another folder, or the settings in manifest.json"
            raise UserError(Problem("FOLDER", reason, fix, str(self.path)))
        self.save_manifest(**settings)

    def save_manifest(self, **entries: Any) -> None:
        """Write the manifest: `entries`, and every file with its size and digest."""
        stored = {str(path.relative_to(self.path)): path for path in self._stored()}
        before = self.manifest.get("stored") or {}
        listing = {name: _entry(path, before.get(name)) for name, path in sorted(stored.items())}
        self.manifest = {**self.manifest, "format": FORMAT, **entries, "stored": listing}
        self.save(MANIFEST, self.manifest)

    def _stored(self) -> Iterator[Path]:
        for path in self.path.rglob("*"):
            if path.is_file() and path.name not in (MANIFEST, ".lock") and path.suffix != ".partial":
                yield path


def _entry(path: Path, before: Any) -> dict[str, Any]:
    status = path.stat()
    unchanged = isinstance(before, dict) and (before.get("bytes"), before.get("modified_ns")) == (
        status.st_size,
        status.st_mtime_ns,
    )
    digest = before["sha256"] if unchanged else hash_stored(path)
    return {"bytes": status.st_size, "sha256": digest, "modified_ns": status.st_mtime_ns}


def _row_of(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


# -- reading a recording that nobody writes to


def read_object(path: Path, folder: Path) -> dict[str, Any]:
    """Return the JSON object in a file of the recording `folder`. Raises UserError."""
    try:
        content = parse_json(files.read_plain(path))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(Problem("RECORDING", "there is no recording", "a folder of `dstune record`", str(folder)))
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a file, less those that a killed process left incomplete."""
    for line in files.read_plain(path).splitlines():
        if row := _row_of(line):
            yield row
