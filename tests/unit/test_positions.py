"""How long a row may be: real models of every kind that has learned positions take so many tokens, and not one more."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from dstune.config.architectures import POSITIONS, row_limit
from dstune.config.compose import compose
from dstune.launch.positions import truncate_as_before, within_positions
from tests.support.tiny import save_decoder, save_encoder

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "embedding_size": 16,
    "d_model": 16,
    "dim": 16,
    "hidden_dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "attention_types": [[["global"], 1]],
    "pad_token_id": 1,
    "true_hidden_size": 16,
    "intra_bottleneck_size": 16,
}
TABLE = 40


@pytest.mark.parametrize("kind", POSITIONS)
def test_so_many_tokens_and_not_one_more(kind):
    key, _, _ = POSITIONS[kind]
    usual = AutoConfig.for_model(kind).to_dict()
    known = {name: value for name, value in SMALL.items() if name in usual or name in ("intermediate_size",)}
    config = AutoConfig.for_model(kind, **known, **{key: TABLE})
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    limit = row_limit(config.to_dict())
    assert limit is not None and TABLE - 2 <= limit <= TABLE
    ids = torch.full((1, limit), 7)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        longer = torch.full((1, limit + 3), 7)  # tables with unused rows at their end would take one or two more
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer, attention_mask=torch.ones_like(longer))


@pytest.mark.parametrize("kind", POSITIONS)
def test_without_a_value_it_is_that_of_transformers(kind):
    key, usual, before = POSITIONS[kind]
    assert getattr(AutoConfig.for_model(kind), key) == usual
    assert row_limit({"model_type": kind}) == usual - before


def test_computed_positions_have_no_end():
    for values in ({"model_type": "llama", "max_position_embeddings": 64}, {"model_type": "t5"}, {}):
        assert row_limit(values) is None
    assert row_limit({"model_type": "deberta-v2", "position_biased_input": False}) is None


def test_rows_of_a_run_are_cut_to_them_and_that_is_reported(tmp_path):
    messages: list[str] = []
    encoder, decoder = save_encoder(tmp_path / "encoder"), save_decoder(tmp_path / "decoder")
    config = compose([f"model.path={encoder}", "task=classification", "data.train=x"]).config
    assert within_positions(config, messages.append).data.max_length == 128
    assert messages == ["rows are cut to 128 tokens, not data.max_length=1024: the model has no more positions"]
    config = compose([f"model.path={encoder}", "task=classification", "data.train=x", "data.max_length=64"]).config
    assert within_positions(config, messages.append) is config
    config = compose([f"model.path={encoder}", "task=classification", "data.train=x", "method=prompt"]).config
    assert within_positions(config, messages.append).data.max_length == 128 - config.method.virtual_tokens
    config = compose([f"model.path={decoder}", "task=causal_lm", "data.train=x", "data.max_length=4096"]).config
    assert within_positions(config, messages.append) is config


def test_the_same_command_continues_a_run_whose_rows_were_cut(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    uncut = compose([f"model.path={encoder}", "task=classification", "data.train=x"]).config
    begun = within_positions(uncut, lambda text: None)
    assert truncate_as_before(begun, uncut) == begun
    shorter = compose([f"model.path={encoder}", "task=classification", "data.train=x", "data.max_length=64"]).config
    assert truncate_as_before(shorter, uncut) is uncut, (
        "that run chose its length, and another one would change its course"
    )
