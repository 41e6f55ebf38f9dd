"""Which files of weights are used where they are, and what is said of those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import save_decoder, save_tokenizer
from transformers import AutoConfig

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.models.load import load_model, load_tokenizer
from dstune.models.mapped import Mapped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def found(folder: Path, **changes: object) -> Mapped | None:
    config = compose(["task=causal_lm", "data=files", "data.train=x.jsonl", f"model.path={folder}"]).config
    architecture = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(architecture, key, value)
    return Mapped.of(config.model, architecture)


def test_one_type_is_used_as_it_is(folder: Path) -> None:
    mapped = found(folder)
    assert mapped is not None and mapped.dtype is torch.float32


def test_other_weights_of_the_same_shapes_are_distinguished(folder: Path) -> None:
    before = found(folder)
    file = folder / "model.safetensors"
    weights = {name: weight * 2 for name, weight in load_file(file).items()}
    size = file.stat().st_size
    save_file(weights, file, metadata={"format": "pt"})
    after = found(folder)
    assert file.stat().st_size == size
    assert before is not None and after is not None and before.contents != after.contents


def test_several_types_and_quantized_weights_are_not(folder: Path) -> None:
    assert found(folder, quantization_config={"quant_method": "gptq"}) is None
    file = folder / "model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    save_file(weights | {first: weights[first].bfloat16()}, file, metadata={"format": "pt"})
    assert found(folder) is None


def test_a_newer_file_beside_an_index_is_what_transformers_takes(folder: Path) -> None:
    save_file({"old": torch.zeros(2, dtype=torch.bfloat16)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"old": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mapped = found(folder)
    assert mapped is not None and mapped.dtype is torch.float32


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", b"\xff" * 64, b""],
    ids=["pointer of Git LFS", "noise", "empty"],
)
def test_files_without_weights_are_a_fault_of_the_model(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert found(folder) is None
    config = compose(["task=causal_lm", "data=files", "data.train=x.jsonl", f"model.path={folder}"]).config
    tokenizer = load_tokenizer(config.model)
    with pytest.raises(UserError) as caught:
        load_model(config, tokenizer, (), torch.float32)
    assert [problem.where for problem in caught.value.problems] == ["model.path"]
