"""Planted copies: all equal ones found, at least 95% of nearly equal ones, and almost nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from support.cleaning import CHAT, TEXT, Cleaned, edit_distance, edited, remaining_rows
from unit.data_helpers import byte_tokenizer, exchange

from dstune import samples
from dstune.config.data_schema import Duplicates
from dstune.data.clean.near import NearCopies, signature, similarity
from dstune.data.clean.rows import near_text
from dstune.tasks.classification.config import ClassificationConfig

EDITS = 0.05
THRESHOLD = 0.9


@cache
def prose() -> tuple[dict[str, Any], ...]:
    """Real texts that every Python brings: the help on its language, in pieces of 300 to 900 characters."""
    random_source = random.Random(0)
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    pieces, start = [], 0
    while start < len(text) - 900:
        length = random_source.randint(300, 900)
        pieces.append({"text": text[start : start + length]})
        start += length
    return tuple(pieces)


def planted(
    rows: list[dict[str, Any]], change: Any, count: int, seed: int
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """`rows` with changed copies of `count` of them at random places behind their originals; by the place of each copy
    that of its original."""
    random_source = random.Random(seed)
    keyed = [(float(number), row, number, False) for number, row in enumerate(rows)]
    keyed += [
        (random_source.uniform(number, len(rows)), change(rows[number], random_source), number, True)
        for number in random_source.sample(range(len(rows)), count)
    ]
    keyed.sort(key=lambda item: item[0])
    places = {number: place for place, (_, _, number, copy) in enumerate(keyed) if not copy}
    copies = {place: places[number] for place, (_, _, number, copy) in enumerate(keyed) if copy}
    return [row for _, row, _, _ in keyed], copies


def spaced(row: dict[str, Any], random_source: random.Random) -> dict[str, Any]:
    """The same row with other white space."""
    return _changed(row, lambda text: f" {text}\n".replace(" ", random_source.choice(["  ", " ", "\t", "\r\n"])))


def unlike(rows: Sequence[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """`rows` without those that repeat much of the first ones: how much Python's help repeats depends on its version."""

    def runs(row: dict[str, Any]) -> set[tuple[str, ...]]:
        words = row["text"].split()
        return set(zip(words, words[1:], words[2:], strict=False))

    seen = set().union(*map(runs, rows[:first]))
    return [row for n, row in enumerate(rows) if n < first or len(runs(row) & seen) < 0.3 * len(runs(row))]


def slightly(row: dict[str, Any], random_source: random.Random) -> dict[str, Any]:
    # Of a text of one character nothing might be left, which would be a bad row and shift the numbers of all behind it.
    def changed(text: str) -> str:
        found = edited(text, EDITS, random_source) if text else text
        return found if found.strip() else text

    return _changed(row, changed)


def _changed(row: dict[str, Any], change: Any) -> dict[str, Any]:
    if "text" in row:
        return {**row, "text": change(row["text"])}
    return {"messages": [{**message, "content": change(message["content"])} for message in row["messages"]]}


def true_similarity(first: str, second: str) -> float:
    """1 - edit distance / length by exact computation; a test below holds the library against the textbook."""
    return Levenshtein.normalized_similarity(first, second)


def is_similar(first: str, second: str) -> bool:
    """Whether the similarity reaches THRESHOLD, exactly: below it the library may stop early."""
    return Levenshtein.normalized_similarity(first, second, score_cutoff=THRESHOLD) >= THRESHOLD


def falsely_removed(
    rows: list[dict[str, Any]], kept: list[int], removed: set[int], copies: dict[int, int]
) -> list[int]:
    """Removed rows to which, by exact computation, no earlier row that stayed is similar enough."""
    texts = [near_text(row) for row in rows]
    wrong = []
    for number in sorted(removed):
        original = copies.get(number)
        if original in kept and is_similar(texts[number], texts[original]):
            continue
        if not any(is_similar(texts[number], texts[at]) for at in kept if at < number):
            wrong.append(number)
    return wrong


