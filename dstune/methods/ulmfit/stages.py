"""Splits the configuration of a `method=ulmfit` run with a language model stage into those of its two stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dstune.config.augment_schema import AugmentConfig
from dstune.config.rope import RopeConfig
from dstune.config.schema import EarlyStoppingConfig, Export, InitialWeights, RunConfig, tracking_class
from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.protocols import TASKS

FOLDER = "language_model"
"""Folder of the first stage in the run directory: a complete run."""


def language_model_stage(method: UlmfitConfig, config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the first stage: language modelling on the texts of the classifier's rows, with all layers training at discriminative
    rates (section 3.2 of arXiv:1801.06146)."""
    columns = {role: name for role, name in config.data.columns.items() if role == "text"}
    off = AugmentConfig()
    return replace(
        config,
        task=TASKS["causal_lm"].Config(),
        data=replace(config.data, format="text", columns=columns, packing=True, guard=None, ood=None, augment=off),
        method=UlmfitConfig(rate_factor=method.rate_factor, unfreeze_epochs=0.0),
        optimizer=replace(config.optimizer, lr=method.language_model_lr or config.optimizer.lr),
        trainer=replace(
            config.trainer, max_steps=None, epochs=method.language_model_epochs, early_stopping=EarlyStoppingConfig()
        ),
        evaluate=replace(config.evaluate, every=0, samples=0),
        tracking=tracking_class()(),
        run=replace(config.run, dir=str(run_dir / FOLDER), export=Export.last, resume="auto"),
    )


def classifier_stage(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the second stage: the run itself, starting from the export of the first stage."""
    model = replace(
        config.model,
        path=str(run_dir / FOLDER / "export"),
        revision=None,
        weights=InitialWeights.pretrained,
        rope=RopeConfig(),
        config_overrides={},
    )
    return replace(config, model=model)
