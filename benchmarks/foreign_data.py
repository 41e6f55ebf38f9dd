"""Data files that other tools ship, read as a user would give them: without mapping, format or cleaning.

    python benchmarks/foreign_data.py FOLDER [--markdown FILE] [--samples N] [--rows N]

Each file below FOLDER is read under task=chat, else under the first of task=preference, task=preference task.loss=kto and
task=causal_lm that reads it. Of every row that is read, every text that the file has must stand in what the model gets to see,
the schemas of tools with their keys in the order of the file, and every message of the assistant that counts in what is trained;
the template is our `chatml`, the tokenizer made up. Each image of such a row is read and decoded, and its place counted.
Otherwise the row is WRONG, and the program ends with 1. `--samples` prints
what is trained, to be looked at. Nothing of the files is part of this repository. How they were obtained:

    git clone https://github.com/hiyouga/LLaMA-Factory     data/*.json, data/*.jsonl, data/*.txt but dataset_info.json
    git clone https://github.com/axolotl-ai-cloud/axolotl  tests/fixtures/**/*.json
    git clone https://github.com/modelscope/ms-swift       tests/llm/data/*, examples/**/*.jsonl
    git clone https://github.com/huggingface/trl           the rows that scripts/generate_*_dataset.py make, a file each:
                                                           JSONL, and Parquet of those with images
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from templates import tokenizer_for

from dstune.chat_templates import FOLDER
from dstune.config.data_schema import AUTOMATIC
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.data.collate import NO_TARGET
from dstune.data.files import is_readable
from dstune.data.formats import check_task, recognise
from dstune.data.images.places import COLUMN, MARKER, is_place
from dstune.data.images.store import ImageFiles, ImageWriter
from dstune.data.preferences import ANSWERS, as_chat
from dstune.data.rows import RowError, json_text, normalise
from dstune.data.tokenize import RowTokenizer
from dstune.data.unread import Unread
from dstune.protocols import task_of
from dstune.protocols.task import TaskConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss

DATE = "2026-01-15"
CHAT, TEXT = ChatConfig(template_date=DATE), CausalLmConfig()
TASKS: dict[str, TaskConfig] = {
    "chat": CHAT,
    "preference": PreferenceConfig(template_date=DATE),
    "preference, kto": PreferenceConfig(loss=PreferenceLoss.kto, template_date=DATE),
    "causal_lm": TEXT,
}
LONGEST = 1 << 20
"""Tokens of a row: more than any has."""
NOT_SEEN = (
    "role",
    "from",
    "type",
    "name",
    "id",
    "tool_call_id",
    "tools",
    "label",
    "kto_tag",
    "loss_weight",
    "chat_template_kwargs",
)
"""Keys whose values are no text that the model has to see."""
IMAGES = ("image", "images", "image_url")
"""Keys whose values are images."""


@dataclass
class Reading:
    """What became of one file under one task."""

    task: str
    format: str = ""
    rows: int = 0
    good: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unread: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)


class Renderer:
    """Renders rows as a run does, with a made-up tokenizer."""

    def __init__(self) -> None:
        self._tokenizer = tokenizer_for("chatml", (FOLDER / "chatml.jinja").read_text(encoding="utf-8"))
        self._chat = RowTokenizer(self._tokenizer, CHAT, "messages", LONGEST)
        self._text = RowTokenizer(self._tokenizer, TEXT, "text", LONGEST)

    def texts(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return what the model sees of a normalised row, and what of it is trained (of a pair, of both answers). Raises
        RowError."""
        row = without_images(row)
        rows = [as_chat(row, answer) for answer in ANSWERS] if "chosen" in row else [row]
        seen, trained = [], []
        for part in rows:
            encode = self._text if "text" in part else self._chat
            for sample in encode.samples([json.loads(json_text(part))], [0]):
                if sample.problem:
                    raise RowError(sample.problem)
                seen.append(self._tokenizer.decode(sample.input_ids))
                trained.append(self._tokenizer.decode(sample.labels[sample.labels != NO_TARGET]))
        return "\n".join(seen), "\n".join(trained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--samples", type=int, default=1, help="rows of each file of which the trained text is printed")
    parser.add_argument("--rows", type=int, default=50, help="rows of each file whose texts are compared")
    options = parser.parse_args()
    renderer = Renderer()
    lines = ["| file | read as | rows | refused, and why |", "| --- | --- | --- | --- |"]
    wrong = 0
    for file in sorted(options.folder.rglob("*")):
        if not file.is_file() or not is_readable(file.name):
            continue
        reading = read(file, renderer, options.rows, options.samples)
        name = file.relative_to(options.folder).as_posix()
        lines.append(row_of(name, reading))
        print(lines[-1])
        for text in reading.trained:
            print(f"    trained: {text!r}")
        for text in reading.wrong:
            print(f"    WRONG: {text}")
        wrong += bool(reading.wrong)
    print(f"{len(lines) - 2} files, {wrong} wrong")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def row_of(name: str, reading: Reading) -> str:
    reasons = "; ".join(f"{count}: {reason}" if reading.good else reason for reason, count in reading.refused.items())
    unread = ", ".join(f"`{column}` of {count} is not used" for column, count in reading.unread.items())
    read_as = f"{reading.task}: `{reading.format}`" if reading.good else "refused"
    return f"| {name} | {read_as} | {reading.good} of {reading.rows} | {'; '.join(filter(None, (reasons, unread)))} |"


def read(file: Path, renderer: Renderer, compared: int, shown: int) -> Reading:
    """Read a file under the first task that can; returns what became of it, under task=chat where no task can. compared: rows whose
    texts are compared; shown: rows whose trained texts are kept."""
    first: Reading | None = None
    for name, task in TASKS.items():
        try:
            reading = _read(file, name, task, renderer, compared, shown)
        except UserError as error:
            problem = error.problems[0]
            reason = re.sub(r", the columns here are .*", "", problem.reason)
            reading = Reading(name, rows=sum(1 for _ in _rows(file)))
            reading.refused[f"{reason} ({problem.fix})"] = reading.rows
        if reading.good:
            return reading
        # Refused row by row says more than a format that does not fit.
        if first is None or (reading.format and not first.format):
            first = reading
    assert first is not None
    return first


def _rows(file: Path) -> Iterator[sources.RawRow]:
    for data_file in sources.expand(str(file), "data.train"):
        yield from sources.read(data_file)


def _read(file: Path, name: str, task: TaskConfig, renderer: Renderer, compared: int, shown: int) -> Reading:
    reading = Reading(name)
    unread: Unread | None = None
    for raw in _rows(file):
        reading.rows += 1
        try:
            if raw.fields is None:
                raise RowError(raw.error)
            if unread is None:
                reading.format = recognise(raw.fields, {}, AUTOMATIC, task, raw.place)
                unread = Unread(reading.format, {})
            check_task(reading.format, raw.fields, {}, AUTOMATIC, task, raw.place)
            row = normalise(raw.fields, reading.format, {}, task)
            look_at_images(row, file)
            unread.add(raw.fields)
            if reading.good < compared:
                seen, trained = renderer.texts(row)
                if missing := missing_text(raw.fields, unread, row, seen, trained):
                    reading.wrong.append(f"{raw.place}: {missing}")
                if reading.good < shown:
                    reading.trained.append(trained[:300])
            reading.good += 1
        except RowError as error:
            reason = re.sub(r"^image \d+ \('.*?'\)", "an image", str(error))
            reading.refused[re.sub(r" in '.*?;", ";", reason, flags=re.S)] += 1
    assert task_of(task) is not None
    if unread is not None and reading.good:
        reading.unread = dict(unread.rows)
    return reading


def look_at_images(row: dict[str, Any], file: Path) -> None:
    """Read and decode the images of a row of `file` as a run does. Raises RowError."""
    if not row.get(COLUMN):
        return
    with tempfile.TemporaryDirectory() as folder:
        writer = ImageWriter(Path(folder))
        numbers = [entry["number"] for entry in writer.take(row, file)[COLUMN]]
        writer.finish()
        files = ImageFiles.of(Path(folder))
        assert files is not None
        for number in numbers:
            files.image(number)


def without_images(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the word PLACE where an image stands, which no model is needed for. Asserts that each has one."""
    if COLUMN not in row:
        return row
    key = "prompt" if "chosen" in row else "messages"
    asked = [
        {**message, "content": [_word(part) for part in content] if isinstance(content, list) else content}
        for message in row[key]
        for content in [message.get("content")]
    ]
    places = sum(part == _PLACE for message in asked for part in message["content"] or ())
    assert places == len(row[COLUMN]), f"{places} places for {len(row[COLUMN])} images"
    return {name: value for name, value in row.items() if name != COLUMN} | {key: asked}


_PLACE = {"type": "text", "text": "PLACE"}


def _word(part: dict[str, Any]) -> dict[str, Any]:
    return _PLACE if is_place(part) else part


def missing_text(fields: dict[str, Any], unread: Unread, row: dict[str, Any], seen: str, trained: str) -> str:
    """Return a text of the file that the model does not see, or of the assistant that is not trained; empty where there is none."""
    read_fields = {key: value for key, value in fields.items() if key not in unread.rows}
    texts: Iterable[str] = leaves(read_fields)
    if COLUMN in row:
        row = without_images(row)
        texts = [part for text in texts for part in text.split(MARKER)]
    for text in (*texts, *schemas(read_fields)):
        if _flat(text) not in _flat(seen):
            return f"{text[:200]!r} is not in what the model sees"
    conversations = [as_chat(row, answer) for answer in ANSWERS] if "chosen" in row else [row]
    for conversation in conversations:
        for message in conversation.get("messages", ()):
            if message["role"] != "assistant" or not message.get("weight", 1):
                continue
            texts = [message.get("content") or "", message.get("reasoning_content") or ""]
            for function in (call["function"] for call in message.get("tool_calls", ())):
                texts += [function["name"], json.dumps(function["arguments"], ensure_ascii=False)]
            for text in texts:
                if _flat(text) not in _flat(trained):
                    return f"{text[:200]!r} of the assistant is not trained"
    return ""


def leaves(value: Any) -> Iterator[str]:
    """Yield every text in a row of a file. What is JSON as text is looked into: templates print it in their own way."""
    if isinstance(value, dict) and value.get("type") not in IMAGES:
        for key, item in value.items():
            if key not in NOT_SEEN and key not in IMAGES:
                yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str) and value.strip():
        try:
            inner = json.loads(value) if value.lstrip()[0] in "[{" else None
        except ValueError:
            inner = None
        # Speakers of hh-rlhf are no part of what they say.
        parts = re.split(r"\n\n(?:Human|Assistant):", "\n\n" + value) if inner is None else []
        yield from (part.strip() for part in parts if part.strip())
        if inner is not None:
            yield from leaves(inner)


def schemas(fields: dict[str, Any]) -> Iterator[str]:
    """Yield the function of each tool of a row, as JSON has it."""
    tools = fields.get("tools") or fields.get("functions") or []
    for tool in json.loads(tools) if isinstance(tools, str) else tools:
        function = json.loads(tool) if isinstance(tool, str) else tool
        yield json.dumps(function.get("function", function), ensure_ascii=False)


def _flat(text: str) -> str:
    """Return the text without white space and the escapes of JSON, in which a template may write a text."""
    return re.sub(r"[\s\\]+", "", text)


if __name__ == "__main__":
    sys.exit(main())
