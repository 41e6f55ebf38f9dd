"""The proof before the first step: two samples with different images in one row, and neither sees the other's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from dstune.config.compose import compose
from dstune.config.schema import RunConfig
from dstune.core.errors import UserError
from dstune.core.rank_env import RankEnv
from dstune.data.batches import batch_of
from dstune.data.build import prepare
from dstune.data.images import batch, processor, store
from dstune.data.images.batch import with_images_everywhere
from dstune.data.prepared import PreparedData
from dstune.data.sampler import MicroBatch
from dstune.inference.prompts import Request
from dstune.inference.voices import BASE, Speaker, Voice
from dstune.inference.writer import Sampling, Writer
from dstune.models.load import load_tokenizer
from dstune.trainer.sight import prove_images
from tests.support.sight import draw, save, write_rows

ALONE = RankEnv(0, 1, 0, 1, "test")


class PlainEngine:
    """What the proof needs of an engine."""

    def __init__(self, folder: Path):
        self.module = self.forward = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
        self.device = torch.device("cpu")

    def train(self, training: bool) -> None:
        self.module.train(training)


class OneRank:
    """A world without others to ask."""

    def any(self, mine: Any) -> bool:
        return bool(mine)


def prepared(kind: str, folder: Path, *more: str) -> tuple[RunConfig, PreparedData, Any]:
    save(kind, folder / "model")
    rows = write_rows(folder / "data", 4, images=lambda row: row % 2)
    given = ["task=chat", f"model.path={folder / 'model'}", f"data.train={rows}", "data.split.validation=0"]
    config = compose([*given, "data.workers=1", "data.packing=true", *more]).config
    data = prepare(config, load_tokenizer(config.model), ALONE, folder / "cache")
    return config, data, PlainEngine(folder / "model")


def test_packed_samples_with_other_positions_would_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, engine = prepared("qwen2_vl", tmp_path)
    messages: list[str] = []
    world: Any = OneRank()
    prove_images(config, engine, data, world, messages.append)
    assert messages == []
    without = replace(processor.FAMILIES["qwen2_vl"], three_positions=False)
    monkeypatch.setattr(processor.processor_of(data.train.vision), "family", without)
    with pytest.raises(UserError, match="sees the image of another one"):
        prove_images(config, engine, data, world, messages.append)


def test_a_micro_batch_without_an_image_gets_one_that_counts_for_nothing(tmp_path: Path) -> None:
    config, data, engine = prepared("qwen2_vl", tmp_path)
    blind = [number for number, count in enumerate(data.train.image_counts) if not count]
    seeing = [number for number, count in enumerate(data.train.image_counts) if count]
    parts = [MicroBatch(0, ((blind[0],),)), MicroBatch(1, ((seeing[0],),))]
    assert with_images_everywhere(parts, data.train, needed=False) == parts
    assert with_images_everywhere(parts[:1], data.train, needed=True) == parts[:1]
    (alone,) = with_images_everywhere(parts[:1], data.train, needed=True, trained=True)
    assert alone.needs_image
    first, second = with_images_everywhere(parts, data.train, needed=True)
    assert first.needs_image and second.needs_image
    plain, filled = batch_of(config, data.train, parts[0], 2), batch_of(config, data.train, first, 2)
    assert len(filled["input_ids"]) == 2 and "pixel_values" in filled and "pixel_values" not in plain
    assert int((filled["labels"][1] != -100).sum()) == 0
    width = plain["input_ids"].shape[1]
    with torch.no_grad():
        logits = [
            engine.forward(**{name: value for name, value in inputs.items() if name != "labels"}).logits
            for inputs in (plain, filled)
        ]
    assert torch.allclose(logits[0][0], logits[1][0, :width], atol=1e-5)
    assert len(batch_of(config, data.train, second, 2)["input_ids"]) == 1
    assert batch.BLANK_NUMBER < 0


def test_what_stands_for_an_image_is_never_trained(tmp_path: Path) -> None:
    _, data, _ = prepared("qwen2_vl", tmp_path, "task.train_on_prompt=true")
    tokens = processor.processor_of(data.train.vision).image_tokens
    rows = [data.train.table[number] for number, count in enumerate(data.train.image_counts) if count]
    assert rows
    for row in rows:
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        of_images = np.isin(ids, tokens)
        assert of_images.any() and (labels[of_images] == -100).all()
        assert (labels[~of_images][1:] != -100).all()


def test_equal_rows_of_two_folders_show_each_its_own_images(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path / "model")
    tokenizer, shown, keys = None, [], []
    for name, seed in (("v1", 0), ("v2", 1)):
        folder = tmp_path / name
        folder.mkdir()
        draw(seed).save(folder / "a.png")
        draw(0).save(folder / "same.png")
        row = {"prompt": "w1", "completion": "w2"}
        (folder / "train.jsonl").write_text(
            "".join(json.dumps({**row, "image": image}) + "\n" for image in ("a.png", "same.png"))
        )
        given = ["task=chat", f"model.path={tmp_path / 'model'}", f"data.train={folder / 'train.jsonl'}"]
        config = compose([*given, "data.split.validation=0", "data.workers=1"]).config
        tokenizer = tokenizer or load_tokenizer(config.model)
        data = prepare(config, tokenizer, ALONE, tmp_path / "cache")
        assert data.train.images is not None
        shown.append({Path(data.train.images.line(number)["path"]) for number in range(len(data.train.images))})
        keys.append(data.fingerprint)
        assert prepare(config, tokenizer, ALONE, tmp_path / "cache").fingerprint == keys[-1]
    assert shown == [{tmp_path / name / image for image in ("a.png", "same.png")} for name in ("v1", "v2")]
    # An image that was equal to another one changes, is prepared anew, and changes back.
    for picture in (draw(2), draw(0), draw(2)):
        picture.save(tmp_path / "v2" / "same.png")
        data = prepare(config, tokenizer, ALONE, tmp_path / "cache")
        assert data.train.images is not None and data.train.images.are_as_prepared()
        keys.append(data.fingerprint)
    assert len(set(keys)) == len(keys)


def test_a_stream_refuses_images_in_whatever_block(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path / "model")
    rows = write_rows(tmp_path / "data", 4, images=lambda row: int(row == 3))
    given = ["task=chat", f"model.path={tmp_path / 'model'}", f"data.train={rows}", "data.split.validation=0"]
    config = compose([*given, "data.streaming=true", "trainer.max_steps=1"]).config
    with pytest.raises(UserError, match="holds an image; blocks of a stream take none"):
        prepare(config, load_tokenizer(config.model), ALONE, tmp_path / "cache")


def test_images_of_a_request_are_bounded_before_any_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("qwen2_vl", tmp_path / "model")
    config = compose(["task=chat", f"model.path={tmp_path / 'model'}", "data.train=unread"]).config
    writer = Writer(Speaker(None, {BASE: Voice(load_tokenizer(config.model), chat=True)}), Sampling())
    draw(0).save(tmp_path / "a.png")
    messages: Any = [{"role": "user", "content": [{"type": "image"}] * 2}]
    request = Request("", "--prompt 1", messages, images=("a.png", "a.png"), root=tmp_path)
    assert writer.prompt_ids(request)
    monkeypatch.setattr(store, "MAX_PIXELS_OF_ROW", 2000)
    monkeypatch.setattr(store, "decode", lambda content: pytest.fail("an image is decoded"))
    with pytest.raises(UserError, match="the images have 2,048 pixels together"):
        writer.prompt_ids(request)
