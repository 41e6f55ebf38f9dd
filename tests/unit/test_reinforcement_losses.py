"""Policy losses beside TRL's own function on the same tensors, and advantages beside arithmetic by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dstune.tasks.reinforcement.config import KlConfig, KlEstimator, PolicyLoss, ReinforcementConfig, RewardScale
from dstune.tasks.reinforcement.losses import advantages_of, denominator, divergence, policy_loss

LENGTHS = [5, 2, 7, 1]
LONGEST = 7
ADVANTAGES = [1.2, -0.7, -1.5, 0.4]


def tensors(seed: int = 0, spread: float = 0.4):
    """(log-probabilities, those of the sampler, those of the reference), [completions, longest], and the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(4, LONGEST, generator=generator, dtype=torch.float64) * 3
    old, reference = (
        logps + spread * torch.randn(4, LONGEST, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).double()
    return logps.requires_grad_(), old, reference, mask


def ours(config: ReinforcementConfig, logps, old, reference, mask, *, parts: int = 1):
    """The loss and its gradient, [completions, longest], computed in `parts` micro-batches."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(4).chunk(parts):
        kept = mask[rows].bool()
        completion = kept.nonzero()[:, 0]
        advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)[rows][completion]
        of_reference = reference[rows][kept] if config.kl.coefficient else None
        output = policy_loss(
            config, logps[rows][kept], old[rows][kept], advantages, completion, len(rows), of_reference
        )
        total = total + output.loss_sum
    loss = total / denominator(config, LENGTHS)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss, gradient


def trl(config: ReinforcementConfig, logps, old, reference, mask):
    """The same by TRL's `GRPOTrainer._compute_loss`."""
    from trl import GRPOTrainer

    low, high = config.clip
    gspo = config.loss is PolicyLoss.gspo

    class Trainer(GRPOTrainer):
        def __init__(self):
            pass

        def _get_per_token_logps_and_entropies(self, *given, **named):
            return logps, torch.zeros_like(logps), None

    trainer = Trainer()
    same = SimpleNamespace(gather=lambda value: value, reduce=lambda value, reduction: value)
    accelerator = SimpleNamespace(num_processes=1, gather_for_metrics=same.gather, **vars(same))
    settings = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "importance_sampling_level": "sequence" if gspo else "token", "loss_type": "grpo" if gspo else config.loss.name,
        "beta": config.kl.coefficient, "epsilon_low": low, "epsilon_high": high, "_entropy_bonus_enabled": False,
        "model": torch.nn.Module(),
        "current_gradient_accumulation_steps": 1, "max_completion_length": config.max_new_tokens, "accelerator": accelerator,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_metrics": {"train": {}, "eval": {}},
    }  # fmt: skip
    vars(trainer).update(settings)
    trainer._metrics = {mode: _Lists() for mode in ("train", "eval")}
    ids = torch.ones(4, LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss, gradient


class _Lists(dict):
    def __missing__(self, name):
        return self.setdefault(name, [])


CONFIGS = {
    "dapo": {"loss": PolicyLoss.dapo},
    "dapo-kl": {"loss": PolicyLoss.dapo, "kl": KlConfig(0.3)},
    "grpo": {"loss": PolicyLoss.grpo},
    "grpo-kl": {"loss": PolicyLoss.grpo, "kl": KlConfig(0.3)},
    "dr_grpo": {"loss": PolicyLoss.dr_grpo, "max_new_tokens": 9},
    "gspo": {"loss": PolicyLoss.gspo, "clip_low": 0.05, "clip_high": 0.08},
    "cispo": {"loss": PolicyLoss.cispo, "clip_high": 1.1},
}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_trl(name, parts):
    config = ReinforcementConfig(**CONFIGS[name])
    loss, gradient = ours(config, *tensors(), parts=parts)
    expected, expected_gradient = trl(config, *tensors())
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)
    # The sums of lengths are in fp32.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert gradient.abs().sum() > 0


def test_rloo_by_hand():
    logps, old, reference, mask = tensors()
    config = ReinforcementConfig(loss=PolicyLoss.rloo, clip_low=0.1, clip_high=0.2)
    loss, gradient = ours(config, logps, old, reference, mask, parts=2)
    plain = []
    for row, advantage in enumerate(ADVANTAGES):
        ratio = ((logps - old) * mask)[row].sum().exp()
        plain.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.2) * advantage))
    expected = torch.stack(plain).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logps)[0])


def test_one_update_clips_nothing_and_has_the_gradient_of_the_policy():
    logps, _, _reference, mask = tensors()
    for loss in PolicyLoss:
        config = ReinforcementConfig(loss=loss, max_new_tokens=LONGEST)
        kept = mask.bool()
        completion = kept.nonzero()[:, 0]
        advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)[completion]
        output = policy_loss(config, logps[kept], logps[kept].detach(), advantages, completion, 4)
        assert not output.clipped_low and not output.clipped_high


def test_divergences():
    difference = 0.3
    logps, reference = torch.tensor(-1.0), torch.tensor(-1.0 - difference)
    assert float(divergence(KlEstimator.k1, logps, reference)) == pytest.approx(difference)
    assert float(divergence(KlEstimator.k2, logps, reference)) == pytest.approx(difference**2 / 2)
    assert float(divergence(KlEstimator.k3, logps, reference)) == pytest.approx(
        math.exp(-difference) - 1 + difference, rel=1e-5
    )


def advantages(rewards: list[list[float]], **settings) -> list[list[float]]:
    return advantages_of(ReinforcementConfig(**settings), torch.tensor(rewards, dtype=torch.float64)).tolist()


def test_advantages_by_hand():
    grouped = advantages([[1.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    deviation = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    assert grouped[0] == pytest.approx([2 / 3 / (deviation + 1e-4), *[-1 / 3 / (deviation + 1e-4)] * 2])
    assert grouped[1] == [0.0, 0.0, 0.0]
    assert advantages([[1.0, 0.0, 0.0]], loss=PolicyLoss.dr_grpo)[0] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    # Minus the mean of the others.
    assert advantages([[1.0, 0.0, 0.5]], loss=PolicyLoss.rloo)[0] == pytest.approx([0.75, -0.75, 0.0])
    spread = torch.tensor([1.0, 0.0, 2.0, 2.0], dtype=torch.float64).std().item() + 1e-4
    batch = advantages([[1.0, 0.0], [2.0, 2.0]], scale_rewards=RewardScale.batch)
    assert batch == [pytest.approx([0.5 / spread, -0.5 / spread]), [0.0, 0.0]]


def test_a_completion_without_a_reward_does_not_train_and_moves_no_other():
    without = advantages([[1.0, math.nan, 0.0, 0.5]])[0]
    three = advantages([[1.0, 0.0, 0.5]])[0]
    assert without == pytest.approx([three[0], 0.0, three[1], three[2]])
    assert advantages([[math.nan, math.nan]]) == [[0.0, 0.0]]
