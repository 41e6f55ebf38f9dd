"""Fits classifiers of scikit-learn to cached features, which a run reports along with its own classifier."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.data.prepared import PreparedData, Split
from dstune.methods.features.config import FeaturesConfig
from dstune.protocols import task_of
from dstune.trainer.evaluate import limited
from dstune.trainer.measure import Totals

RANKED = 20
"""Number of features in the ranking of a random forest."""


def classical_results(config: RunConfig, method: FeaturesConfig, data: PreparedData) -> dict[str, dict[str, Any]]:
    """Return the metrics of each classifier that `method` requests, by classifier and part of the data, and the `seconds` it took.
    A forest also has `ranking`: features by mean decrease in impurity (Breiman 2001), the most important first."""
    chosen = {"logistic_regression": method.logistic_regression, "random_forest": method.random_forest}
    if not any(chosen.values()):
        return {}
    features, labels = matrix(data.train)
    held_out = {
        "validation": data.validation and limited(data.validation, config.evaluate.max_rows, config.task),
        "test": data.test,
    }
    results: dict[str, dict[str, Any]] = {}
    for name in (name for name, fits in chosen.items() if fits):
        began = time.perf_counter()
        model = _fitted(_classifier(name, method, config.trainer.seed), features, labels)
        results[name] = {
            part: _metrics(config, data.labels, model, split) for part, split in held_out.items() if split is not None
        }
        results[name]["seconds"] = round(time.perf_counter() - began, 3)
        if name == "random_forest":
            importances = model.feature_importances_
            first = np.argsort(-importances, kind="stable")[:RANKED]
            results[name]["ranking"] = [
                {"feature": int(number), "impurity": round(float(importances[number]), 6)} for number in first
            ]
    return results


def _classifier(name: str, method: FeaturesConfig, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == "logistic_regression":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return RandomForestClassifier(n_estimators=method.trees, random_state=seed)


def _fitted(model: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    """Fit `model` and return it. A forest grows on all cores, which are idle while the other ranks wait for this one. Each tree has
    its own seed, so the forest is the same on any number of cores; its predictions are summed on one core, so they are too."""
    if not hasattr(model, "n_jobs"):
        return model.fit(features, labels)
    return model.set_params(n_jobs=-1).fit(features, labels).set_params(n_jobs=1)


def _metrics(config: RunConfig, names: tuple[str, ...], model: Any, split: Split) -> dict[str, float]:
    features, labels = matrix(split)
    probabilities = np.zeros((len(labels), len(names)))
    probabilities[:, model.classes_] = model.predict_proba(features)
    loss = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).sum()
    outputs = [
        {"prediction": prediction, "label": label, "probability": probability}
        for prediction, label, probability in zip(probabilities.argmax(axis=1), labels, probabilities, strict=True)
    ]
    totals = Totals(float(loss), len(labels), 0.0)
    return task_of(config.task).measure(names, split, totals, outputs).metrics


def matrix(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return all vectors of a part of the data, float32 [rows, hidden], and its labels, [rows] or [rows, labels]."""
    table = split.table.with_format("numpy")
    return np.stack(list(table["features"][:])).astype(np.float32), np.asarray(list(table["label"][:]))
