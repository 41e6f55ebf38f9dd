"""The same few rows in every format and from every kind of source that dstune reads."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

from tests.support.tiny import WORDS

Rows = list[dict[str, Any]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pairs(count: int = 24) -> list[tuple[str, str]]:
    """Return questions and answers of a few words."""
    choose = random.Random(7)
    return [tuple(" ".join(choose.choices(WORDS, k=choose.randint(1, 9))) for _ in "qa") for _ in range(count)]  # type: ignore[misc]


CHATS: Rows = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in pairs()
]
TEXTS: Rows = [{"text": f"{question} {answer}"} for question, answer in pairs()]
LABELLED: Rows = [
    {"text": question, "label": "even" if number % 2 else "odd"} for number, (question, _) in enumerate(pairs())
]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    quoted = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
    lines = [delimiter.join(fields) for fields in [list(rows[0]), *quoted]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_arrow_stream(path: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_arrow_file(path: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_cached_hub(cache: Path, repository: str, splits: dict[str, Rows], subset: str = "default") -> None:
    """Write what `datasets` leaves in its cache of a data set of the hub at COMMIT."""
    owner, name = repository.split("/")
    folder = cache / f"{owner}___{name}" / subset / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        write_arrow_stream(folder / f"{name}-{split}.arrow", rows)
    described = {
        split: {"name": split, "num_examples": len(rows), "dataset_name": name} for split, rows in splits.items()
    }
    info = {"builder_name": "json", "dataset_name": name, "config_name": subset, "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def chat_sources(folder: Path) -> dict[str, str]:
    """Return `data.train` by kind of source; each holds CHATS."""
    half = len(CHATS) // 2
    table = pa.Table.from_pylist(CHATS)

    def put(name: str, content: bytes) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return str(folder / name)

    as_text = [{"messages": json.dumps(row["messages"])} for row in CHATS]
    source_by_kind = {
        "jsonl": put("rows.jsonl", jsonl(CHATS)),
        "ndjson": put("rows.ndjson", jsonl(CHATS)),
        "json array": put("rows.json", json.dumps(CHATS, indent=1).encode()),
        "json lines named json": put("lines.json", jsonl(CHATS)),
        "json objects over lines": put("objects.json", "\n".join(json.dumps(row, indent=1) for row in CHATS).encode()),
        "csv": str(write_csv(folder / "rows.csv", as_text)),
        "tsv": str(write_csv(folder / "rows.tsv", as_text, "\t")),
        "jsonl.gz": put("rows.jsonl.gz", gzip.compress(jsonl(CHATS))),
        "jsonl.bz2": put("rows.jsonl.bz2", bz2.compress(jsonl(CHATS))),
        "jsonl.xz": put("rows.jsonl.xz", lzma.compress(jsonl(CHATS))),
        "jsonl.zst": put("rows.jsonl.zst", pa.compress(jsonl(CHATS), codec="zstd", asbytes=True)),
        "json.gz": put("rows.json.gz", gzip.compress(json.dumps(CHATS).encode())),
        "csv.gz": put("rows.csv.gz", gzip.compress((folder / "rows.csv").read_bytes())),
        "arrow stream": str(write_arrow_stream(folder / "stream.arrow", CHATS)),
        "arrow file": str(write_arrow_file(folder / "file.arrow", CHATS)),
        "glob": f"{folder}/parts/*.jsonl",
        "deep glob": f"{folder}/deep/**/*.jsonl",
        "folder": f"{folder}/parts",
        "folder with splits": f"{folder}/splits",
        "folder with a named split": f"{folder}/splits:test",
        "sharded folder": f"{folder}/sharded:train_sft",
        "zip": str(folder / "rows.zip"),
        "save_to_disk": str(folder / "saved"),
        "saved DatasetDict": str(folder / "saved-dict"),
        "saved DatasetDict with a named split": f"{folder}/saved-dict:other",
        "hub": "org/chats",
        "hub split": "org/chats:train_sft",
        "hub commit": f"org/chats@{COMMIT}:train_sft",
    }
    pq.write_table(table, folder / "rows.parquet", row_group_size=5)
    source_by_kind["parquet"] = str(folder / "rows.parquet")
    pyarrow.feather.write_feather(table, folder / "rows.feather")
    source_by_kind["feather"] = str(folder / "rows.feather")
    for name, rows in (("a", CHATS[:half]), ("b", CHATS[half:])):
        put(f"parts/{name}.jsonl", jsonl(rows))
        put(f"deep/{name}/rows.jsonl", jsonl(rows))
        pq_path = folder / "sharded" / "data" / f"train_sft-0000{'ab'.index(name)}-of-00002.parquet"
        pq_path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), pq_path)
    (folder / "sharded" / "README.md").write_text("# About these rows\n")
    for split in ("train", "test"):
        put(f"splits/{split}.jsonl", jsonl(CHATS))
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr("rows/a.jsonl", jsonl(CHATS[:half]))
        archive.writestr("rows/b.jsonl.gz", gzip.compress(jsonl(CHATS[half:])))
        archive.writestr("__MACOSX/._a.jsonl", "x")
        archive.writestr("README", "x")
    saved = datasets.Dataset.from_list(CHATS)
    saved.save_to_disk(str(folder / "saved"), num_shards=2)
    datasets.DatasetDict({"train": saved, "other": saved}).save_to_disk(str(folder / "saved-dict"))
    return source_by_kind


def chat_formats(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return (`data.train`, further overrides) by format of the rows; each says the same as CHATS."""
    parts = {
        "openai content parts": [
            {
                "messages": [
                    {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]
                ]
            }
            for row in CHATS
        ],
        "openai weight": [
            {"messages": [row["messages"][0], {**row["messages"][1], "weight": 1}], "parallel_tool_calls": False}
            for row in CHATS
        ],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            for question, answer in pairs()
        ],
        "sharegpt with role and content": [{"conversations": row["messages"]} for row in CHATS],
        "alpaca": [{"instruction": question, "input": "", "output": answer} for question, answer in pairs()],
        "prompt and completion": [{"prompt": question, "completion": answer} for question, answer in pairs()],
        "prompt and response": [{"prompt": question, "response": answer} for question, answer in pairs()],
        "lists of messages": [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS],
        "columns of the file": [{"question": question, "reply": answer} for question, answer in pairs()],
    }
    overrides = {"columns of the file": ["data.columns={prompt: question, completion: reply}"]}
    return {
        name: (str(write_jsonl(folder / f"format-{number}.jsonl", rows)), overrides.get(name, []))
        for number, (name, rows) in enumerate(parts.items())
    }


