"""A `RunConfig` without Hydra, for tests of pure functions."""

from __future__ import annotations

from typing import Any

from dstune.config import schema
from dstune.launch.local.config import LocalConfig
from dstune.methods.full import FullConfig
from dstune.optim.adamw import AdamWConfig
from dstune.optim.cosine import CosineConfig
from dstune.tasks.chat.config import ChatConfig


def run_config(**sections: Any) -> schema.RunConfig:
    """Return a configuration with defaults of every section; pass a whole section to replace it:
    `run_config(zero=ZeroConfig(stage=2))`."""
    defaults: dict[str, Any] = {
        "model": schema.ModelConfig(),
        "data": schema.DataConfig(train="train.jsonl"),
        "task": ChatConfig(),
        "method": FullConfig(),
        "forgetting": schema.ForgettingConfig(),
        "optimizer": AdamWConfig(),
        "schedule": CosineConfig(),
        "zero": schema.ZeroConfig(),
        "trainer": schema.TrainerConfig(),
        "checkpoint": schema.CheckpointConfig(),
        "evaluate": schema.EvaluateConfig(),
        "launch": LocalConfig(),
        "tracking": schema.tracking_class()(),
        "run": schema.RunSection(),
    }
    return schema.RunConfig(**(defaults | sections))
