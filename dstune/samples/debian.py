"""Samples from packages of Debian: fetched by name with apt-get as any user, and read without installing them."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dstune.core.errors import Problem, UserError
from dstune.samples.download import Package, sha256, wrong_file


@dataclass(frozen=True)
class DebianPackage(Package):
    """A .deb, pinned. It is only unpacked, never installed: none of its scripts is run."""

    @property
    def requirement(self) -> str:
        return f"{self.name}={self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        return fetch_debian(self, folder, label)


def fetch_debian(package: DebianPackage, folder: Path, label: str) -> Path:
    """Path of `package`'s file in `folder`, fetched unless a whole and right one is there.

    Raises:
        UserError: no apt-get here, no such version in its sources, or another file than the pinned one.
    """
    target = folder / package.filename
    if target.exists() and sha256(target) == package.sha256:
        return target
    scratch = folder / f"{package.filename}.apt"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    print(f"{label}: fetching {package.requirement} with apt-get", file=sys.stderr, flush=True)
    try:
        errors = _apt_download(package, scratch)
        fetched = next(scratch.glob("*.deb"), None)
        if fetched is None:
            raise _unavailable(package, folder, label, errors)
        if (found := sha256(fetched)) != package.sha256:
            raise wrong_file(package, label, found)
        return fetched.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _apt_download(package: DebianPackage, scratch: Path) -> str:
    """What apt-get complained about."""
    try:
        answer = subprocess.run(
            ["apt-get", "download", "--quiet", package.requirement],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        return "E: there is no apt-get on this machine"
    return answer.stderr


def _unavailable(package: DebianPackage, folder: Path, label: str, errors: str) -> UserError:
    lines = [line for line in errors.splitlines() if line.startswith("E:")] or ["E: apt-get gave no reason"]
    return UserError(
        Problem(
            where=label,
            reason=f"{package.requirement} could not be fetched ({lines[0].removeprefix('E: ')})",
            fix=f"run `apt-get update`; or `apt-get download {package.requirement}` on a Debian machine, and copy "
            f"{package.filename} to {folder}",
        )
    )


class DebianArchive:
    """The files of a .deb, by their paths without a leading `./`; read like a `zipfile.ZipFile`.

    A .deb is an `ar` archive (deb(5)): 8 bytes, then for each member a header of 60 bytes with its name and size, and its
    content, padded to an even length. The files are in the member `data.tar.*`.
    """

    def __init__(self, path: Path):
        content = path.read_bytes()
        place = 8
        while not content[place:].startswith(b"data.tar"):
            place += 60 + -(-_size(content, place) // 2) * 2
        packed = io.BytesIO(content[place + 60 : place + 60 + _size(content, place)])
        with tarfile.open(fileobj=packed) as archive:
            opened = ((member, archive.extractfile(member)) for member in archive if member.isfile())
            self._files = {member.name.removeprefix("./"): file.read() for member, file in opened if file is not None}

    def namelist(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]

    def __enter__(self) -> DebianArchive:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()


def _size(content: bytes, place: int) -> int:
    return int(content[place + 48 : place + 58])
