"""A row in which a prompt stands once for all its completions = the completions one by one: logits, losses and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny import save_decoder
from transformers import AutoModelForCausalLM

from dstune.data.collate import NO_TARGET
from dstune.models import shared_prompts
from dstune.models.shared_prompts import SharedPrompts, share_prompts
from dstune.tasks.reinforcement.batches import TrainedCompletion, completion_batch, shared_batch
from dstune.tasks.reinforcement.config import KlConfig, PolicyLoss, ReinforcementConfig
from dstune.tasks.reinforcement.head import PolicyHead

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("policy") / "model")


def load(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()


def completions(seed: int = 0) -> list[TrainedCompletion]:
    """Of three prompts 3, 1 and 2 completions; one of a single token, one that read tokens of a tool, one that does not train."""
    generator = np.random.default_rng(seed)
    result = []
    for length, answers in ((5, (4, 1, 9)), (2, (6,)), (7, (3, 3))):
        prompt = generator.integers(5, 100, length)
        for count in answers:
            ids = generator.integers(5, 100, count)
            labels = ids.copy()
            if count == 9:
                labels[2:5] = NO_TARGET
            if count == 6:
                labels[:] = NO_TARGET
            sampled = -generator.random(count).astype(np.float32)
            result.append(TrainedCompletion(prompt, ids, labels, sampled, float(generator.normal())))
    return result


def loss_and_gradients(model, batch, examined: bool, **settings):
    head = PolicyHead(ReinforcementConfig(temperature=1.3, **settings), model)
    try:
        head._examined = examined
        output = head(model, batch)
        gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))
        return output, gradients
    finally:
        del model.get_output_embeddings().forward


@pytest.mark.parametrize("examined", [True, False], ids=["without logits", "with logits"])
@pytest.mark.parametrize("loss", [PolicyLoss.dapo, PolicyLoss.gspo])
def test_losses_and_gradients_are_those_of_completions_in_rows_of_their_own(folder, loss, examined):
    apart, shared = load(folder), load(folder)
    assert share_prompts(shared, shared, CPU) <= 1
    rows = completions()
    expected, gradients = loss_and_gradients(apart, completion_batch(rows, 2), examined, loss=loss)
    output, own = loss_and_gradients(shared, shared_batch(rows), examined, loss=loss)
    assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert int(output.weight) == int(expected.weight) == 4 + 1 + 6 + 6
    for name in ("difference", "absolute_difference", "compared"):
        assert float(output.sums[name]) == pytest.approx(float(expected.sums[name]), rel=1e-5)
    for (name, _), one, other in zip(apart.named_parameters(), own, gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max())), name


def test_a_row_holds_each_prompt_once_and_no_last_token():
    rows = completions()
    batch = shared_batch(rows)
    assert batch["input_ids"].shape == (1, 5 + 2 + 7 + (3 + 0 + 8) + 5 + (2 + 2))
    assert batch["prompt_samples"].tolist() == [3, 1, 2]
    assert batch["answer_lengths"].tolist() == [3, 0, 8, 5, 2, 2]


@pytest.mark.parametrize("window", [4, 64])
def test_layers_with_a_sliding_window_look_back_as_far(tmp_path, window):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {"use_sliding_window": True, "max_window_layers": 1, "initializer_range": 0.3, "vocab_size": 100}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **settings, num_key_value_heads=2, sliding_window=window)).eval()
    assert model.config.layer_types.count("sliding_attention") == 2
    assert share_prompts(model, model, CPU) <= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompts, "window_of", lambda *given: None)
        assert window > 4 or share_prompts(load_again(model), model, CPU) > 1, (
            "the proof sees a window that is left out"
        )


def load_again(model):
    model.set_attn_implementation("sdpa")
    return model


def test_rows_that_see_each_other_are_noticed(folder, monkeypatch):
    model = load(folder)
    everything = SharedPrompts._make_masks

    def blind(self, window):
        of_prompts, of_answers = everything(self, window)
        return of_prompts, torch.ones_like(of_answers)

    monkeypatch.setattr(SharedPrompts, "_make_masks", blind)
    assert share_prompts(model, model, CPU) > 1
    head = PolicyHead(ReinforcementConfig(kl=KlConfig()), model := load(folder))
    assert not head.share_prompts(model, CPU, SimpleNamespace(any=bool))
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_does_more_with_its_scores_gets_a_row_for_each_completion(folder):
    model = load(folder)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # as of a model that looks at later positions too
    head = PolicyHead(ReinforcementConfig(), model)
    assert not head.share_prompts(model, CPU, SimpleNamespace(any=bool))
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_stays_as_it_was_chosen(folder):
    model = load(folder, attn_implementation="eager")
    assert share_prompts(model, model, CPU) is None
    assert model.config._attn_implementation == "eager"
