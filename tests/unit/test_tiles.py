"""Feed-forward layers in pieces: the same loss and gradients, and one piece's inner tensors at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dstune.config.compose import compose
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.models.recompute import checkpointing_options
from dstune.models.tiles import tile_feed_forward

USUAL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
DECODER = USUAL | {"num_key_value_heads": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4)),
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    return model_class(config).train()


def gradients(found: Any, positions: int) -> tuple[float, dict[str, torch.Tensor]]:
    rows = torch.randint(50, (2, positions), generator=torch.Generator().manual_seed(1))
    loss = found(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {key: p.grad for key, p in found.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("positions", [13, 2])  # 2: fewer than pieces
def test_gradients_are_those_of_the_whole(name: str, checkpointing: bool, positions: int) -> None:
    loss, expected = gradients(model(name), positions)
    tiled = model(name)
    assert tile_feed_forward(tiled, 3) == 2
    if checkpointing:
        tiled.gradient_checkpointing_enable(checkpointing_options(True))
    found, others = gradients(tiled, positions)
    assert found == pytest.approx(loss, rel=1e-6)
    for key, gradient in expected.items():
        # Sums of fp32 in another order: 4e-7 of the largest gradient was seen on an AMD EPYC.
        apart = max(1e-7, 1e-6 * float(gradient.abs().max()))
        torch.testing.assert_close(others[key], gradient, rtol=1e-5, atol=apart, msg=key)


def test_the_inner_tensors_of_one_piece_exist_at_a_time() -> None:
    widths: list[int] = []
    found = model("llama")
    tile_feed_forward(found, 4)
    found.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    _, kept = sizes(found)
    assert widths == [4, 4, 4, 4] and kept == 0
    assert sizes(model("llama"))[1] > 0


def sizes(found: Any) -> tuple[Any, int]:
    """Output and number of tensors as wide as a feed-forward layer that are kept of it."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == 96 and tensor.dim() == 3:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = found.model(input_ids=torch.randint(50, (2, 16)), use_cache=False).last_hidden_state
    return output, len(kept)


def test_without_gradients_it_stays_whole() -> None:
    widths: list[int] = []
    found = model("llama")
    tile_feed_forward(found, 4)
    found.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        found.model(input_ids=torch.randint(50, (2, 16)))
    assert widths == [16]


@pytest.mark.parametrize(
    "other",
    [
        BertForSequenceClassification(BertConfig(**USUAL)),
        MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)),
    ],
)
def test_a_model_without_such_layers_is_refused(other: Any) -> None:
    with pytest.raises(UserError) as caught:
        tile_feed_forward(other, 2)
    (problem,) = caught.value.problems
    assert problem.where == "trainer.mlp_tiles" and "has no feed-forward layer" in problem.reason


def test_what_keeps_products_is_refused_beside_it() -> None:
    words = ["experiment=quickstart", "trainer.mlp_tiles=4", "trainer.activation_checkpointing=selective"]
    (problem,) = find_problems(compose(words).config)
    assert problem.where == "trainer.activation_checkpointing"
    assert not find_problems(compose([*words[:2], "trainer.activation_checkpointing=true"]).config)
