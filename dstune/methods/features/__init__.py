"""method=features: the frozen body reads every row once, and a classifier is trained on its vectors from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.schema import Precision, RunConfig
from dstune.core.errors import Problem
from dstune.methods._pooled import PooledHead, Pooling
from dstune.methods.features.config import FeaturesConfig
from dstune.protocols import method, task_of
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import NeedsPreparation

if TYPE_CHECKING:
    from dstune.core.distributed import World
    from dstune.data.prepared import PreparedData


@method
class Features(PooledHead, NeedsPreparation):
    Config = FeaturesConfig
    config: FeaturesConfig

    why_not_measured = "the classifier above computed features takes so little that there is nothing to find"
    flops_known = False  # rows are vectors, not texts

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config, task = self.config, task_of(run.task)
        classical = config.logistic_regression or config.random_forest
        fix = "leave out method.logistic_regression and method.random_forest"
        if task.unpoolable:
            reason = f"task={task.name} has no classifier to train on features"
            yield Problem("method", reason, "task=classification, or method=lora", "features")
        elif task.several_labels and classical:
            reason = "the classifiers of scikit-learn are fitted to one label a row"
            yield Problem("task.multi_label", reason, fix, "true")
        elif not task.has_labels and classical:
            reason = "the classifiers of scikit-learn are fitted to classes, and the labels are numbers"
            yield Problem("task.regression", reason, fix, "true")
        if run.evaluate.counterfactual:
            reason = "other texts have other features, and the body does not run again"
            yield Problem("evaluate.counterfactual", reason, "dstune evaluate RUN with it", run.evaluate.counterfactual)
        if config.pooling is Pooling.model:
            reason = "the architecture's own head takes texts, and there are features only"
            yield Problem("method.pooling", reason, "method.pooling=mean, cls or last", "model")
        if run.data.streaming:
            reason = "features are computed once for all rows, and a stream is not read as a whole"
            yield Problem("data.streaming", reason, "data.streaming=false, or method=head", "true")

    def prepare(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
    ) -> Preparation:
        from dstune.core.paths import cache_root
        from dstune.methods.features.vectors import features_of

        return features_of(run, self.config, data, tokenizer, precision, world, cache_root())
