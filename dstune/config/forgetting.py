"""`forgetting.replay` and `forgetting.general` as what the data path knows: sources of a mixture, training rows."""

from __future__ import annotations

from dataclasses import replace

from dstune.config.augment_schema import AugmentConfig
from dstune.config.data_schema import SourceConfig, SplitConfig
from dstune.config.forgetting_schema import ForgettingConfig
from dstune.config.schema import RunConfig

TASK, GENERAL = "task", "general"
"""Names of the two sources of a run with replay, in this order."""


def with_replay(config: RunConfig) -> RunConfig:
    """Return `config` with its training rows and the general ones as sources of `data.mixture`, where it asks for a share of them.

    How often the general rows come follows from how many there are (`data.mixture.source_weights`).
    """
    forgetting, data = config.forgetting, config.data
    if not forgetting.replay or data.mixture or data.train is None or forgetting.general is None:
        return config
    mixture = {
        TASK: SourceConfig(path=data.train, subset=data.subset, revision=data.revision),
        GENERAL: SourceConfig(path=forgetting.general),
    }
    return replace(config, data=replace(data, train=None, mixture=mixture))


def measured_alone(config: RunConfig) -> RunConfig:
    """Return `config` for a model that is measured, not trained: without the replayed general rows and without augmentation."""
    data = config.data
    if mixes_in(config):
        task = data.mixture[TASK]
        data = replace(data, train=task.path, subset=task.subset, revision=task.revision, mixture={})
    return replace(config, data=replace(data, augment=AugmentConfig()), forgetting=ForgettingConfig())


def mixes_in(config: RunConfig) -> bool:
    """Return whether `data.mixture` is what `with_replay` has made of it."""
    return bool(config.forgetting.replay) and tuple(config.data.mixture) == (TASK, GENERAL)


def general_rows(config: RunConfig) -> RunConfig:
    """Return the configuration in which the general rows are the training rows, and there are no others."""
    data = replace(
        config.data,
        train=config.forgetting.general,
        mixture={},
        validation=None,
        test=None,
        guard=None,
        ood=None,
        subset=None,
        revision=None,
        max_rows=None,
        augment=AugmentConfig(),
        split=SplitConfig(validation=0.0, test=0.0),
    )
    return replace(config, data=data)
