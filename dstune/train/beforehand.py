"""What a method works out before the model that is trained is loaded, on a copy of it that is thrown away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstune.config.forgetting import general_rows
from dstune.config.method_schema import FeaturesConfig, ImportanceConfig
from dstune.config.schema import Precision, RunConfig
from dstune.config.task_schema import ClassificationConfig
from dstune.data.build import PreparedData, prepare
from dstune.dist import World
from dstune.paths import cache_root
from dstune.train.features import Features, features_of
from dstune.train.forgetting import Fisher, fisher_information
from dstune.train.importance import Selected, selected


@dataclass(frozen=True)
class Beforehand:
    data: PreparedData
    """What the run trains on: vectors in the place of texts with `method=features`."""
    features: Features | None = None
    selection: Selected | None = None
    """Of `method=importance`."""
    fisher: Fisher = field(default_factory=dict)
    """Of `forgetting.ewc`."""


def work_out(
    config: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
) -> Beforehand:
    """Every rank must call it. Nothing is computed again that the cache or the run directory has, but Fisher information."""
    if isinstance(config.method, FeaturesConfig):
        features = features_of(config, data, tokenizer, precision, world, cache_root())
        return Beforehand(features.data, features)
    selection = None
    if isinstance(config.method, ImportanceConfig):
        selection = selected(config, data, tokenizer, precision, world, run_dir)
    if not config.forgetting.ewc:
        return Beforehand(data, selection=selection)
    rows = general_rows(config)
    if isinstance(rows.task, ClassificationConfig):
        rows = replace(rows, task=replace(rows.task, labels=list(data.labels)))
    general = prepare(rows, tokenizer, world.env, cache_root())
    restrict = selection.freeze_others if selection is not None else None
    fisher = fisher_information(config, general, tokenizer, precision, world, restrict)
    return Beforehand(data, selection=selection, fisher=fisher)
