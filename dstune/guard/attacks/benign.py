"""Readers of benign texts in registry packages: prompts, chats, e-mails, documents and results of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Protocol

from dstune.guard.attacks.texts import BENIGN, Text, hash_fraction, language_of
from dstune.samples.chats import dialogue
from dstune.samples.sword import Files


class Archive(Files, Protocol):
    def open(self, name: str) -> IO[bytes]: ...


_OTHER_LICENCES = [
    "text_compression",
    "steganography",
    "schelling_point",
    "ballots",
    "sandbagging",
    "theory_of_mind",
    "already_said_that",
]
"""Evaluation tasks whose data has its own licence (see its LICENSE.md)."""
_ATTACKS = ("prompt-injection", "reverse-shell")
_READ_BYTES = 400_000
"""The most bytes read from a file: some have 100 MB, and only a few rows of each are used."""
_ROWS_EACH = 40


def evals(archive: Archive) -> Iterator[Text]:
    """Yield system and user turns of evaluation tasks, grouped by task."""
    for name in archive.namelist():
        parts = name.split("/")
        if not (name.startswith("evals/registry/data/") and name.endswith(".jsonl")):
            continue
        if parts[3] in (*_OTHER_LICENCES, *_ATTACKS):
            continue
        with archive.open(name) as file:
            lines = file.read(_READ_BYTES).split(b"\n")
        for line in lines[: _ROWS_EACH if len(lines) > 1 else 1]:
            text = _prompt(line)
            if text and len(text) >= 8:
                yield Text(text, BENIGN, "evals", "natural", f"evals:{parts[3]}", "input", language_of(text))


def _prompt(line: bytes) -> str | None:
    try:
        prompt = json.loads(line).get("input")
    except (ValueError, AttributeError):
        return None
    if isinstance(prompt, str):
        return prompt
    turns = prompt if isinstance(prompt, list) else []
    texts = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") in ("system", "user")]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def chitchat(archive: Archive, first: int) -> Iterator[Text]:
    """Yield turns of chats, and runs of three user turns, from conversation number `first` on, grouped by conversation. Earlier
    conversations are reserved for measuring a guard on conversations."""
    with archive.open("chitchat_dataset/dataset.json") as file:
        conversations = json.load(file)
    chats = [row for conversation in conversations.values() if (row := dialogue(conversation["messages"]))]
    for number, turns in enumerate(chats[first:], first):
        group = f"chitchat:{number}"
        for turn in turns:
            if len(turn["content"]) >= 8:
                direction = "input" if turn["role"] == "user" else "output"
                yield Text(turn["content"], BENIGN, "chitchat", "natural", group, direction)
        messages = [turn["content"] for turn in turns if turn["role"] == "user"]
        for start in range(0, len(messages) - 2, 3):
            yield Text("\n".join(messages[start : start + 3]), BENIGN, "chitchat", "natural", group)


def emails(files: Files) -> Iterator[Text]:
    """Yield the bodies of legitimate e-mails of 2002, with sender and subject, grouped by subject."""
    for name in files.namelist():
        if not (name.startswith("data/") and "ham" in name and name.endswith(".json")):
            continue
        header, _, body = json.loads(files.read(name))["text"].partition("\n\n")
        lines = dict(re.findall(r"^(From|Subject): (.*)$", header, re.MULTILINE))
        subject = re.sub(r"(?i)^((re|fwd?): *|\[[^\]]*\] *)+", "", lines.get("Subject", "")).strip()
        if "<html" in body.lower() or len(body) < 80:
            continue
        text = f"From: {lines.get('From', '')}\nSubject: {subject}\n\n{body.strip()}"
        yield Text(text, BENIGN, "emails", "document", f"email:{subject.lower()}", "tool_result")


def awscli(archive: Archive) -> Iterator[Text]:
    """Yield examples of command lines with their output, grouped by service."""
    for name in archive.namelist():
        parts = name.split("/")
        if name.startswith("awscli/examples/") and name.endswith(".rst") and len(parts) == 4:
            text = archive.read(name).decode("utf-8", errors="replace").replace("\r\n", "\n").strip()
            family = "tool" if text.count("{") >= 3 else "document"
            if len(text) >= 80:
                yield Text(text, BENIGN, "awscli", family, f"awscli:{parts[2]}", "tool_result")


def brown(files: Files) -> Iterator[Text]:
    """Yield American prose of 1961 in pieces of 2,000 words, grouped by document."""
    for name in files.namelist():
        if re.fullmatch(r"c[a-r]\d\d", name):
            words = re.sub(r"(\S+)/\S+", r"\1", files.read(name).decode("latin-1"))
            text = re.sub(r" ([,.;:?!])", r"\1", " ".join(words.replace("``", '"').replace("''", '"').split()))
            yield Text(text, BENIGN, "brown", "document", f"brown:{name}", "output")


def npm_documents(files: Files) -> Iterator[Text]:
    """Yield documentation in Markdown, grouped by file."""
    for name in files.namelist():
        if name.endswith(".md") and not re.search(r"licen[cs]e|contributing", name, re.IGNORECASE):
            text = files.read(name).decode("utf-8", errors="replace").strip()
            if len(text) >= 200:
                yield Text(text, BENIGN, "npm", "document", f"npm:{name}", "tool_result")


def windows(texts: Iterator[Text], each: int, characters: int) -> Iterator[Text]:
    """Yield up to `each` random parts of each text, between a third of `characters` and `characters` long."""
    for text in texts:
        yield from _windows(text, each, characters)


def _windows(text: Text, each: int, characters: int) -> Iterator[Text]:
    for number in range(each):
        chance = hash_fraction(f"{text.group}:{number}:{text.text[:80]}")
        size = int(characters * (1 / 3 + 2 / 3 * chance))
        start = int(max(len(text.text) - size, 0) * hash_fraction(f"start:{number}:{text.text[:80]}"))
        start = text.text.find(" ", start) + 1 if start else 0
        part = text.text[start : start + size].rsplit(" ", 1)[0] if len(text.text) > start + size else text.text[start:]
        if len(part) >= 40:
            yield replace(text, text=part)
