"""Finds the preset that a user means by a model's name: `qwen3-8b`, `Llama-3.1-8B-Instruct`, `meta-llama/Llama-3.1-8B`, an
address on the hub, or Ollama's `llama3.1:8b`.

Two names are the same if their words and numbers are: case, hyphens, underscores and spaces do not count. A name that leaves
something out (`qwen3`, `phi4-mini`) is never completed silently, because the hub has several models of that name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dstune.core.parsing import parse_yaml

HUB = re.compile(r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?", re.IGNORECASE)
"""Start of a model's address on the hub, and of its name in Ollama."""
CHAT_WORDS = ("instruct", "it", "chat")
"""Words at the end of a chat model's name. Ollama leaves them out: its `llama3.1:8b` is the instruct model."""


@dataclass(frozen=True)
class Preset:
    """A packaged file of the group `model`."""

    name: str
    path: str
    """Of its model on the hub, or of a sample."""

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """The parts of its model's name on the hub without the owner, and of its own name where that has the same version:
        `llama3_8b` is Llama 3.1, and `meta-llama-3-8b` is another model."""
        on_hub, of_preset = parts_of(self.path.rpartition("/")[2]), parts_of(self.name)
        return (on_hub, of_preset) if set(filter(_is_number, of_preset)) <= set(on_hub) else (on_hub,)


@cache
def presets() -> tuple[Preset, ...]:
    """Return all packaged presets."""
    from dstune.config.hydra_session import config_folder

    packaged = []
    for file in sorted((config_folder() / "model").glob("*.yaml")):
        content: Any = parse_yaml(file.read_text(encoding="utf-8"))
        packaged.append(Preset(file.stem, str(content.get("path", ""))))
    return tuple(packaged)


def parts_of(name: str) -> tuple[str, ...]:
    """Return the words and numbers of a model's name in lower case: `Qwen3_5-4B` is `qwen`, `3.5`, `4b`.

    Adjacent words are one word, and adjacent numbers without a unit are one version.
    """
    plain = re.sub(
        r"^meta-(?=llama)|(?<![a-z])v(?=\d)", "", name.lower()
    )  # formerly Meta-Llama-3.1-8B; Mistral-7B-v0.3
    parts: list[str] = []
    for part in re.findall(r"\d+(?:\.\d+)?(?:[bmt](?![a-z]))?|[a-z]+", plain):
        previous = parts[-1] if parts else ""
        if part.isalpha() and previous.isalpha():
            parts[-1] += part
        elif part.isdigit() and previous.isdigit():
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return tuple(part.removesuffix(".0") for part in parts)


def _is_number(part: str) -> bool:
    return part[0].isdigit()


def without_address(name: str) -> str:
    """Return a model's name without the address of the hub in front of it."""
    return HUB.sub("", name).rstrip("/") if HUB.match(name) else name


def preset_meant(name: str) -> Preset | None:
    """Return the preset of exactly this model, however its name is written; None if there is none, or if several fit."""
    name = without_address(name)
    if "/" in name:
        wanted = _owner_and_parts(name)
        return next((preset for preset in presets() if _owner_and_parts(preset.path) == wanted), None)
    plain = re.sub(r"[-\s]", "_", name.lower())
    matching = [preset for preset in presets() if preset.name == plain]
    if not matching and ":" in name:
        matching = [preset for word in CHAT_WORDS for preset in _matching(f"{name}-{word}")]
    matching = matching or _matching(name)
    return matching[0] if len(matching) == 1 else None


def _owner_and_parts(path: str) -> tuple[str, tuple[str, ...]]:
    owner, _, name = path.lower().rpartition("/")
    return owner, parts_of(name)


def _matching(name: str) -> list[Preset]:
    parts = parts_of(name)
    return [preset for preset in presets() if parts and parts in preset.spellings]


def candidates(name: str) -> list[Preset]:
    """Return the presets that a name with something left out may mean: those with all its parts, in this order."""
    parts = parts_of(without_address(name).rpartition("/")[2].removesuffix(":latest"))
    return [preset for preset in presets() if any(_contains(known, parts) for known in _both_names(preset))]


def family(name: str) -> list[Preset]:
    """Return the presets that have the first word of a name, and its version if it has one."""
    parts = parts_of(name)
    for length in (2, 1):
        if len(parts) >= length and (relatives := [p for p in presets() if _starts(p, parts[:length])]):
            return relatives
    return []


def _starts(preset: Preset, parts: tuple[str, ...]) -> bool:
    return any(known[: len(parts)] == parts for known in _both_names(preset))


def _both_names(preset: Preset) -> tuple[tuple[str, ...], ...]:
    return parts_of(preset.name), parts_of(preset.path.rpartition("/")[2])


def _contains(known: Sequence[str], parts: Sequence[str]) -> bool:
    """Return whether `known` starts like `parts` and has all of them in this order; a word may be continued (`smollm3` in
    `smollm3base`)."""
    remaining = list(known)
    for index, part in enumerate(parts):
        while remaining and not (remaining[0] == part or (part.isalpha() and remaining[0].startswith(part))):
            if index == 0:
                return False
            remaining.pop(0)
        if not remaining:
            return False
        remaining.pop(0)
    return True


def nearest_preset(name: str) -> Preset | None:
    """Return the preset whose name is most similar and has the same numbers, as in `gwen3-8b`; None if there is none.

    Another number is another model: `gemma3-4b` is not a slip for `gemma3_1b`.
    """
    digits, letters = _digits(name), _letters(name)
    by_letters: dict[str, Preset] = {}
    for preset in presets():
        for spelling in (preset.name, preset.path.rpartition("/")[2]):
            if _digits(spelling) == digits:
                by_letters.setdefault(_letters(spelling), preset)
    similar = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.75)
    return by_letters[similar[0]] if similar else None


def nearest_family(name: str) -> list[Preset]:
    """Return the presets of the family whose name is most similar to the first word of a name and has its number, as for `lama3`;
    empty if there is none."""
    parts = parts_of(name)
    families = {preset_parts[0] for preset in presets() if (preset_parts := parts_of(preset.name))}
    if not parts or parts[0] in families:
        return []
    similar = difflib.get_close_matches(parts[0], families, n=1, cutoff=0.75)
    return family(" ".join((similar[0], *parts[1:]))) if similar else []


def _digits(name: str) -> str:
    return re.sub(r"\D", "", name)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
