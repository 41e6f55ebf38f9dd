"""Embeddings of a loaded model that cannot be trained right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import save_decoder, save_tokenizer
from transformers import AutoModelForCausalLM, IBertConfig, IBertForSequenceClassification

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.models.load import _refuse_erased_padding, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("tied", "method", "refused"), [(True, "full", True), (True, "lora", False), (False, "full", False)]
)
def test_an_erased_row_is_refused_where_it_is_trained(tmp_path: Path, tied: bool, method: str, refused: bool) -> None:
    """As transformers 5.24 loads Youtu: the row of the padding token is zero, and its file holds another one."""
    save_decoder(tmp_path, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = model.get_input_embeddings().weight[2]
    config = compose([f"model.path={tmp_path}", "data=chitchat", f"method={method}"]).config
    with torch.no_grad():
        row.fill_(1)
        model.save_pretrained(tmp_path)
        _refuse_erased_padding(config, model)
        row.zero_()
    if not refused:
        _refuse_erased_padding(config, model)
        return
    with pytest.raises(UserError, match="sets the embedding of its padding token to zero"):
        _refuse_erased_padding(config, model)


def test_a_table_that_cannot_grow_is_refused_where_it_would_have_to(tmp_path: Path) -> None:
    config = IBertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=2,
    )
    IBertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    base = [f"model.path={tmp_path}", "data=files", "data.train=rows.jsonl", "task=classification"]
    run = compose(base).config
    tokenizer = load_tokenizer(run.model)
    assert len(load_model(run, tokenizer, ("left", "right"), torch.float32).get_input_embeddings().weight) == 128
    tokenizer.add_tokens([f"new{number}" for number in range(64)])
    with pytest.raises(UserError, match="QuantEmbedding of IBertForSequenceClassification has 128 and cannot grow"):
        load_model(run, tokenizer, ("left", "right"), torch.float32)
