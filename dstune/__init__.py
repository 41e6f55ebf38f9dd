"""dstune: distributed fine-tuning of language models on DeepSpeed ZeRO, composed by Hydra.

>>> import dstune
>>> run = dstune.train("experiment=sentiment", "trainer.epochs=2", train=rows)
>>> run.metrics, run.result, run.predict(["great film"])

`train`, `plan`, `evaluate`, `predict`, `generate`, `export` and `load_run` do what the verbs of the command line do;
`Task`, `Method`, ... are the base classes of plugins, `task`, `method`, ... register them. docs/python.md and docs/plugins.md
explain both. A name is imported when it is first used: `import dstune` loads nothing else.
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_MODULES = {
    "dstune.api.training": ("train",),
    "dstune.api.run": ("Run", "load_run"),
    "dstune.api.models": ("evaluate", "export", "generate", "plan", "predict"),
    "dstune.core.errors": ("DstuneError", "Preempted", "Problem", "TrainingFailed", "UserError"),
    "dstune.core.verb": ("Verb", "verb"),
    "dstune.protocols": (
        *(
            "Action",
            "Callback",
            "DataSource",
            "EngineKind",
            "Environment",
            "Launcher",
            "Method",
            "Metric",
            "ModelRegistry",
        ),
        *(
            "Optimizer",
            "Parallelism",
            "Probe",
            "Request",
            "Reward",
            "Routes",
            "RowFormat",
            "Schedule",
            "Task",
            "Tracker",
        ),
        *("callback", "data_source", "engine", "environment", "launcher", "method", "metric"),
        *("model_registry", "optimizer"),
        *("parallelism", "probe", "reward", "routes", "row_format", "schedule", "task", "tracker"),
    ),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
