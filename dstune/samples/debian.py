"""Samples from packages of Debian: fetched by name with apt-get as any user, and read without installing them."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dstune.samples.download import Archive, Package, fetch_with


@dataclass(frozen=True)
class DebianPackage(Package):
    """A .deb, pinned. It is only unpacked, never installed: none of its scripts is run."""

    @property
    def requirement(self) -> str:
        return f"{self.name}={self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        """Fetch as `fetch_with`, by apt-get. Raises UserError."""
        fix = (
            f"run `apt-get update`; or `apt-get download {self.requirement}` on a Debian machine, and copy "
            f"{self.filename} to {folder}"
        )
        command = ["apt-get", "download", "--quiet", self.requirement]
        return fetch_with(command, self, folder, label, fix=fix, complaint="E:")


class DebianArchive(Archive):
    """The files of a .deb, by their paths without a leading `./`.

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


def _size(content: bytes, place: int) -> int:
    return int(content[place + 48 : place + 58])
