"""Parameter groups, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from dstune.config.schema import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    OptimizerConfig,
    ScheduleConfig,
    SgdConfig,
    WarmupStableDecayConfig,
)
from dstune.zero.engine import full_shape


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters in at most two groups: with weight decay, and (norms, biases, other vectors) without.

    A parameter frozen here never enters the optimizer; an empty group would crash DeepSpeed's stages 1 and 2.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if len(full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in trained if len(full_shape(parameter)) < 2]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """torch's optimizer over `groups`; DeepSpeed exchanges the parameters for their partitions."""
    match config:
        case AdamWConfig():
            # fused: 0.75 against 1.13 s a step for 135M parameters on two CPU cores, with no compiler needed.
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        case SgdConfig():
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def schedule_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak rate for optimizer step `step` (0 is the first) of `total_steps`.

    The warm-up's last step and the step after it both have the full rate; the last step of a decay has the lowest rate
    but one, so that no step is spent at a rate of zero: step s of d decaying ones stands at s / d.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    match config:
        case ConstantConfig():
            return 1.0
        case CosineConfig():
            progress = (step - warmup) / max(1, total_steps - warmup)
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case LinearConfig():
            progress = (step - warmup) / max(1, total_steps - warmup)
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 - min(1.0, progress))
        case WarmupStableDecayConfig():
            decay = math.ceil(config.decay_ratio * total_steps)
            start = total_steps - decay
            if step < start:
                return 1.0
            progress = (step - start) / max(1, decay)
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 - min(1.0, progress))