def text_sources(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return (`data.train`, further overrides) of plain texts; each holds TEXTS."""
    lines = "\n".join(row["text"] for row in TEXTS)
    (folder / "texts.txt").write_text(lines + "\n")
    (folder / "texts.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "paragraphs.md").write_text("\n\n".join(row["text"] for row in TEXTS))
    (folder / "documents").mkdir()
    for number, row in enumerate(TEXTS):
        (folder / "documents" / f"{number:03d}.txt").write_text(row["text"])
    return {
        "text in jsonl": (str(write_jsonl(folder / "texts.jsonl", TEXTS)), []),
        "text and label": (str(write_jsonl(folder / "both.jsonl", [row | {"label": "x"} for row in TEXTS])), []),
        "lines": (str(folder / "texts.txt"), []),
        "lines.gz": (str(folder / "texts.txt.gz"), []),
        "paragraphs": (str(folder / "paragraphs.md"), ["data.text_rows=paragraph"]),
        "documents": (str(folder / "documents"), ["data.text_rows=document"]),
    }


def label_sources(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return (`data.train`, further overrides) of labelled texts; each holds LABELLED."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["odd", "even"])}
    )
    with_classes = datasets.Dataset.from_list(LABELLED).cast(features)
    with_classes.to_parquet(str(folder / "classes.parquet"))
    with_classes.save_to_disk(str(folder / "classes"))
    lists = [{"text": row["text"], "labels": [row["label"]]} for row in LABELLED]
    return {
        "labels in csv": (str(write_csv(folder / "labelled.csv", LABELLED)), []),
        "a list of one label": (str(write_jsonl(folder / "lists.jsonl", lists)), []),
        "class names in parquet": (str(folder / "classes.parquet"), []),
        "class names in a saved data set": (str(folder / "classes"), []),
    }
