"""Samples that attend one by one: what they see, gradients, and which runs compute them so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny import SPECIAL, WORDS, save_decoder, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dstune.config.compose import compose
from dstune.config.schema import Attention
from dstune.core.errors import UserError
from dstune.models import attention, cpu_attention
from dstune.models.attention import SamplesApart, attend
from dstune.models.load import load_model, load_tokenizer
from dstune.models.spans import SPANS as SPANS_KEYWORD
from dstune.models.spans import refuse_unknown, spans_of
from dstune.planning import activations
from dstune.protocols import task_of
from dstune.tasks.chat.config import ChatConfig
from dstune.trainer.sanity_checks import verify_rows

SPANS = (((0, 3), (3, 11), (11, 24)), ((0, 20),))
"""Of rows of 24 positions; the second one has padding."""


def states(dtype: torch.dtype, heads: int = 6, key_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # As models make them: heads stand behind positions in memory.
    made = [torch.randn(2, 24, number, 8, dtype=torch.float64).to(dtype) for number in (heads, key_heads, key_heads)]
    return [part.transpose(1, 2).requires_grad_() for part in made]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """With a mask of all positions with all others."""
    place = torch.arange(24)
    behind = place[:, None] - place[None, :]
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    found = []
    for row, of_row in enumerate(SPANS):
        sample = torch.full((24,), -1)
        for number, (start, end) in enumerate(of_row):
            sample[start:end] = number
        seen = (behind >= 0) & (behind < (window or 24)) & (sample[:, None] == sample[None, :])
        scores = (0.7 * query[row] @ key[row].transpose(1, 2)).masked_fill(~seen, float("-inf"))
        found.append((scores.softmax(-1) @ value[row]) * (sample >= 0)[:, None])
    return torch.stack(found)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 30])
@pytest.mark.parametrize("way", ["kernel", "blocks", "loop"])
def test_samples_see_what_a_mask_lets_them_see(window, way, monkeypatch):
    """Of samples that are shorter than the window, a multiple of it long, or neither; with keys that several heads read."""
    if way == "blocks":  # of 16 queries of the longer sample, and of the other 4
        monkeypatch.setattr(cpu_attention, "SCORES", 16 * 20 * 6)
    if way == "loop":
        monkeypatch.setattr(attention, "computes", lambda *unused: False)
    given = states(torch.float64)
    found = attend(*given, SPANS, dropout=0.0, scale=0.7, window=window)
    expected = reference(*given, window)
    assert torch.allclose(found, expected)
    outward = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, given, outward), torch.autograd.grad(expected, given, outward)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs)


def test_gradients_in_bf16_are_as_near_to_exact_ones_as_those_of_torch():
    exact, given = states(torch.float64), states(torch.bfloat16)
    outward = torch.randn(2, 6, 24, 8, dtype=torch.float64)
    expected = torch.autograd.grad(reference(*exact, None), exact, outward)
    ours = torch.autograd.grad(
        attend(*given, SPANS, dropout=0.0, scale=0.7, window=None), given, outward.to(torch.bfloat16)
    )
    theirs = torch.autograd.grad(reference(*given, None), given, outward.to(torch.bfloat16))
    for own, of_torch, right in zip(ours, theirs, expected, strict=True):
        assert (own.double() - right).norm() < 1.1 * (of_torch.double() - right).norm()


def test_samples_begin_where_positions_do_and_end_where_padding_begins():
    ids = torch.zeros(2, 6, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert spans_of({"input_ids": ids, "position_ids": positions}) == (((0, 3), (3, 5), (5, 6)), ((0, 6),))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    assert spans_of({"input_ids": ids, "attention_mask": mask}) == (((0, 4),), ((0, 6),))


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()


def batches() -> dict[str, dict[str, torch.Tensor]]:
    """A packed one and a padded one of the same rows."""
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (2, 24))
    labels = torch.where(torch.rand(2, 24) < 0.3, -100, ids)
    packed = torch.stack([torch.arange(24) % 9, torch.arange(24) % 17])
    mask = (torch.arange(24) < torch.tensor([[24], [11]])).long()
    return {
        "packed": {"input_ids": ids, "labels": labels.masked_fill(packed == 0, -100), "position_ids": packed},
        "padded": {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask},
    }


def as_with_masks(folder, loss_of) -> None:
    """loss_of: of a model, and whether its samples are told apart without masks."""
    save_decoder(folder)
    found = []
    for apart in (False, True):
        model = load(folder)
        loss = loss_of(model, apart)
        loss.backward()
        found.append((loss.detach(), {key: value.grad for key, value in model.named_parameters()}))
    (expected, masked_gradients), (loss, gradients) = found
    torch.testing.assert_close(loss, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, masked_gradients[key], atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_what_it_learns_with_masks(tmp_path, name, checkpointing):
    def loss_of(model, apart):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = task_of(ChatConfig()).head(model, SamplesApart(model) if apart else None)
        return head(model, batches()[name]).loss_sum

    as_with_masks(tmp_path, loss_of)


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ([], True),
        (["data.packing=false"], True),
        (["method=lora"], True),
        (["model.attention=sdpa"], False),
        (["model.attention=eager"], False),
        (["method=prefix"], False),
        (["model.config_overrides={attention_dropout: 0.1}"], False),
    ],
)
def test_runs_whose_samples_attend_one_by_one(tmp_path, overrides, chosen):
    config = compose(["model=smollm2", "data=chitchat", *overrides]).config
    model = load(save_decoder(tmp_path))
    model.config.update(config.model.config_overrides)
    if torch.cuda.is_available():
        chosen = False
    found = SamplesApart.of(config, model)
    assert (found is not None) == chosen
    assert model.config._attn_implementation == (SamplesApart.NAME if chosen else "sdpa")


def test_models_with_an_attention_of_their_own_keep_it(tmp_path):
    config = compose(["model=smollm2", "data=chitchat"]).config
    model = load(save_decoder(tmp_path))
    model.config.attn_logit_softcapping = 50.0
    assert SamplesApart.of(config, model) is None


def verified(model, rows, max_length=64):
    """Verify the rows as before a run; return the messages of that, and the head."""
    head = task_of(ChatConfig()).head(model, rows)
    engine = SimpleNamespace(device=torch.device("cpu"), train=model.train, forward=model)
    world = SimpleNamespace(gather=lambda value: [value], any=bool)
    config = compose(["model=smollm2", "data=chitchat", f"data.max_length={max_length}"]).config
    messages: list[str] = []
    verify_rows(config, engine, head, rows, model.config, world, messages.append)
    return messages, head


def crossing(inputs):
    return (((0, inputs["input_ids"].shape[1]),),) * 2


def late(inputs):
    """Each sample behind the first one begins a position too late, and the one before ends there."""
    return tuple(
        tuple((start + (start > 0), end + (end < row[-1][1])) for start, end in row) for row in spans_of(inputs)
    )


def windowed():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=96, num_hidden_layers=2, sliding_window=5, **sizes)
    torch.manual_seed(0)
    return MistralForCausalLM._from_config(config, attn_implementation="sdpa")


def steeper(*states, scale, **more):
    return attend(*states, scale=1.5 * scale, **more)


def narrower(*states, window, **more):
    return attend(*states, window=window and window - 1, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (None, None),
        (None, attend),
        ("spans_of", crossing),
        ("spans_of", late),
        ("attend", steeper),
        ("attend", narrower),
    ],
)
def test_another_attention_than_the_models_own_is_given_up_before_the_run(tmp_path, dtype, name, fault, monkeypatch):
    model = (windowed() if fault in (attend, narrower) else load(save_decoder(tmp_path))).to(dtype)
    with torch.no_grad():  # as sharp as a trained model's: a random one looks at everything alike
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    rows = SamplesApart(model)
    if name is not None:
        monkeypatch.setattr(attention, name, fault)
    messages, head = verified(model, rows)
    if name is None:
        assert messages == [] and head.rows is rows
        return
    assert head.rows is None and model.config._attn_implementation == "sdpa"
    assert len(messages) == 1 and messages[0].startswith("model.attention=auto: sdpa, since samples")


def test_a_model_that_does_not_declare_its_attention_ends_the_run(tmp_path):
    model = load(save_decoder(tmp_path))
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *given, inner=inner, **more: inner(
            *given, **{key: value for key, value in more.items() if key != SPANS_KEYWORD}
        )
    with pytest.raises(UserError, match=r"(?s)do not tell LlamaAttention where samples begin.*model.attention=sdpa"):
        verified(model, SamplesApart(model))


def test_what_changes_scores_is_not_left_out(tmp_path):
    module = torch.nn.Module()
    refuse_unknown(module, {"sliding_window": 4, "s_aux": None})
    for keywords in ({"s_aux": torch.ones(1)}, {"softcap": 50.0}, {"is_causal": False}):
        with pytest.raises(UserError, match=r"model.attention"):
            refuse_unknown(module, keywords)


def test_the_plan_knows_the_blocks():
    assert (activations.SCORES, activations.QUERIES) == (cpu_attention.SCORES, cpu_attention.QUERIES)


def test_positions_that_models_would_make_of_a_mask_are_reported(tmp_path):
    """OPT counts them by the mask of padded rows, which this attention does not have."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "vocab_size": 96}
    config = OPTConfig(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, **sizes)
    losses = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = OPTForCausalLM._from_config(config, attn_implementation="sdpa").eval()
        head = task_of(ChatConfig()).head(model, SamplesApart(model) if apart else None)
        losses.append(head(model, batches()["padded"]).loss_sum.detach())
    torch.testing.assert_close(losses[1], losses[0])


SIZES = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8},
}


@pytest.mark.parametrize("kind", SIZES)
def test_auto_loads_architectures_without_sdpa(kind, tmp_path):
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 2}
    architecture = AutoConfig.for_model(kind, **size, **SIZES[kind])
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = compose([f"model.path={tmp_path}", "data=chitchat", "data.packing=false"]).config
    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer, (), torch.float32)
    assert model.config._attn_implementation == "eager"
    assert model(input_ids=torch.tensor([[1, 9, 10]])).logits.shape[-1] == size["vocab_size"]
    with pytest.raises(UserError, match="scaled_dot_product_attention"):
        load_model(replace(config, model=replace(config.model, attention=Attention.sdpa)), tokenizer, (), torch.float32)


def test_auto_takes_sdpa_where_there_is_one(tmp_path):
    config = compose([f"model.path={save_decoder(tmp_path)}", "data=chitchat"]).config
    assert load_model(config, load_tokenizer(config.model), (), torch.float32).config._attn_implementation == "sdpa"
