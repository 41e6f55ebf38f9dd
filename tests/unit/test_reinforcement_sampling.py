"""Completions are drawn from the model's distribution, by noise that is a pure function of their place; a sampler that is not the
model that trains is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import save_decoder
from transformers import AutoModelForCausalLM

from dstune.generation import batch, completions
from dstune.generation.completions import sample_completions, sample_continuously
from dstune.generation.noise import exponential, mixed
from dstune.generation.sampler import draw
from dstune.models.heads.base import IGNORED
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.head import PolicyHead
from dstune.tasks.reinforcement.sampler_check import is_allowed

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
NUMBERS = [7, 3, 5]
PAD = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_decoder(tmp_path_factory.mktemp("policy") / "model")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def completed(model, *, step: int = 1, temperature: float = 1.0, prompts=PROMPTS, numbers=NUMBERS, **changes):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"samples": 3, "max_new_tokens": 12, "ends": {4}, "padding": PAD, "keys": (0, step), "goes_on": bool}
    return sample_completions(model, ids, mask, numbers, temperature=temperature, **(settings | changes))


def difference(model, completions, *, temperature: float = 1.0) -> tuple[float, float, float]:
    """(mean, mean of absolute values, largest of these) between the training forward pass and the sampler."""
    head = PolicyHead(ReinforcementConfig(temperature=temperature), model)
    try:
        rows = [([*PROMPTS[NUMBERS.index(c.prompt)], *c.ids], len(c.ids), c.logps) for c in completions]
        width = max(len(ids) for ids, _, _ in rows)
        batch = {
            "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in rows]),
            "labels": torch.full((len(rows), width), IGNORED),
            "sampled": torch.zeros(len(rows), width),
            "advantages": torch.zeros(len(rows)),
        }
        for row, (ids, count, logps) in enumerate(rows):
            batch["labels"][row, len(ids) - count : len(ids)] = torch.tensor(ids[len(ids) - count :])
            batch["sampled"][row, len(ids) - count : len(ids)] = torch.tensor(logps)
        with torch.no_grad():
            sums = head(model, batch).sums
        count = float(sums["compared"])
        return float(sums["difference"]) / count, float(sums["absolute_difference"]) / count, head.largest_difference
    finally:
        del model.get_output_embeddings().forward  # the head's own


def test_the_same_place_gives_the_same_completion_and_no_other_does(model):
    first, again, later = completed(model), completed(model), completed(model, step=2)
    assert [c.ids for c in first] == [c.ids for c in again]
    assert [c.ids for c in first] != [c.ids for c in later]
    assert len({tuple(c.ids) for c in first}) == len(first), "no two completions share noise"
    assert [(c.prompt, c.sample) for c in first] == [(number, sample) for number in NUMBERS for sample in range(3)]


def test_a_completion_does_not_depend_on_its_neighbours(model):
    """Left padding and the prompts beside it change nothing but rounding."""
    together = completed(model)
    for prompt, number in zip(PROMPTS, NUMBERS, strict=True):
        alone = completed(model, prompts=[prompt], numbers=[number])
        theirs = [c for c in together if c.prompt == number]
        assert [c.ids for c in alone] == [c.ids for c in theirs]
        for mine, other in zip(alone, theirs, strict=True):
            assert mine.logps == pytest.approx(other.logps, abs=1e-4)


def test_a_completion_ends_with_its_end_token(model):
    completions = completed(model, max_new_tokens=200, ends=set(range(60)))
    assert any(c.ended for c in completions)
    for completion in completions:
        assert all(token >= 60 for token in completion.ids[:-1])
        assert completion.ended == (completion.ids[-1] < 60)
        assert len(completion.logps) == len(completion.ids)


def test_tokens_are_drawn_from_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    rows = 40_000
    keys = mixed(torch.arange(rows), 9)
    for temperature in (1.0, 0.5):
        tokens, logps, entropy = draw(logits.expand(rows, -1), temperature, keys)
        expected = torch.softmax(logits / temperature, 0)
        counts = torch.bincount(tokens, minlength=5).double()
        chi_squared = float(((counts - rows * expected) ** 2 / (rows * expected)).sum())
        assert chi_squared < 18.5, (temperature, counts)  # p = 0.001 at 4 degrees of freedom
        torch.testing.assert_close(logps, expected.log()[tokens])
        assert float(entropy[0]) == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-5)


def test_noise_is_exponential_and_unrelated():
    noise = exponential(mixed(torch.arange(300), 1), 1000).double()
    assert float(noise.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(noise.square().mean()) == pytest.approx(2.0, abs=0.05)
    centred = noise - 1
    assert abs(float((centred[:-1] * centred[1:]).mean())) < 0.01, "neighbouring rows"
    assert abs(float((centred[:, :-1] * centred[:, 1:]).mean())) < 0.01, "neighbouring tokens"


def test_the_sampler_is_the_model_that_trains(model):
    for temperature in (1.0, 0.7):
        found = difference(model, completed(model, temperature=temperature), temperature=temperature)
        assert max(map(abs, found)) < 2e-5


def refused(dtype: torch.dtype, found: tuple[float, float, float]) -> bool:
    return not is_allowed(dtype, *found)


def with_padding_read(monkeypatch):
    plain = batch.last_logits
    monkeypatch.setattr(
        batch, "last_logits", lambda model, ids, mask, *given: plain(model, ids, torch.ones_like(mask), *given)
    )


def with_top_p(monkeypatch):
    plain = completions.draw

    def truncated(logits, temperature, keys):
        ordered, places = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
        dropped = ordered.cumsum(-1) - ordered > 0.9
        return plain(
            logits.masked_fill(torch.zeros_like(dropped).scatter(1, places, dropped), -math.inf), temperature, keys
        )

    monkeypatch.setattr(completions, "draw", truncated)


def with_adapter(model):
    """Its LoRA adapter moves the model as little as a few steps of training do."""
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


FAULTS = (
    "temperature",
    "stale weights",
    "padding read",
    "positions of padding",
    "top-p",
    "other template",
    "lost adapter",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sampler_that_is_another_model_is_refused(model, monkeypatch, fault):
    assert not refused(torch.float32, difference(model, completed(model)))
    trained_at = 1.0
    if fault == "temperature":
        completions = completed(model, temperature=0.7)
    elif fault == "stale weights":
        embedding = model.get_input_embeddings().weight
        before = embedding.detach().clone()
        with torch.no_grad():
            embedding += 0.02 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        completions = completed(model)
        with torch.no_grad():
            embedding.copy_(before)
    elif fault == "padding read":
        with_padding_read(monkeypatch)
        completions = completed(model)
    elif fault == "positions of padding":  # counted as if it were text, which a mask does not undo
        monkeypatch.setattr(batch, "positions_of", lambda mask: torch.ones_like(mask).cumsum(dim=1) * 3)
        completions = completed(model)
    elif fault == "top-p":
        with_top_p(monkeypatch)
        completions = completed(model)
    elif fault == "lost adapter":
        adapted = with_adapter(model)
        with adapted.disable_adapter():
            completions = completed(adapted)
        try:
            assert not refused(torch.float32, difference(adapted, completed(adapted)))
            assert refused(torch.float32, difference(adapted, completions))
        finally:
            adapted.unload()
        return
    else:
        completions = completed(model, prompts=[[40, *prompt] for prompt in PROMPTS])
    assert refused(torch.float32, difference(model, completions, temperature=trained_at))


def test_bounds_of_half_precision_leave_room_for_rounding_alone():
    assert not refused(torch.bfloat16, (0.002, 0.03, 0.2))  # as measured
    assert refused(torch.bfloat16, (-0.1, 0.12, 1.0))  # top-p 0.9
    assert refused(torch.bfloat16, (math.nan, math.nan, math.nan))


def continuously(model, *, rows: int, **changes):
    settings = {"samples": 3, "max_new_tokens": 40, "ends": set(range(40)), "temperature": 1.0, "padding": PAD}
    prompts = [(number, prompt) for number, prompt in zip(NUMBERS, PROMPTS, strict=True)] + [(9, [50, 51]), (8, [60])]
    settings |= {"keys": (0, 1), "device": torch.device("cpu")}
    return sample_continuously(model, prompts, rows=rows, **(settings | changes))


def test_a_batch_that_is_kept_full_writes_the_same_completions(model, monkeypatch):
    """Rows that end make place for others; what is written differs by rounding alone, and the loss is corrected for it."""
    prompts, numbers = [*PROMPTS, [50, 51], [60]], [*NUMBERS, 9, 8]
    exact = completed(model, prompts=prompts, numbers=numbers, ends=set(range(40)), max_new_tokens=40)
    lengths = [len(completion.ids) for completion in exact]
    assert min(lengths) < max(lengths) / 3, "they end at different times"
    computed = []
    plain = batch.last_logits
    monkeypatch.setattr(batch, "last_logits", lambda *given: computed.append(len(given[1])) or plain(*given))
    for rows in (3, 6, 15):
        computed.clear()
        fast = continuously(model, rows=rows)
        assert [(c.prompt, c.sample, c.ids, c.ended) for c in fast] == [
            (c.prompt, c.sample, c.ids, c.ended) for c in exact
        ]
        for one, other in zip(fast, exact, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
            assert one.entropy == pytest.approx(other.entropy, rel=1e-4)
        assert max(computed) <= rows
        assert sum(computed) <= sum(lengths) + len(prompts), "nothing is computed for rows that have ended"


def test_tokens_that_the_sampler_made_too_probable_count_less():
    from dstune.tasks.reinforcement.config import Rollout
    from dstune.tasks.reinforcement.losses import importance_factors

    old, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -4.0, -2.0])
    factors = importance_factors(old, sampled, 2.0)
    torch.testing.assert_close(factors, torch.tensor([1.0, 2.0, math.exp(-1.0)]))
    factors = importance_factors(old, sampled, 2.0, masked=True)
    torch.testing.assert_close(factors, torch.tensor([1.0, 0.0, 0.0]))  # exp(-1) is below 1 / 2
    assert ReinforcementConfig().cap is None
    assert ReinforcementConfig(rollout=Rollout.fast).cap == ReinforcementConfig(rollout=Rollout.vllm).cap == 2.0
    assert ReinforcementConfig(importance_cap=3.0).cap == 3.0


def test_the_plan_counts_prompt_and_completion(tmp_path):
    from dstune.config.compose import compose
    from dstune.planning.setup import _row_length

    settings = ["task=reinforcement", "task.rewards=[brevity]", "data.train=x.jsonl", "data.max_length=64"]
    config = compose([*settings, "task.max_new_tokens=100"]).config
    assert _row_length(config, {}) == 168  # 164, rounded up to a multiple of 8


def test_the_plan_counts_the_cache_as_it_is(tmp_path, monkeypatch):
    """Keys and values of all completions of a micro-batch of prompts, at their full length."""
    from dataclasses import replace

    from dstune.config.compose import compose
    from dstune.planning import rollout as plan
    from dstune.planning.architecture import architecture
    from dstune.planning.memory import memory
    from dstune.planning.setup import setup

    folder = save_decoder(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    caches = []
    plain = batch.last_logits
    monkeypatch.setattr(batch, "last_logits", lambda *given: caches.append(given[-1]) or plain(*given))
    completed(policy, ends=set(), max_new_tokens=6)
    held = sum(tensor.numel() * 4 for layer in caches[-1].layers for tensor in (layer.keys, layer.values))
    settings = [
        "task=reinforcement",
        "task.rewards=[brevity]",
        "data.train=x.jsonl",
        "task.samples=3",
        "data.max_length=4",
    ]
    settings += ["task.max_new_tokens=6", "trainer.micro_batch_size=9", "trainer.global_batch_size=3"]
    config = compose([*settings, f"model.path={folder}"]).config
    values = policy.config.to_dict() | {"model_type": "llama"}
    made = setup(
        config,
        architecture(values),
        ranks=1,
        ranks_per_node=1,
        on_gpu=True,
        precision=type(config.trainer.precision).fp32,
        values=values,
    )
    assert (made.micro_batches, made.answers, made.written) == (1, 3, 6)
    assert plan.completions_at_once(made) == 9
    # Written are 5 prompt tokens and all but the last of 6; the plan has 4 and 6, rounded up to a multiple of 8.
    assert plan.cache_bytes(made) * 10 // 16 == held
    assert "rollout" in memory(made).moments
    twice = replace(made, written=12)
    assert plan.rollout_seconds(twice, 1e15, 1e9) == pytest.approx(2 * plan.rollout_seconds(made, 1e15, 1e9), rel=1e-3)
