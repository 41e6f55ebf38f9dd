"""The parsers of rows, tables and chat templates, as `fuzz.py` calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_common import decoded, jsonl, later, tokenizer
from benchmarks.fuzz_inputs import CHAT, PIECES, Make, damaged, mapped, one_of, text
from dstune.core.errors import UserError


def check_rows(rows: Any, tasks: tuple[str, ...] | None = None) -> None:
    """Bring rows to one shape, under every task that reads rows."""
    from dstune.data.rows import RowError, canonical_json, normalise, recognise
    from dstune.protocols import TASKS

    rows = [row for row in rows if row.fields is not None]
    for task in TASKS if tasks is None else tasks:
        config = TASKS[task].Config()
        for row in rows[:3]:
            try:
                fmt = recognise(row.fields, {}, "auto", config, "rows:1")
                canonical_json(normalise(row.fields, fmt, {}, config))
            except (UserError, RowError):
                continue


def rows_of_file(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.data_schema import TextRows
        from dstune.data import sources
        from dstune.data.files import DataFile

        file = folder / name
        file.write_bytes(content)
        check_rows(
            list(sources.read(DataFile(file, text_rows=TextRows.paragraph if name.endswith(".md") else TextRows.line))),
            ("chat",),
        )

    return parse


def one_row(fields: Any, folder: Path) -> None:
    from dstune.data.files import DataFile, RawRow

    if isinstance(fields, dict):
        check_rows([RawRow(DataFile(folder / "rows.jsonl"), 1, fields)])


def csv_text(cells: list[list[str]]) -> bytes:
    return "\n".join(",".join(row) for row in cells).encode("utf-8", "surrogatepass")


@cache
def tables() -> dict[str, bytes]:
    import gzip
    import io
    import zipfile

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    labelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features).data.table
    messages = pa.table(
        {"messages": [CHAT["messages"][:2], CHAT["messages"][:2]], "at": pa.array([0, 1], pa.timestamp("us"))}
    )
    content_by_ending = {}
    for name, table in (("labelled", labelled), ("messages", messages)):
        parquet, arrow, stream = io.BytesIO(), io.BytesIO(), io.BytesIO()
        pq.write_table(table, parquet)
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        content_by_ending |= {
            f"parquet {name}": parquet.getvalue(),
            f"arrow {name}": arrow.getvalue(),
            f"stream {name}": stream.getvalue(),
        }
    content_by_ending["gzip"] = gzip.compress(jsonl([CHAT, CHAT]), mtime=0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("rows.jsonl", jsonl([CHAT]))
    content_by_ending["zip"] = archive.getvalue()
    return content_by_ending


def table_files(kind: str) -> Make:
    return later(lambda: one_of(*(damaged(content) for name, content in tables().items() if name.startswith(kind))))


def zipped(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    file = folder / "rows.zip"
    file.write_bytes(content)
    for data_file in sources.expand(str(file), "data.train"):
        check_rows(list(sources.read(data_file)), ("chat",))


def saved_set(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    (folder / "state.json").write_bytes(content)
    (folder / "dataset_info.json").write_bytes(content)
    (folder / "dataset_dict.json").write_bytes(content) if content.startswith(b'{"splits') else None
    for file in sources.expand(str(folder), "data.train"):
        assert file.path.resolve().is_relative_to(folder.resolve()), f"reads {file.path}"


def prompts_file(content: bytes, folder: Path) -> None:
    from dstune.inference.prompts import read_file

    (folder / "prompts.jsonl").write_bytes(content)
    read_file(folder / "prompts.jsonl")


def template(text: str, folder: Path) -> None:
    from dstune.data.chat.template import RenderError
    from dstune.data.render import ChatRenderer

    own_tokenizer = tokenizer()
    own_tokenizer.chat_template = text
    renderer = ChatRenderer(own_tokenizer, "2025-03-09")
    try:
        renderer.passages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    except RenderError:
        return


def templates() -> Make:
    pieces = st.lists(one_of(st.sampled_from(PIECES), text), min_size=1, max_size=8).map("".join)
    beside = st.tuples(pieces, pieces).map(lambda both: f"{both[0]}{tokenizer().chat_template}{both[1]}")
    changed = later(lambda: damaged(str(tokenizer().chat_template).encode()))
    return one_of(pieces, mapped(changed, decoded), beside)
