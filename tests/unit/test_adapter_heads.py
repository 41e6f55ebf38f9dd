"""Adapters beside a task's own head, which is trained whole and adapted by none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import save_decoder, save_encoder

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import method_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", ["lora", "qlora", "vera", "oft", "ia3"])
@pytest.mark.parametrize(
    ("task", "labels", "head"),
    [("token_classification", ("A", "B", "C"), "classifier"), ("question_answering", (), "qa_outputs")],
)
def test_the_head_is_trained_whole(encoder: Path, task: str, labels: tuple[str, ...], head: str, method: str) -> None:
    words = [f"model.path={encoder}", f"task={task}", f"method={method}", "data.train=rows.jsonl", "data.max_length=32"]
    config = compose(words + ["method.block_size=8"] * (method == "oft")).config
    model = load_model(config, load_tokenizer(config.model), labels, torch.float32)
    adapted = method_of(config.method).apply(model, config)
    of_head = {name for name, _ in adapted.named_parameters() if head in name}
    trained = {name for name, value in adapted.named_parameters() if head in name and value.requires_grad}
    prefix = f"base_model.model.{head}"
    assert trained == {f"{prefix}.modules_to_save.default.weight", f"{prefix}.modules_to_save.default.bias"}
    assert of_head == trained | {f"{prefix}.original_module.weight", f"{prefix}.original_module.bias"}


@pytest.mark.parametrize(
    ("key", "value", "tied"),
    [
        ("target_modules", "[q_proj,lm_head]", False),
        ("target_modules", "[q_proj,embed_tokens]", True),
        ("modules_to_save", "[lm_head]", True),
        ("modules_to_save", "[embed_tokens]", False),
    ],
)
def test_the_vocabulary_has_no_second_adapter_beside_new_tokens(
    tmp_path: Path, tied: bool, key: str, value: str
) -> None:
    decoder = save_decoder(tmp_path / "model", tied=tied)
    config = compose(
        [
            f"model.path={decoder}",
            "method=lora",
            "data.train=rows.jsonl",
            "model.add_tokens=[one,two]",
            f"method.{key}={value}",
        ]
    ).config
    model = load_model(config, load_tokenizer(config.model), (), torch.float32)
    with pytest.raises(UserError) as refused:
        method_of(config.method).apply(model, config)
    [problem] = refused.value.problems
    assert problem.where == f"method.{key}" and "rows of its new tokens" in problem.reason
