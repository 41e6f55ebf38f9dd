"""Tokenizers and architectures of strangers: patterns that backtrack, and files that hold something else than they should."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_decoder, write_dialogues
from transformers import AutoTokenizer

from dstune import cli
from dstune.config.compose import compose
from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.core.tokenizers import _refuse_growing_file, open_tokenizer
from dstune.models.load import load_config, load_model, load_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
ENDLESS = [r"(a|a)*$", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.|.){0,21}[^\s\S]", ".?" * 24 + r"[^\s\S]"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, file: str, **values: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_of_a_tokenizer_that_backtrack(pattern: str, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(model, "tokenizer.json", pre_tokenizer=SPLIT | {"pattern": {"Regex": pattern}})
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelConfig(path=str(model)))
    (problem,) = caught.value.problems
    assert problem.where == str(model / "tokenizer.json") and problem.fix and "patterns" in problem.reason
    assert time.process_time() - began < 2 and "panicked" not in capfd.readouterr().err


def test_a_pattern_that_backtracks_over_one_row_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes the trial: made-up texts have no Z."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    change(model, "tokenizer.json", pre_tokenizer=SPLIT | {"pattern": {"Regex": r"Z(.|.)*[^\s\S]"}})
    write_dialogues(tmp_path / "rows.jsonl", 3)
    with (tmp_path / "rows.jsonl").open("a") as file:
        print(
            json.dumps({"messages": [{"role": "user", "content": "Z" * 60}, {"role": "assistant", "content": "b"}]}),
            file=file,
        )
    assert cli.main(["data", "show", f"model.path={model}", "data.train=rows.jsonl", "data.split.validation=0"]) == 2
    said = capsys.readouterr()
    assert (
        f"{model / 'tokenizer.json'}: to find its patterns in '<|im_start|>user" in said.err
        and "fix: give a model" in said.err
    )


def test_a_pattern_that_backtracks_over_an_answer_alone(model: Path) -> None:
    join = {"type": "Fuse"}
    endless = {"type": "Replace", "pattern": {"Regex": r"(w1|w1)*$"}, "content": ""}
    change(model, "tokenizer.json", decoder={"type": "Sequence", "decoders": [join, endless]})
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    token = tokenizer.convert_tokens_to_ids("w1")
    with pytest.raises(UserError, match=r"tokenizer\.json: to find its patterns in \["):
        tokenizer.decode([token] * 60 + [token + 1])


def test_patterns_that_end_pass(model: Path) -> None:
    gpt = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    change(model, "tokenizer.json", pre_tokenizer=SPLIT | {"pattern": {"Regex": gpt}})
    given = open_tokenizer(model, where="model.path")
    assert given("a b")["input_ids"] == AutoTokenizer.from_pretrained(model)("a b")["input_ids"]


def replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: steps}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CHARACTERS = base64.b64encode(bytes(4) + b"b\0" + b"a" * 65 + b"\0").decode()
SPECIAL = {"SpecialToken": {"id": "<s>", "type_id": 0}}
AROUND = {
    "type": "TemplateProcessing",
    "single": [*[SPECIAL] * 11, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0] * 100, "tokens": ["x"] * 100}},
}
GROWING = {
    "words": {"normalizer": sequence("normalizers", replace("a" * 5), replace("a" * 5), replace("a" * 5))},
    "once": {"normalizer": replace("b" * 65)},
    "prefix": {"normalizer": {"type": "Prepend", "prepend": "b" * 65}},
    "bytes": {"normalizer": sequence("normalizers", *[{"type": "ByteLevel"}] * 7)},
    "pieces": {"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 7)},
    "characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARACTERS}},
    "answers": {"decoder": sequence("decoders", replace("a" * 9), replace("a" * 9))},
    "around": {"post_processor": AROUND},
}


@pytest.mark.parametrize("case", GROWING)
def test_a_tokenizer_that_makes_gigabytes_of_a_word(case: str, model: Path) -> None:
    """Of more steps the library ends the process: `memory allocation of 2048000000 bytes failed`."""
    change(model, "tokenizer.json", **GROWING[case])
    with pytest.raises(UserError, match=r"characters of one|tokens around each text") as caught:
        load_tokenizer(ModelConfig(path=str(model)))
    assert caught.value.problems[0].where == str(model / "tokenizer.json")


def test_a_tokenizer_that_grows_is_known_once_it_is_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its file was not there to be looked at: of the hub."""
    monkeypatch.setattr("dstune.core.tokenizers._refuse_growing_file", lambda file: None)
    change(model, "tokenizer.json", **GROWING["words"])
    with pytest.raises(UserError, match="may make 125 characters of one, more than 64"):
        load_tokenizer(ModelConfig(path=str(model)))