def check_planted(rows: list[dict[str, Any]], task: Any, seed: int, folder: Path, capsys: Any) -> None:
    tokenizer = byte_tokenizer()
    count = len(rows) // 4

    with_equal, equal = planted(rows, spaced, count, seed)
    cleaned = Cleaned(folder, tokenizer, task, duplicates=Duplicates.exact)
    kept = remaining_rows(cleaned.rows(with_equal))
    found_equal = set(equal) - set(kept)
    more = len(with_equal) - len(kept) - len(found_equal)

    with_near, near = planted(rows, slightly, count, seed)
    cleaned = Cleaned(folder, tokenizer, task, duplicates=Duplicates.near, near_threshold=THRESHOLD)
    kept = remaining_rows(cleaned.rows(with_near))
    removed = set(range(len(with_near))) - set(kept)
    found_near = set(near) & removed
    wrong = falsely_removed(with_near, kept, removed, near)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {len(rows)} rows; equal {len(found_equal)}/{count}, {more} of their own; "
            f"near {len(found_near)}/{count}, {len(removed) - len(found_near)} of their own, {len(wrong)} false"
        )
    assert found_equal == set(equal)
    assert len(found_near) >= 0.95 * count
    assert len(wrong) <= 0.01 * len(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_planted_in_prose(seed, tmp_path, capsys):
    check_planted(list(prose()), TEXT, seed, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_planted_in_dialogues(seed, tmp_path, capsys):
    path = samples.resolve("sample://chitchat")
    rows = [json.loads(line) for line in path.open()]
    check_planted(rows, CHAT, seed, tmp_path, capsys)


def test_the_edit_distance_of_the_library_is_that_of_the_textbook():
    random_source = random.Random(3)
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    for row in prose()[:20]:
        text = row["text"]
        copy = edited(text, random_source.choice([0.02, 0.1, 0.3]), random_source)
        expected = 1 - edit_distance(text, copy) / max(len(text), len(copy))
        assert true_similarity(text, copy) == pytest.approx(expected)
        assert similarity(text, copy, 0.0) == pytest.approx(expected)
        assert similarity(text, copy, expected + 0.01) == 0.0


def test_what_counts_as_equal(tmp_path):
    rows = [
        exchange("Hi  there", "Hello"),
        exchange("Hi there\n", " Hello"),  # white space
        exchange("Hi there", "hello"),  # case counts
        exchange("Hi", "there Hello"),  # who says it counts
        {"messages": [{"role": "system", "content": "Be kind"}, *exchange("Hi there", "Hello")["messages"]]},
        exchange("Hi there", "Hello"),
    ]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), CHAT)
    assert remaining_rows(cleaned.rows(rows)) == [0, 2, 3, 4]
    assert cleaned.counts() == {"duplicates": {"removed": 2}}
    (first, second) = cleaned.report()["examples"]["duplicates"]
    place = tmp_path / "train.jsonl"
    assert first == {"place": f"{place}:2", "text": f"as {place}:1: Hi there / Hello"}
    assert second["place"] == f"{place}:6"


def test_a_label_is_part_of_a_row(tmp_path):
    text = prose()[0]["text"]
    rows = [{"text": text, "label": "a"}, {"text": text, "label": "b"}, {"text": text + "!", "label": "b"}]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), ClassificationConfig(), duplicates=Duplicates.near)
    assert remaining_rows(cleaned.rows(rows)) == [0, 1]
    assert cleaned.counts() == {"near_duplicates": {"removed": 1}}


def test_all_may_stay(tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, duplicates=Duplicates.keep)
    assert remaining_rows(cleaned.rows([{"text": "same"}] * 3)) == [0, 1, 2]
    assert "duplicates" not in cleaned.report()["clean"]


