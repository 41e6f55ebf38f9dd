"""Packages of Debian: apt-get downloads them, for which it needs no root, and they are read without being installed."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dstune.samples.download import Archive, Package, fetch_with


@dataclass(frozen=True)
class DebianPackage(Package):
    """A pinned .deb. It is only unpacked, never installed: none of its scripts is run."""

    @property
    def requirement(self) -> str:
        return f"{self.name}={self.version}"

    def fetch(self, folder: Path, label: str) -> Path:
        """Return the path of the .deb in `folder`; apt-get downloads it if it is not there. Raises UserError."""
        fix = (
            f"run `apt-get update`; or `apt-get download {self.requirement}` on a Debian machine, and copy "
            f"{self.filename} to {folder}"
        )
        command = ["apt-get", "download", "--quiet", self.requirement]
        return fetch_with(command, self, folder, label, fix=fix, complaint="E:")


class DebianArchive(Archive):
    """The files of a .deb, by their paths without the leading `./`.

    A .deb is an `ar` archive (deb(5)): after 8 bytes, each member has a header of 60 bytes with its name and size, and then its
    content, padded to an even length. The member `data.tar.*` holds the files.
    """

    def __init__(self, path: Path):
        content = path.read_bytes()
        header = 8
        while not content.startswith(b"data.tar", header):
            header += 60 + -(-_member_size(content, header) // 2) * 2
        packed = io.BytesIO(content[header + 60 : header + 60 + _member_size(content, header)])
        with tarfile.open(fileobj=packed) as archive:
            opened = ((member, archive.extractfile(member)) for member in archive if member.isfile())
            self._files = {member.name.removeprefix("./"): file.read() for member, file in opened if file is not None}


def _member_size(content: bytes, header: int) -> int:
    """Return the size in bytes of the member whose header begins at the offset `header`."""
    return int(content[header + 48 : header + 58])