@pytest.mark.parametrize(
    "content",
    ["{" + ",".join(['"normalizer": {"a": {'] * 100_000), json.dumps({"normalizer": [replace("x" * 60)] * 300_000})],
    ids=["sections that are not closed", "steps"],
)
def test_a_tokenizer_s_growth_is_found_in_little_time(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    began = time.process_time()
    with contextlib.suppress(UserError):
        _refuse_growing_file(tmp_path / "tokenizer.json")
    assert time.process_time() - began < 5


def test_usual_tokenizers_grow_little(model: Path) -> None:
    usual = sequence("normalizers", {"type": "Prepend", "prepend": "_"}, replace("_"), {"type": "NFKC"})
    change(model, "tokenizer.json", normalizer=usual, pre_tokenizer=BYTES, post_processor=None)
    assert open_tokenizer(model, where="model.path")("b")["input_ids"]


ODD: dict[str, Callable[[Path], object]] = {
    "a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "no pattern": lambda folder: change(folder, "tokenizer.json", pre_tokenizer=SPLIT | {"pattern": {"Regex": "(["}}),
    "no model": lambda folder: change(folder, "tokenizer.json", model=None),
    "negative": lambda folder: change(folder, "tokenizer.json", added_tokens=[{"id": -1}]),
    "class": lambda folder: change(folder, "tokenizer_config.json", tokenizer_class=5),
    "decoder": lambda folder: change(folder, "tokenizer_config.json", added_tokens_decoder=[1]),
    "length": lambda folder: change(folder, "tokenizer_config.json", model_max_length="x"),
    "end": lambda folder: change(folder, "tokenizer_config.json", eos_token={"a": 1}),
    "names": lambda folder: change(folder, "tokenizer_config.json", model_input_names=5),
    "code": lambda folder: change(folder, "tokenizer_config.json", auto_map=5),
    "no settings": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "special": lambda folder: (folder / "special_tokens_map.json").write_text("[]"),
    "added": lambda folder: (folder / "added_tokens.json").write_text('{"x": "y"}'),
}


@pytest.mark.parametrize("case", ODD)
def test_files_of_a_tokenizer_that_are_none(case: str, model: Path) -> None:
    ODD[case](model)
    with pytest.raises(UserError, match=r"^model\.path=.*: its tokenizer cannot be loaded: \S"):
        load_tokenizer(ModelConfig(path=str(model)))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 500), "its model cannot be loaded"),
    "text": (lambda folder: (folder / "model.safetensors").write_text("x"), "its model cannot be loaded"),
    "activation": (lambda folder: change(folder, "config.json", hidden_act="nope"), "its model cannot be loaded"),
    "settings": (lambda folder: (folder / "generation_config.json").write_text("[]"), "its model cannot be loaded"),
    "end": (lambda folder: change(folder, "generation_config.json", eos_token_id="y"), "which is no token"),
    "layers": (lambda folder: change(folder, "config.json", num_hidden_layers=-1), "num_hidden_layers = -1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_a_message_of_generate(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = DAMAGED[case]
    damage(model)
    assert cli.main(["generate", str(model), "--prompt", "w1", "--max-new-tokens", "1"]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("case", ["cut", "text", "activation", "settings", "layers"])
def test_a_damaged_model_is_a_message_of_a_rank(case: str, model: Path) -> None:
    damage, _ = DAMAGED[case]
    damage(model)
    config = compose([f"model.path={model}", "task=causal_lm", "data.train=rows.jsonl"]).config
    with pytest.raises(UserError, match=r"^model\.path="):
        load_model(config, load_tokenizer(config.model), (), torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("num_attention_heads", 0),
        ("rope_parameters", 5),
        ("auto_map", 5),
        ("id2label", 5),
        ("layer_types", ["x"]),
        ("quantization_config", 5),
    ],
)
def test_an_architecture_that_is_none(key: str, value: Any, model: Path) -> None:
    change(model, "config.json", **{key: value})
    with pytest.raises(
        UserError,
        match=r"^model\.path=.*: its config\.json (cannot be loaded: \S|has hidden_size = x, which is no whole number)",
    ):
        load_config(ModelConfig(path=str(model)))