def test_duplicates_of_a_file_given_for_validation_are_counted_only(tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT)
    assert remaining_rows(cleaned.rows([{"text": "same"}] * 3, "validation")) == [0, 1, 2]
    assert cleaned.counts("validation") == {"duplicates": {"flagged": 2}}


def test_the_first_row_stays_and_copies_of_copies_do_not_drift():
    text = prose()[0]["text"]
    # Each differs from the one before by 4% of its characters.
    cuts = [step * len(text) // 25 for step in range(6)]
    texts = [text[: len(text) - cut] + "#" * cut for cut in cuts]
    signatures = np.frombuffer(b"".join(map(signature, texts)), dtype=np.uint32).reshape(len(texts), -1)
    found = NearCopies(signatures, texts.__getitem__, lambda one, two: np.ones(len(one), bool), THRESHOLD).find()
    for number, original in enumerate(found.tolist()):
        if original >= 0:
            assert original < number and found[original] == -1
            assert true_similarity(texts[original], texts[number]) >= THRESHOLD
    assert found[:4].tolist() == [-1, 0, 0, -1]


def test_many_rows_with_much_in_common_take_no_quadratic_time(tmp_path):
    """All 3,000 rows meet in nearly every group: compared with all earlier ones that would be 4.5 million pairs."""
    compared = 0
    texts = [f"{prose()[0]['text']} {number}" for number in range(3000)]
    signatures = np.frombuffer(b"".join(map(signature, texts)), dtype=np.uint32).reshape(len(texts), -1)

    def text(number: int) -> str:
        nonlocal compared
        compared += 1
        return texts[number]

    found = NearCopies(signatures, text, lambda one, two: np.ones(len(one), bool), THRESHOLD).find()
    assert (found[1:] == 0).all()
    assert compared < 20_000


def test_texts_shorter_than_a_run(tmp_path):
    rows = [{"text": text} for text in ("a", "b", "ab", "abc", "abcd", "abcdefghij", "abcdefghijk", "ABCDEFGHIJ")]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, duplicates=Duplicates.near)
    assert remaining_rows(cleaned.rows(rows)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("duplicates", [Duplicates.exact, Duplicates.near])
def test_leaks_leave_training_and_nothing_else(duplicates, tmp_path):
    rows = unlike(prose(), 30)[:200]
    random_source = random.Random(4)
    equal = [spaced(row, random_source) for row in rows[:10]]
    near = [slightly(row, random_source) for row in rows[10:30]]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, duplicates=duplicates)
    train = cleaned.rows(rows)
    held_out = [cleaned.rows(equal, "validation"), cleaned.rows([*near, {"text": "of its own"}], "test")]
    kept = cleaned.cleaning.without_leaks((train, train.rows), [(table, table.rows) for table in held_out])
    removed = set(range(200)) - set(kept.tolist())
    assert set(range(10)) <= removed
    if duplicates is Duplicates.near:
        assert removed <= set(range(30)) and len(removed) >= 10 + 19
    else:
        assert removed == set(range(10))
    assert [len(table.rows) for table in held_out] == [10, 21]
    assert cleaned.counts()["leaks"] == {"removed": len(removed)}
    example = cleaned.report()["examples"]["leaks"][0]
    assert example["place"].endswith("train.jsonl:1") and "validation.jsonl:1: " in example["text"]


def test_leaks_may_stay(tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, leaks=False)
    train, held_out = cleaned.rows([{"text": "same"}]), cleaned.rows([{"text": "same"}], "validation")
    assert cleaned.cleaning.without_leaks((train, train.rows), [(held_out, held_out.rows)]).tolist() == [0]


def test_a_text_under_another_label_is_a_leak(tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), ClassificationConfig())
    train = cleaned.rows([{"text": "same", "label": "a"}, {"text": "other", "label": "b"}])
    held_out = cleaned.rows([{"text": "same", "label": "b"}], "validation")
    assert cleaned.cleaning.without_leaks((train, train.rows), [(held_out, held_out.rows)]).tolist() == [1]
