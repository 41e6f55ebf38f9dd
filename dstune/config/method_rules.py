"""Rules of `method`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.method_schema import (
    FeaturesConfig,
    FreezeConfig,
    HeadConfig,
    ImportanceConfig,
    LoraConfig,
    Pooling,
    Selection,
    UlmfitConfig,
    Unit,
)
from dstune.config.schema import RunConfig
from dstune.config.task_schema import (
    HEADED,
    ClassificationConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TokenClassificationConfig,
)
from dstune.errors import Problem


def check_method(config: RunConfig) -> Iterator[Problem]:
    method = config.method
    if isinstance(method, HeadConfig) and not isinstance(config.task, HEADED):
        yield Problem("method", f"task={config.task.name} has no head of its own", "method=full or method=lora", "head")
    if isinstance(method, HeadConfig) and isinstance(config.task, RewardConfig) and method.pooling is not Pooling.model:
        reason = "a reward model has the head of its architecture"
        yield Problem("method.pooling", reason, "method.pooling=model", method.pooling.name)
    if isinstance(method, FeaturesConfig):
        yield from _check_features(config, method)
    if (
        isinstance(method, HeadConfig)
        and method.pooling is not Pooling.model
        and isinstance(config.task, TokenClassificationConfig | QuestionAnsweringConfig)
    ):
        reason = f"task={config.task.name} reads every token, and pooling leaves one vector of all"
        yield Problem("method.pooling", reason, "method.pooling=model", method.pooling.name)
    if isinstance(method, HeadConfig) and method.pooling is Pooling.model:
        for key in ("layers", "dropout"):
            if value := getattr(method, key):
                reason = "the head of the architecture has its own"
                yield Problem(f"method.{key}", reason, "method.pooling=mean, cls or last", shown(value))
    if isinstance(method, LoraConfig):
        modules = method.target_modules
        if not modules:
            fix = "method.target_modules=[all-linear], or module names such as [q_proj,v_proj]"
            yield Problem("method.target_modules", "no module would get an adapter", fix, "[]")
        if "all-linear" in modules and len(modules) > 1:
            yield Problem(
                "method.target_modules", "all-linear stands alone", "leave out the other names", shown(modules)
            )
    if isinstance(method, ImportanceConfig):
        yield from _check_importance(config, method)
    if isinstance(method, FreezeConfig):
        yield from _check_freeze(method)
    if isinstance(method, UlmfitConfig) and method.language_model_epochs:
        yield from _check_language_model_stage(config, method)
    if isinstance(method, UlmfitConfig):
        by_epochs = method.unfreeze_steps is None and method.unfreeze_epochs > 0
        if config.data.streaming and by_epochs:
            reason = "with data.streaming the length of an epoch is not known"
            yield Problem("method.unfreeze_epochs", reason, "method.unfreeze_steps=100", shown(method.unfreeze_epochs))


def _check_features(config: RunConfig, method: FeaturesConfig) -> Iterator[Problem]:
    if not isinstance(config.task, ClassificationConfig):
        reason = f"task={config.task.name} has no classifier to train on features"
        yield Problem("method", reason, "task=classification, or method=lora", "features")
    elif config.task.multi_label and (method.logistic_regression or method.random_forest):
        reason = "the classifiers of scikit-learn are fitted to one label a row"
        fix = "leave out method.logistic_regression and method.random_forest"
        yield Problem("task.multi_label", reason, fix, "true")
    elif config.task.regression and (method.logistic_regression or method.random_forest):
        reason = "the classifiers of scikit-learn are fitted to classes, and the labels are numbers"
        fix = "leave out method.logistic_regression and method.random_forest"
        yield Problem("task.regression", reason, fix, "true")
    if config.evaluate.counterfactual:
        reason = "other texts have other features, and the body does not run again"
        yield Problem("evaluate.counterfactual", reason, "dstune evaluate RUN with it", config.evaluate.counterfactual)
    if method.pooling is Pooling.model:
        reason = "the architecture's own head takes texts, and there are features only"
        yield Problem("method.pooling", reason, "method.pooling=mean, cls or last", "model")
    if config.data.streaming:
        reason = "features are computed once for all rows, and a stream is not read as a whole"
        yield Problem("data.streaming", reason, "data.streaming=false, or method=head", "true")


def _check_importance(config: RunConfig, method: ImportanceConfig) -> Iterator[Problem]:
    ablates = method.selection is Selection.ablation
    if ablates and method.unit is not Unit.tensors:
        reason = "only whole tensors are left out, and nothing is known of single entries"
        yield Problem("method.unit", reason, "method.unit=tensors, or another method.selection", method.unit.name)
    if ablates and not method.ablation_rows:
        yield Problem("method.ablation_rows", "the selection needs them", "method.ablation_rows=200", "0")
    if method.ablation_rows and not (config.data.validation or config.data.split.validation):
        reason = "tensors are left out on validation rows, and none are held out"
        fix = "data.validation=rows.jsonl or data.split.validation=0.05"
        yield Problem("method.ablation_rows", reason, fix, shown(method.ablation_rows))
    if config.data.streaming:
        reason = "the rows on which weights are scored are not those of a stream's first block alone"
        yield Problem("data.streaming", reason, "data.streaming=false, or method=full", "true")


def _check_language_model_stage(config: RunConfig, method: UlmfitConfig) -> Iterator[Problem]:
    key, epochs = "method.language_model_epochs", shown(method.language_model_epochs)
    if not isinstance(config.task, ClassificationConfig):
        reason = f"the stage is one in front of a classifier, and task={config.task.name} trains on texts itself"
        yield Problem(key, reason, "method.language_model_epochs=0", epochs)
    if config.data.streaming or config.data.mixture or config.forgetting.replay:
        reason = "the texts of a stream, a mixture or replayed rows are not read a second time"
        yield Problem(key, reason, "train task=causal_lm first, then model.path=RUN/export", epochs)


def _check_freeze(method: FreezeConfig) -> Iterator[Problem]:
    if not (method.embeddings or method.first_layers or method.last_layers or method.parameters):
        fix = "method.first_layers=4, method.embeddings=true or method.parameters=[mlp]; all weights are method=full"
        yield Problem("method", "nothing would be frozen", fix, "freeze")
    for key in ("parameters", "trained"):
        for pattern in getattr(method, key):
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(
                    f"method.{key}", f"this is no regular expression: {error}", "see Python's re", shown(pattern)
                )
