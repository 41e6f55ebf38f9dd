"""Reads the verses of a SWORD module (zText driver), by their OSIS names.

Each testament is three files: `.bzz` holds blocks of text, compressed with zlib; `.bzs` the offset, compressed size and size of
each block (three uint32); `.bzv` the block, the offset in it and the length of each entry (uint32, uint32, uint16). The entries
themselves say which verses they are: the heading of a chapter names the chapter, and its verses follow in order.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Protocol

_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"[^>]*sID=')


class Files(Protocol):
    def namelist(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...


def verses(files: Files) -> dict[str, str]:
    """Return the text of each verse by names such as `Gen.1.1`, in the module's order, without markup, notes and headings."""
    text_by_verse: dict[str, str] = {}
    for testament in ("ot", "nt"):
        chapter, number = "", 0
        for entry in _entries(files, testament):
            heading = _CHAPTER.search(entry)
            if heading and (entry.lstrip().startswith("<chapter") or not _plain(entry)):
                chapter, number = heading.group(1), 0
            elif chapter:
                number += 1
                if text := _plain(entry):
                    text_by_verse[f"{chapter}.{number}"] = text
    return text_by_verse


def _entries(files: Files, testament: str) -> Iterator[str]:
    compressed, block_table, entry_table = (
        next(files.read(name) for name in files.namelist() if name.endswith(f"/{testament}.{ending}"))
        for ending in ("bzz", "bzs", "bzv")
    )
    blocks = [
        zlib.decompress(compressed[start : start + size]) if size else b""
        for start, size, _ in struct.iter_unpack("<III", block_table)
    ]
    for block, start, length in struct.iter_unpack("<IIH", entry_table):
        yield blocks[block][start : start + length].decode("utf-8")


def _plain(entry: str) -> str:
    """Return the words of an entry in OSIS markup."""
    entry = re.sub(r"<(note|title|speaker)\b[^>]*?(?<!/)>.*?</\1>", " ", entry, flags=re.DOTALL)
    entry = entry.replace("</w><w", "</w> <w")  # the space between some words is missing
    return " ".join(re.sub(r"<[^>]*>", "", entry).split())
