"""Learning-rate schedules against hand arithmetic."""

from __future__ import annotations

import pytest

from dstune.optim.constant import ConstantConfig
from dstune.optim.cosine import CosineConfig
from dstune.optim.linear import Linear, LinearConfig
from dstune.optim.slanted_triangular import SlantedTriangularConfig
from dstune.optim.warmup_stable_decay import WarmupStableDecayConfig
from dstune.protocols import schedule_of


def factors(config, total):
    return [schedule_of(config).factor(step, total) for step in range(total)]


def test_linear_with_warmup_steps():
    assert factors(LinearConfig(warmup_steps=2), 6) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_linear_ends_above_its_floor():
    assert factors(LinearConfig(warmup_steps=0, min_lr_ratio=0.5), 4) == pytest.approx([1.0, 0.875, 0.75, 0.625])


def test_cosine():
    # 0.5 * (1 + cos(pi * s / 4)) for s = 0 ... 3
    assert factors(CosineConfig(warmup_steps=0), 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert factors(CosineConfig(warmup_steps=0, min_lr_ratio=0.1), 2) == pytest.approx([1.0, 0.55])


def test_constant():
    assert factors(ConstantConfig(warmup_steps=4), 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warmup_stable_decay():
    config = WarmupStableDecayConfig(warmup_steps=2, decay_ratio=0.4)
    assert factors(config, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1.0, 0.75, 0.5, 0.25])


def test_slanted_triangular():
    # cut = 2 of 10 steps, p = t / 2, then 1 - (t - 2) / (2 * (1 / 0.2 - 1)); the factor is (1 + 3 p) / 4
    config = SlantedTriangularConfig(cut_fraction=0.2, ratio=4)
    assert factors(config, 10) == pytest.approx([(1 + 3 * p / 8) / 4 for p in (0, 4, 8, 7, 6, 5, 4, 3, 2, 1)])


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (1.0, 7, 7)])
def test_warmup_ratio_rounds_up(ratio, total, steps):
    assert Linear(LinearConfig(warmup_ratio=ratio)).warmup_steps(total) == steps


def test_warmup_steps_replace_the_ratio():
    assert Linear(LinearConfig(warmup_ratio=0.5, warmup_steps=1)).warmup_steps(100) == 1


def test_never_zero_while_training():
    for config in (LinearConfig(), CosineConfig(), WarmupStableDecayConfig(), SlantedTriangularConfig()):
        assert min(factors(config, 50)) > 0
