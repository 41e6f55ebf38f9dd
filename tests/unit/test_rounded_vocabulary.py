"""`method=qlora` on models whose projection to the vocabulary has a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.protocols import method_of

pytest.importorskip("bitsandbytes", reason="pip install '.[qlora]' in a clone of dstune")


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_projection_that_would_be_rounded_is_refused(tied: bool, tmp_path: Path) -> None:
    """biogpt calls it output_projection. With a weight of its own it is rounded like any other layer."""
    from transformers import AutoModelForCausalLM, BioGptConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    AutoModelForCausalLM.from_config(BioGptConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    run = compose([f"model.path={tmp_path}", "data.train=x", "task=causal_lm", "method=qlora"]).config
    qlora = method_of(run.method)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **qlora.load_options(run, torch.float32))
    if not tied:
        qlora.after_load(model)
        model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum()
        return
    with pytest.raises(UserError, match="rounds output_projection, the projection to the vocabulary") as refused:
        qlora.after_load(model)
    (problem,) = refused.value.problems
    assert (problem.where, problem.value, problem.fix) == ("method", "qlora", "method=lora")
