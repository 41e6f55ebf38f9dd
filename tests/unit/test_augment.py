"""Changed copies of training rows: what techniques do to words, seeds, balance, and that nothing held out is made anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.tiny import save_decoder, save_t5
from unit.data_helpers import data_run, prepared, refusal_of, wordpiece, write_jsonl

from dstune.config.augment_schema import AugmentConfig
from dstune.config.data_schema import SplitConfig
from dstune.config.schema import RunConfig
from dstune.config.validate import find_problems
from dstune.data.augment.words import deleted, pieces, replaced, swapped
from dstune.protocols.task import TaskConfig
from dstune.report.data_section import part
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig

TEXT = "A good film, with  GOOD people\nin it."
LETTERS = [f"{first}{second}" for first in "abcdefg" for second in "abcdefg"]


def rows(count: int, *, rare: int = 0) -> list[dict[str, str]]:
    choose = Random(count)
    return [
        {"text": " ".join(choose.sample(LETTERS, 8)), "label": "rare" if number < rare else "common"}
        for number in range(count)
    ]


def run(path: Path, task: TaskConfig | None = None, **augment: Any) -> RunConfig:
    split = SplitConfig(validation=0.25)
    return data_run(
        path, task=task or ClassificationConfig(), packing=False, split=split, augment=AugmentConfig(**augment)
    )


def texts_of(data: Any, name: str = "train") -> list[str]:
    split = getattr(data, name)
    return [wordpiece().decode(split.sample(index)["input_ids"]) for index in range(len(split.lengths))]


# ---- words ----


def test_words_are_left_out_by_a_coin_each():
    found, count = deleted(TEXT, 0.5, Random(1))
    kept = found.split()
    assert count == len(TEXT.split()) - len(kept) > 0
    assert [word for word in TEXT.split() if word in kept] == kept, "in their order"
    assert deleted(TEXT, 0.999999, Random(1))[0].strip() in TEXT.split(), "one word is left"
    long = " ".join(LETTERS * 100)
    assert deleted(long, 0.3, Random(2))[1] == pytest.approx(0.3 * 4900, rel=0.05)


def test_words_change_places_and_white_space_does_not():
    found, count = swapped(TEXT, 0.3, Random(1))
    assert count == round(0.3 * 8) and found != TEXT
    assert sorted(found.split()) == sorted(TEXT.split())
    assert pieces(found)[1::2] == pieces(TEXT)[1::2]
    assert swapped("alone", 0.5, Random(1)) == ("alone", 0)


def test_synonyms_keep_capitals_and_punctuation():
    table = {"good": ["fine"], "film": ["movie"], "it": ["that"]}
    assert replaced(TEXT, table, 1.0, Random(1)) == ("A fine movie, with  FINE people\nin that.", 4)
    found, count = replaced(TEXT, table, 0.2, Random(1))
    assert count == 2 and sum(a != b for a, b in zip(found.split(), TEXT.split(), strict=True)) == 2
    assert replaced("nothing known", table, 1.0, Random(1)) == ("nothing known", 0)


# ---- rows ----


def test_copies_stand_behind_the_training_rows_and_held_out_rows_stay(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(40))
    task = ClassificationConfig(labels=["common", "rare"])
    plain = prepared(run(path, task), wordpiece(), tmp_path / "cache")
    data = prepared(run(path, task, copies=2, swap=0.3, delete=0.2), wordpiece(), tmp_path / "cache")
    count = len(plain.train.lengths)
    assert texts_of(data)[:count] == texts_of(plain) and len(data.train.lengths) == 3 * count
    assert texts_of(data, "validation") == texts_of(plain, "validation")
    assert len(set(texts_of(data))) == 3 * count, "each is another one"
    report = data.report["train"]["augment"]
    assert report["copies"] == 2 * count and report["changed"]["swap"]["rows"] == 2 * count
    words = sum(len(text.split()) - 2 for text in texts_of(data)[count:])  # without [CLS] and [SEP]
    assert 2 * 8 * count - words == report["changed"]["delete"]["words"] > 0
    assert " -> " in report["examples"][0]["text"] and report["examples"][0]["place"].startswith(
        f"{tmp_path}/rows.jsonl:"
    )
    assert "augment" not in plain.report["train"] and "augment" not in data.report["validation"]


def test_a_copy_depends_on_its_row_its_number_and_the_seed(tmp_path):
    given = rows(30)
    task = ClassificationConfig(labels=["common", "rare"])
    settings = {"copies": 2, "swap": 0.3}
    found = []
    for name, content, seed in (("one", given, 0), ("other", given[::-1], 0), ("seed", given, 1)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        found.append(
            sorted(texts_of(prepared(run(path, task, **settings, seed=seed), wordpiece(), tmp_path / "cache")))
        )
    assert found[0] == found[1] != found[2]


def test_a_copy_that_equals_a_held_out_row_is_left_out(tmp_path):
    table = write_jsonl(tmp_path / "words.jsonl", [{"word": "aa", "synonym": "bb"}, {"word": "cc", "synonym": "dd"}])
    train = [{"text": "aa ab", "label": "x"}, {"text": "cc ab", "label": "y"}, {"text": "ee ff", "label": "x"}]
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "bb  ab", "label": "x"}, {"text": "gg ff", "label": "y"}])
    config = run(write_jsonl(tmp_path / "rows.jsonl", train), copies=1, synonyms=str(table), synonym_share=1.0)
    for part_name in ("validation", "test"):
        data = replace(config.data, **{part_name: str(held)}, split=SplitConfig(validation=0.0))
        found = prepared(replace(config, data=data), wordpiece(), tmp_path / "cache")
        report = found.report["train"]["augment"]
        # `ee ff` has no synonym: its copy is the row itself.
        assert report["left_out"] == {
            "held_out": 1,
            "repeated": 1,
        }
        assert report["copies"] == 1 and len(found.train.lengths) == 4
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"word": "aa"}])
    config = run(tmp_path / "rows.jsonl", copies=1, synonyms=str(broken))
    (problem,) = refusal_of(config, wordpiece(), tmp_path)
    assert problem.where == f"{broken}:1" and "'synonym'" in problem.reason


@pytest.mark.parametrize("swap", [0.0, 0.4])
def test_balance_gives_each_class_as_many_rows_as_the_largest(tmp_path, swap):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(60, rare=8))
    data = prepared(run(path, balance=True, swap=swap), wordpiece(), tmp_path / "cache")
    counts = Counter(data.labels[label] for label in data.train.column("label"))
    (common, same), (rare, after) = (data.report["train"]["augment"]["classes"][name] for name in ("common", "rare"))
    assert counts == {"common": common, "rare": common} and (same, after) == (common, common) and rare < common
    repeated = len(data.train.lengths) - len(set(texts_of(data)))
    assert repeated == (common - rare if not swap else 0)


def test_models_rewrite_there_and_back_and_decoders_are_prompted(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"w{n} w{n + 1} w{n + 2}", "label": f"w{n % 2}"} for n in range(12)]
    )
    there, back = (save_t5(tmp_path / name, seed=seed) for seed, name in enumerate(("there", "back")))
    decoder = save_decoder(tmp_path / "decoder")
    found = []
    for models, more in (([there, back], {}), ([there, back], {"seed": 1}), ([decoder], {"prompt": "w9 {text}"})):
        settings = {"models": list(map(str, models)), "max_new_tokens": 6, **more}
        data = prepared(run(path, copies=1, **settings), wordpiece(), tmp_path / "cache")
        report = data.report["train"]["augment"]
        made = [example["text"].partition(" -> ")[2] for example in report["examples"]]
        assert report["changed"]["models"]["rows"] > 0 and report["copies"] == len(data.train.lengths) - 8
        assert report["copies"] + sum(report.get("left_out", {}).values()) == 8 and made
        found.append(made)
    assert found[0] != found[1] and found[2] not in found[:2]
    again = prepared(
        run(path, copies=1, models=[str(there), str(back)], max_new_tokens=6), wordpiece(), tmp_path / "new"
    )
    assert [example["text"].partition(" -> ")[2] for example in again.report["train"]["augment"]["examples"]] == found[
        0
    ]
    (problem,) = refusal_of(run(path, copies=1, models=["nobody/nothing"]), wordpiece(), tmp_path)
    assert problem.where == "data.augment.models" and problem.value == "nobody/nothing"


def test_what_is_refused(tmp_path):
    def keys(task: TaskConfig | None = None, **augment: Any) -> set[str]:
        return {problem.where for problem in find_problems(run(tmp_path / "rows.jsonl", task, **augment))}

    assert not keys(copies=1, delete=0.1) and not keys(balance=True)
    assert keys(copies=1) == {"data.augment.copies"}
    assert keys(swap=0.1, delete=0.1) == {"data.augment.swap", "data.augment.delete"}
    assert keys(ChatConfig(), copies=1, swap=0.1) == {"data.augment.copies"}
    assert keys(ClassificationConfig(regression=True), balance=True) == {"data.augment.balance"}
    assert keys(copies=1, models=["m"], prompt="Paraphrase") == {"data.augment.prompt"}


def test_the_report_shows_it():
    augment = {"copies": 9, "changed": {"swap": {"rows": 9, "words": 31}, "models": {"rows": 4, "words": 0}}}
    train_part = part("train", {"rows": 20, "augment": augment | {"left_out": {"held_out": 2}}}, {})
    facts = {label: (value, remark) for label, value, remark in train_part.facts}
    assert facts["copies among them"] == ("9", "swap 31 words, models 4 rows")
    assert facts["copies left out, held out"][0] == "2"
