"""`data.split.validation=auto`: the larger of 5% and 20 rows, never above 20%, chosen once and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl

from dstune.config.convert import from_dict, to_dict
from dstune.config.data_schema import SplitConfig
from dstune.config.fields import Automatic
from dstune.config.schema import RunConfig
from dstune.data.prepared import PreparedData
from dstune.data.split import automatic_share
from dstune.launch.held_out import with_share
from dstune.tasks.classification.config import ClassificationConfig


def chats(count: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}"}]}
        for n in range(count)
    ]


def validation_rows(data: PreparedData, tokenizer) -> set[str]:
    assert data.validation is not None
    return {
        tokenizer.decode(data.validation.sample(number)["input_ids"]) for number in range(len(data.validation.lengths))
    }


def configuration(path: Path, rows: list[dict], **more) -> RunConfig:
    write_jsonl(path, rows)
    return data_run(path, split=SplitConfig(), packing=False, **more)


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (4, 1), (5, 1), (60, 12), (99, 19), (100, 20), (399, 20), (400, 20), (1000, 50)]
)
@pytest.mark.parametrize("labelled", [False, True])
def test_how_many_rows_are_held_out(count: int, held_out: int, labelled: bool):
    hashes = np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64)
    share, found = automatic_share(np.concatenate([hashes, hashes[: count // 2]]), labelled=labelled)
    assert found == held_out
    if labelled and count < 400:
        assert round(share * count) == held_out
    elif count < 400:
        assert int((hashes / 2.0**64 < share).sum()) == held_out
    else:
        assert share == 0.05


@pytest.mark.parametrize(("count", "held_out"), [(60, 12), (150, 20)])
def test_the_run_holds_out_that_many_rows(tmp_path, count: int, held_out: int):
    config, reason = with_share(configuration(tmp_path / "rows.jsonl", chats(count)))
    assert reason == f"{held_out} of {count} rows are held out"
    assert isinstance(config.data.split.validation, float)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert len(data.validation.lengths) == held_out
    assert len(data.train.lengths) == count - held_out
    open_share = data_run(tmp_path / "rows.jsonl", split=SplitConfig(), packing=False)
    assert len(prepared(open_share, byte_tokenizer(), tmp_path / "other").validation.lengths) == held_out


def test_a_descendant_with_more_rows_holds_out_what_its_run_did(tmp_path):
    tokenizer = byte_tokenizer()
    config, _ = with_share(configuration(tmp_path / "rows.jsonl", chats(60)))
    held_out = validation_rows(prepared(config, tokenizer, tmp_path / "cache"), tokenizer)
    stored = from_dict(json.loads(json.dumps(to_dict(config))), "run.yaml")
    assert stored.data.split == config.data.split
    grown = write_jsonl(tmp_path / "grown.jsonl", chats(90))
    descendant, reason = with_share(replace(stored, data=replace(stored.data, train=str(grown))))
    assert (descendant.data.split, reason) == (config.data.split, "")
    assert held_out < validation_rows(prepared(descendant, tokenizer, tmp_path / "cache"), tokenizer)


def test_labels_have_their_shares(tmp_path):
    rows = [{"text": f"row {n}", "label": "yn"[n % 3 == 0]} for n in range(60)]
    config, reason = with_share(configuration(tmp_path / "rows.jsonl", rows, task=ClassificationConfig()))
    assert (config.data.split.validation, reason) == (0.2, "12 of 60 rows are held out")
    report = prepared(config, byte_tokenizer(), tmp_path / "cache").report
    assert report["validation"]["labels"] == {"y": 8, "n": 4}


def test_many_rows_and_given_shares(tmp_path):
    config = configuration(tmp_path / "rows.jsonl", chats(500))
    assert with_share(config)[0].data.split.validation == 0.05
    for split in (SplitConfig(validation=0.05), SplitConfig(validation=0.0)):
        given = replace(config, data=replace(config.data, split=split))
        assert with_share(given) == (given, "")
    named = replace(config, data=replace(config.data, validation="held-out.jsonl"))
    assert with_share(named)[0].data.split.validation is Automatic.auto
