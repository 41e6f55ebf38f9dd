"""Preference losses against arithmetic by hand, and DPO against TRL on the same batch and weights."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import save_decoder, write_preferences

from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.preference.head import JudgedHead, PairHead, judged_losses, pair_losses


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# One pair: the better answer has 2 tokens, the worse one 4.
SUMMED = torch.tensor([[-1.0], [-6.0]])
TOKENS = torch.tensor([[2.0], [4.0]])
REFERENCE = torch.tensor([[-3.0], [-4.0]])


@pytest.mark.parametrize(
    ("task", "loss", "rewards"),
    [
        # ratios 2 and -2, so the margin is beta * 4
        (PreferenceConfig(), -math.log(sigma(0.4)), (0.2, -0.2)),
        (
            PreferenceConfig(beta=0.5, label_smoothing=0.25),
            -0.75 * math.log(sigma(2)) - 0.25 * math.log(sigma(-2)),
            (1.0, -1.0),
        ),
        # mean ratios 1 and -0.5, 1 / (2 * 0.25) = 2
        (PreferenceConfig(loss=PreferenceLoss.ipo, beta=0.25), (1.5 - 2) ** 2, (0.25, -0.125)),
        # mean log-probabilities -0.5 and -1.5; gamma 1, beta 2
        (PreferenceConfig(loss=PreferenceLoss.simpo), -math.log(sigma(2 * 1.0 - 1)), (-1.0, -3.0)),
        (
            PreferenceConfig(loss=PreferenceLoss.orpo),
            0.5
            - 0.1
            * math.log(
                sigma(math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5))))
            ),
            (-0.05, -0.15),
        ),
    ],
    ids=lambda value: value.loss.name if isinstance(value, PreferenceConfig) else "",
)
def test_loss_of_a_pair(task, loss, rewards):
    found, found_rewards = pair_losses(task, SUMMED, TOKENS, REFERENCE)
    assert found.tolist() == pytest.approx([loss], rel=1e-6)
    assert found_rewards[:, 0].tolist() == pytest.approx(rewards, rel=1e-6)


def test_a_certain_answer_has_a_finite_odds_ratio():
    summed = torch.tensor([[0.0], [-4.0]], requires_grad=True)
    loss, _ = pair_losses(PreferenceConfig(loss=PreferenceLoss.orpo), summed, TOKENS, None)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(summed.grad).all()


def test_loss_of_a_judged_answer():
    task = PreferenceConfig(loss=PreferenceLoss.kto, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    rewards = 0.5 * torch.tensor([1.0, 1.0, -2.0])  # ratios 1, 1, -2; z0 is 0.4
    losses = judged_losses(task, rewards, torch.tensor([True, False, False]), torch.tensor(0.4))
    expected = [2 * (1 - sigma(0.5 * 0.6)), 3 * (1 - sigma(-0.5 * 0.6)), 3 * (1 - sigma(0.5 * 2.4))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_reference_point_is_a_mean_over_all_parts_and_never_below_zero(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_decoder(tmp_path / "model"))
    head = JudgedHead(PreferenceConfig(loss=PreferenceLoss.kto), model)

    def part(moved: float, rows: int) -> dict[str, torch.Tensor]:
        return {"moved": torch.tensor(moved, dtype=torch.float64), "rows": torch.tensor(rows)}

    filler = part(0.0, 0)
    assert [float(p["reference_point"]) for p in head.join([part(6.0, 2), part(-1.0, 3), filler])] == [1.0] * 3
    assert float(head.join([part(-6.0, 2)])[0]["reference_point"]) == 0.0


def test_dpo_equals_trl_on_the_same_batch_and_weights(tmp_path):
    """TRL's DPOTrainer on the very tensors that the head gets: loss to 1e-4, and the gradient's norm."""
    trl = pytest.importorskip("trl", reason="pip install trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dstune.config.compose import compose
    from dstune.core.rank_env import RankEnv
    from dstune.data.batches import batch_of
    from dstune.data.build import prepare
    from dstune.data.sampler import MicroBatch

    started, other = save_decoder(tmp_path / "model"), save_decoder(tmp_path / "other", seed=1)
    pairs = write_preferences(tmp_path / "pairs.jsonl", 8)
    overrides = [f"model.path={started}", f"data.train={pairs}", "data.max_length=64", "data.split.validation=0"]
    config = compose(["task=preference", "data=files", *overrides, "task.beta=0.3"]).config
    tokenizer = AutoTokenizer.from_pretrained(started)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), tmp_path / "cache")
    micro_batch = MicroBatch(0, tuple((index,) for index in range(len(data.train.lengths))))
    batch = batch_of(config, data.train, micro_batch, tokenizer.pad_token_id)

    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (started, other))
    head = PairHead(config.task, policy)
    with torch.no_grad():
        compared = PairHead(config.task, reference).log_probabilities(reference, batch).T.reshape(-1)
    output = head(policy, batch | {"reference": compared})
    mine = output.loss_sum / output.weight
    gradients = torch.autograd.grad(mine, list(policy.parameters()))
    mine = mine.detach()

    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.3, report_to=[], bf16=False, use_cpu=True, max_length=None
        ),
        train_dataset=datasets.Dataset.from_json(str(pairs)),
        processing_class=tokenizer,
    )
    trainer.model.train()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = trainer.compute_loss(trainer.model, inputs | {"completion_mask": (batch["labels"] != -100).long()})
    expected = torch.autograd.grad(theirs, list(trainer.model.parameters()))
    assert len(batch["counted"]) == 8
    assert abs(float(mine) - math.log(2)) > 0.01, "the reference is another model"
    assert float(mine) == pytest.approx(float(theirs.detach()), abs=1e-4)
    norms = [float(torch.cat([g.flatten() for g in found]).norm()) for found in (gradients, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
