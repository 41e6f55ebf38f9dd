"""Rules of `method`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.method_schema import (
    FeaturesConfig,
    FreezeConfig,
    HeadConfig,
    Ia3Config,
    ImportanceConfig,
    LoraConfig,
    LoraInit,
    ModuleAdapterConfig,
    Pooling,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
    Selection,
    UlmfitConfig,
    Unit,
)
from dstune.config.schema import InitialWeights, RunConfig
from dstune.errors import Problem
from dstune.protocols import task_of
from dstune.protocols.method import MethodConfig

PROMPTS = (PromptConfig, PrefixConfig, PTuningConfig)
"""Methods whose parameters stand in front of the row; the model's weights stay as they are."""

QLORA_STAGE_3_ON_CPU = (
    "on a CPU, 4-bit weights of bitsandbytes have a shape of their own, and ZeRO-3 gathers them in the one that it cut"
)
"""Why a cell of the matrix is for GPUs only."""

REFUSED = {
    "adalora": "it takes ranks away by the gradients of single parameters between backward pass and update, and partitioned"
    " stages do not keep them (method=lora with method.rank_pattern sets ranks by hand)",
}
"""Methods of the field that are not offered, and why."""


def cpu_problems(config: RunConfig) -> Iterator[Problem]:
    """What is refused where there is no GPU."""
    if isinstance(config.method, QloraConfig) and config.zero.stage == 3:
        yield Problem("zero.stage", QLORA_STAGE_3_ON_CPU, "zero=stage2, or method=lora", "3")


def can_merge(method: MethodConfig) -> bool:
    """Whether what the method trains can become part of the model's own weights."""
    return isinstance(method, ModuleAdapterConfig)


def check_method(config: RunConfig) -> Iterator[Problem]:
    method = config.method
    task = task_of(config.task)
    if isinstance(method, HeadConfig) and not task.has_head:
        yield Problem("method", f"task={config.task.name} has no head of its own", "method=full or method=lora", "head")
    if isinstance(method, FeaturesConfig):
        yield from _check_features(config, method)
    if isinstance(method, HeadConfig) and method.pooling is not Pooling.model and task.has_head and task.unpoolable:
        yield Problem("method.pooling", task.unpoolable, "method.pooling=model", method.pooling.name)
    if isinstance(method, HeadConfig) and method.pooling is Pooling.model:
        for key in ("layers", "dropout"):
            if value := getattr(method, key):
                reason = "the head of the architecture has its own"
                yield Problem(f"method.{key}", reason, "method.pooling=mean, cls or last", shown(value))
    if isinstance(method, LoraConfig):
        yield from _check_lora(method)
    if isinstance(method, QloraConfig) and config.model.weights is InitialWeights.random:
        reason = "weights are rounded to 4 bits while they are read, and random ones are not read"
        yield Problem("model.weights", reason, "model.weights=pretrained, or method=lora", "random")
    if isinstance(method, PROMPTS):
        yield from _check_prompt(config, method)
    if isinstance(method, Ia3Config) and (strange := set(method.feedforward_modules) - set(method.target_modules)):
        reason = f"{', '.join(sorted(strange))} are not among method.target_modules"
        fix = "name them in both, or leave out both for peft's choice"
        yield Problem("method.feedforward_modules", reason, fix, shown(method.feedforward_modules))
    if isinstance(method, ModuleAdapterConfig):
        modules = method.target_modules
        if not modules and not isinstance(method, Ia3Config):
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
    task = task_of(config.task)
    if task.unpoolable:
        reason = f"task={config.task.name} has no classifier to train on features"
        yield Problem("method", reason, "task=classification, or method=lora", "features")
    elif task.several_labels and (method.logistic_regression or method.random_forest):
        reason = "the classifiers of scikit-learn are fitted to one label a row"
        fix = "leave out method.logistic_regression and method.random_forest"
        yield Problem("task.multi_label", reason, fix, "true")
    elif not task.has_labels and (method.logistic_regression or method.random_forest):
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
    if task_of(config.task).unpoolable:
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


def _check_prompt(config: RunConfig, method: PromptConfig | PrefixConfig | PTuningConfig) -> Iterator[Problem]:
    name = method.name
    if not task_of(config.task).prefix_positions_ok:
        reason = f"task={config.task.name} reads the positions of the row, and those of a trained prompt come in front of them"
        yield Problem("method", reason, "method=lora", name)
    if config.data.packing:
        reason = "the trained prompt stands once in front of a row, so packed samples behind the first would have none"
        yield Problem("data.packing", f"with method={name} {reason}", "data.packing=false", "true")
    if config.model.weights is InitialWeights.random:
        reason = f"what method={name} trains is exported beside its base, and random weights exist nowhere else"
        yield Problem("model.weights", reason, "model.weights=pretrained, or method=full", "random")
    if isinstance(method, PrefixConfig) and config.trainer.activation_checkpointing:
        reason = "the prefix stands in the cache of keys and values, which checkpointed layers do not have"
        yield Problem(
            "trainer.activation_checkpointing",
            reason,
            "false, or method=lora",
            shown(config.trainer.activation_checkpointing),
        )
    through_network = isinstance(method, PTuningConfig) or getattr(method, "projection_size", None) is not None
    if through_network and method.adapter:
        reason = "an export holds what the network gives, and the network itself cannot be had from it"
        yield Problem("method.adapter", reason, "continue the run itself: dstune train RUN", shown(method.adapter))


def _check_lora(method: LoraConfig) -> Iterator[Problem]:
    splits = method.init in (LoraInit.pissa, LoraInit.olora)
    if isinstance(method, QloraConfig):
        if splits:
            reason = (
                "what is left of a split weight would be rounded to 4 bits, and the export would not be its difference"
            )
            yield Problem("method.init", reason, "method.init=loftq, or method=lora", method.init.value)
        if method.frozen_adapters:
            reason = "a weight in 4 bits cannot take up an adapter"
            fix = "method=lora, or a merged model in model.path"
            yield Problem("method.frozen_adapters", reason, fix, shown(method.frozen_adapters))
    elif method.init is LoraInit.loftq:
        reason = "it makes up for what rounding to 4 bits takes, and method=lora rounds nothing"
        yield Problem("method.init", reason, "method=qlora, or method.init=default", "loftq")
    if method.adapter and method.init is not LoraInit.default:
        reason = "the adapter that method.adapter names has its values already"
        yield Problem("method.init", reason, "method.init=default, or leave out method.adapter", method.init.value)
    if method.init_iterations is not None and method.init is not LoraInit.pissa:
        reason = "is for the singular value decomposition of init=pissa"
        yield Problem(
            "method.init_iterations", reason, "leave it out, or method.init=pissa", str(method.init_iterations)
        )
    if method.dora and method.frozen_adapters:
        reason = "DoRA scales the whole weight, so an adapter of its own cannot hold its sum with others"
        yield Problem("method.dora", reason, "method.dora=false, or a merged model in model.path", "true")
    if splits and method.lr_ratio != 1:
        reason = "LoRA+ is for a B that begins at zero, and init=" + method.init.value + " gives both their size"
        yield Problem("method.lr_ratio", reason, "method.lr_ratio=1, or method.init=default", f"{method.lr_ratio:g}")
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in getattr(method, key).items():
            if not value > 0:
                yield Problem(f"method.{key}", f"{name} must be more than 0", "", shown(value))
            try:
                re.compile(name)
            except re.error as error:
                yield Problem(
                    f"method.{key}", f"is no regular expression: {error}", "q_proj, or 'layers.0.mlp.*'", name
                )
