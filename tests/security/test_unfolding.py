"""Tables whose few bytes on disk stand for gigabytes: what is read of one at a time has a limit, whatever the file says."""

from __future__ import annotations

import gzip
import lzma
import re
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstune.config.data_schema import TextRows
from dstune.core.confinement.here import TooMuch
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.data.files import DataFile
from dstune.lakehouse.address import parse
from dstune.lakehouse.inside import refuse_outside

ROWS, CHARACTERS = 512, 2**22
"""2 GiB together."""
SMALL = 2**27


def dictionary() -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array(["x" * CHARACTERS]))


def runs() -> Any:
    return pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array(["x" * CHARACTERS]))


def lists_of_views() -> Any:
    once = pa.array(["x" * CHARACTERS])
    return pa.ListViewArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array([1] * ROWS, pa.int32()), once)


def lists_of_dictionaries() -> Any:
    return pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), dictionary())


def peak_of(monkeypatch: pytest.MonkeyPatch, file: Path) -> tuple[int, list[Any]]:
    """By how much this process has grown at most while it read the rows of `file`, and how long the text of each is."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    monkeypatch.setattr("dstune.data.read_tables.MAX_BATCH_BYTES", SMALL)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before, lengths = status("VmRSS"), []
    for row in sources.read(DataFile(file)):
        assert row.fields is not None, row.error
        text = row.fields["text"]
        lengths.append(len(text[0] if isinstance(text, list) else text))
    return status("VmHWM") - before, lengths


@pytest.mark.parametrize("made", [dictionary, runs, lists_of_views, lists_of_dictionaries])
def test_a_table_of_a_few_bytes_is_read_in_little_memory(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, file = pa.table({"text": made()}), tmp_path / "rows.arrow"
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        writer.write_table(table)
    del table
    assert file.stat().st_size < 20_000
    peak, lengths = peak_of(monkeypatch, file)
    assert lengths == [CHARACTERS] * ROWS
    assert peak < 8 * SMALL


def test_a_page_of_a_few_bytes_is_read_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": dictionary()}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 20_000
    peak, lengths = peak_of(monkeypatch, file)
    assert lengths == [CHARACTERS] * ROWS
    assert peak < 8 * SMALL


LOOKS = """
import sys
from pathlib import Path
from dstune.core.errors import UserError
from dstune.config.data_schema import TextRows
from dstune.core.confinement.here import TooMuch
from dstune.data import read_tables, sources
from dstune.data.files import DataFile

read_tables.available_bytes = lambda: 2.0**28
for look in (lambda file: next(iter(sources.read(file))), sources.count):
    try:
        print("no error", look(DataFile(Path(sys.argv[1]))))
    except UserError as error:
        print(error.problems[0].reason)
"""


def test_a_batch_larger_than_half_of_the_memory_is_refused(tmp_path: Path) -> None:
    """In a process of its own: this one may have memory left of the tests before."""
    table, file = pa.table({"number": pa.array(np.zeros(2**25, np.int64))}), tmp_path / "a.arrow"
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        writer.write_table(table)
    assert file.stat().st_size < 50_000
    done = subprocess.run([sys.executable, "-c", LOOKS, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "a batch takes more than 0.1 GiB of memory, half of what is free\n" * 2, done.stderr


def test_a_checkpoint_that_grows_is_not_given_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library holds all of it."""
    table, file = tmp_path / "table", tmp_path / "table" / "_delta_log" / "00000000000000000001.checkpoint.parquet"
    file.parent.mkdir(parents=True)
    address = parse(f"delta://{table}", "data.train")
    pq.write_table(pa.table({"add": pa.nulls(2000, pa.struct([("path", pa.string())]))}), file)
    refuse_outside(table, address, "data.train")
    monkeypatch.setattr("dstune.lakehouse.inside.MAX_ACTIONS", 1000)
    with pytest.raises(ValueError, match="2,000 actions"):
        refuse_outside(table, address, "data.train")
    paths = pa.StructArray.from_arrays([dictionary().slice(0, 64).dictionary_decode()], ["path"])
    pq.write_table(pa.table({"add": paths}), file, compression="zstd")
    assert file.stat().st_size < 50_000
    monkeypatch.setattr("dstune.lakehouse.inside.available_bytes", lambda: 2.0**28)
    with pytest.raises((ValueError, TooMuch), match=r"takes more than 0\.1 GiB of memory"):
        refuse_outside(table, address, "data.train")


def test_an_xz_file_with_a_dictionary_of_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    content = lzma.compress(b'{"text": "a"}\n', lzma.FORMAT_XZ, filters=filters)
    # The head of a block: sizes and flags, then filter 0x21 with one byte that stands for the dictionary, padding, CRC-32.
    head = bytearray(content[12 : 12 + (content[12] + 1) * 4])
    head[head.index(b"\x21\x01") + 2] = 39  # 3 GiB
    head[-4:] = zlib.crc32(head[:-4]).to_bytes(4, "little")
    file.write_bytes(content[:12] + head + content[12 + len(head) :])
    with pytest.raises(UserError, match=r"damaged or incomplete \.xz file|memory"):
        list(sources.read(DataFile(file)))
    file.write_bytes(content + lzma.compress(b'{"text": "b"}\n'))
    assert [row.fields for row in sources.read(DataFile(file))] == [{"text": "a"}, {"text": "b"}], (
        "two streams are one file"
    )
    file.write_bytes(content[:-8])
    with pytest.raises(UserError, match="damaged or incomplete"):
        list(sources.read(DataFile(file)))


LINES = {
    "rows.jsonl": (b'{"text": "a"}\n', b'{"text": "b"}\n', TextRows.line),
    "rows.csv": (b"text,label\na,b\n", b"c,d\n", TextRows.line),
    "rows.tsv": (b"text\tlabel\na\tb\n", b"c\td\n", TextRows.line),
    "lines.txt": (b"a\n", b"b\n", TextRows.line),
    "paragraphs.txt": (b"a\n", b"b\n", TextRows.paragraph),
    "document.txt": (b"a\n", b"b\n", TextRows.document),
    "words.conll": (b"a B-X\n", b"b O\n", TextRows.line),
}


@pytest.mark.parametrize("name", LINES)
def test_blank_lines_without_end_are_refused(name: str, tmp_path: Path) -> None:
    first, last, text_rows = LINES[name]
    file = tmp_path / f"{name}.gz"
    file.write_bytes(gzip.compress(first + b"\n" * 30_000_000, 1))
    began = time.process_time()
    with pytest.raises(UserError, match="blank lines"):
        list(sources.read(DataFile(file, text_rows=text_rows)))
    assert time.process_time() - began < 5
    file.write_bytes(gzip.compress(first + b"\n" * 1000 + last))
    rows = list(sources.read(DataFile(file, text_rows=text_rows)))
    assert len(rows) == (1 if text_rows is TextRows.document else 2) and not any(row.error for row in rows)


def test_an_archive_whose_directory_is_read_too_often_is_refused(tmp_path: Path) -> None:
    """Each member is opened by itself, and each time the directory of all members is read."""
    for members, is_refused in ((10, False), (4000, True)):
        with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
            for number in range(members):
                archive.writestr(f"{number}.jsonl", '{"text": "a"}\n')
        if is_refused:
            with pytest.raises(UserError, match="files"):
                sources._files_in(tmp_path / "rows.zip", TextRows.line)
        else:
            assert len(sources._files_in(tmp_path / "rows.zip", TextRows.line)) == members
