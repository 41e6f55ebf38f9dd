"""The verb `dstune init`: a plugin of a kind that works as it is, to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.registry import Registry
from dstune.protocols import CALLBACKS, METHODS, METRICS, OPTIMIZERS, ROW_FORMATS, TASKS

TASK = '''\
"""task=@name@: a label for a text."""

from dataclasses import dataclass, replace
from typing import ClassVar

import dstune
from dstune.config.fields import setting
from dstune.tasks.classification import Classification
from dstune.tasks.classification.config import ClassificationConfig


@dataclass(frozen=True)
class @Name@Config(ClassificationConfig):
    """What `dstune train --help` says of the task."""

    name: str = "@name@"
    smoothing: float = setting(0.1, at_least=0.0, below=1.0)
    """Share of each label that is spread over all labels."""


@dstune.task
class @Name@(Classification):
    """Derive from `dstune.Task` for rows, heads or metrics of another kind."""

    Config = @Name@Config
    choice_settings: ClassVar = {"data": {"packing": False}}

    def head(self, model, rows=None):
        from dstune.tasks.classification.head import SingleLabelHead

        whole, smoothing = SingleLabelHead(), self.config.smoothing

        def head(forward, batch):
            import torch
            import torch.nn.functional as functional

            kept = {}

            def remembered(**inputs):
                kept["output"] = forward(**inputs)
                return kept["output"]

            output = whole(remembered, batch)
            logits = kept["output"].logits.float()
            counted = (batch["labels"] >= 0).float()
            uniform = -functional.log_softmax(logits, dim=-1).mean(dim=-1)
            loss_sum = (1 - smoothing) * output.loss_sum + smoothing * (uniform * counted).sum()
            return replace(output, loss_sum=loss_sum)

        return head
'''

METHOD = '''\
"""method=@name@: some of the weights are trained."""

from dataclasses import dataclass

import dstune
from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class @Name@Config(MethodConfig):
    """What `dstune train --help` says of the method."""

    name: str = "@name@"
    words: list[str] = setting(["bias", "classifier"])
    """Parameters whose name contains one of these are trained."""


@dstune.method
class @Name@(dstune.Method):
    Config = @Name@Config
    moves_weights = True
    same_parameters_throughout = True

    def apply(self, model, run):
        from dstune.models.load import new_weights

        new = new_weights(model).parameters
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new or self._is_trained(name))
        return model

    def trained(self, model):
        trained = tuple(tensor for tensor in model.tensors if self._is_trained(tensor.name))
        return trained, model.parameters - sum(tensor.count for tensor in trained)

    def _is_trained(self, name):
        return any(word in name for word in self.config.words)
'''

ROW_FORMAT = '''\
"""data.format=@name@: rows with a question and its kind, read by every task that reads a text and a label."""

from typing import ClassVar

import dstune
from dstune.data.values import label, text


@dstune.row_format
class @Name@(dstune.RowFormat):
    name = "@name@"
    required: ClassVar = ("question", "kind")
    answers: ClassVar = ("kind",)
    shape = "text_label"
    checks: ClassVar = {"question": text, "kind": label}

    def row(self, found, task):
        return {"text": found["question"], "label": found["kind"]}
'''

METRIC = '''\
"""A metric: the lowest recall of any label."""

import dstune


@dstune.metric
class @Name@(dstune.Metric):
    name = "@name@"
    lower_is_better = False
    tasks = ("classification",)

    def compute(self, predictions, targets, labels):
        recalls = []
        for label in sorted(set(targets)):
            found = [guess == label for guess, true in zip(predictions, targets, strict=True) if true == label]
            recalls.append(sum(found) / len(found))
        return min(recalls)
'''

CALLBACK = '''\
"""A callback: trainer.callbacks=[{@name@: {every: 10}}]."""

import dstune


@dstune.callback
class @Name@(dstune.Callback):
    name = "@name@"

    def __init__(self, every: int = 10):
        self.every, self.lowest = every, float("inf")

    def on_step_agreed(self, run, step):
        self.lowest = min(self.lowest, step.loss)  # of the global batch: the same on every rank
        if step.number % self.every == 0 and run.log is not None:  # rank 0
            run.log.message(f"lowest loss so far {self.lowest:.4f}")
        return dstune.Request()  # nothing; Request(dstune.Action.STOP, "why") ends the run as planned

    def results(self):
        return {"@name@": self.lowest}

    def state_dict(self):
        return {"lowest": self.lowest}

    def load_state_dict(self, state):
        self.lowest = state["lowest"]
'''

OPTIMIZER = '''\
"""optimizer=@name@: RMSprop of torch."""

from dataclasses import dataclass

import dstune
from dstune.config.fields import setting
from dstune.protocols.optimizer import OptimizerConfig


@dataclass(frozen=True)
class @Name@Config(OptimizerConfig):
    """What `dstune train --help` says of the optimizer."""

    name: str = "@name@"
    lr: float = setting(1e-4, at_least=0.0)
    """Peak learning rate."""
    weight_decay: float = setting(0.0, at_least=0.0)
    """L2 penalty; never applied to norms and biases."""
    alpha: float = setting(0.99, at_least=0.0, below=1.0)
    """Decay rate of the mean square of the gradient."""


@dstune.optimizer
class @Name@(dstune.Optimizer):
    Config = @Name@Config
    states_per_parameter = 1

    def build(self, groups):
        import torch

        return torch.optim.RMSprop(groups, lr=self.config.lr, alpha=self.config.alpha)
'''

TEMPLATES = {
    "task": (TASK, "task=@name@"),
    "method": (METHOD, "method=@name@"),
    "row_format": (ROW_FORMAT, "data.format=@name@"),
    "metric": (METRIC, "trainer.early_stopping.metric=@name@"),
    "callback": (CALLBACK, "trainer.callbacks=[@name@]"),
    "optimizer": (OPTIMIZER, "optimizer=@name@"),
}
REGISTRIES: dict[str, Registry[Any]] = {
    "task": TASKS,
    "method": METHODS,
    "row_format": ROW_FORMATS,
    "metric": METRICS,
    "callback": CALLBACKS,
    "optimizer": OPTIMIZERS,
}


def main(argv: list[str]) -> int:
    """Run `dstune init plugin KIND FILE`. Raises UserError; returns the exit code."""
    parser = VerbParser(prog="dstune init", description="Write a plugin that works, to begin from (docs/plugins.md).")
    parser.add_argument("what", metavar="plugin", choices=["plugin"], help="what to begin")
    parser.add_argument(
        "kind", metavar="KIND", choices=list(TEMPLATES), help=f"what the plugin adds: {', '.join(TEMPLATES)}"
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="such as my_task.py, which is also the name of what it adds"
    )
    arguments = parser.parse_args(argv)
    words = write(arguments.kind, arguments.file)
    print(f"{arguments.file} is written; use it with: dstune train plugins=[{arguments.file}] {words} ...")
    return EXIT_DONE


def write(kind: str, file: Path) -> str:
    """Write a plugin of a kind to `file`; returns the override that chooses it.

    Raises:
        UserError: the file exists, cannot be written, or its name is no name in Python or is that of another one of the kind.
    """
    name = file.stem
    if file.suffix != ".py" or not name.isidentifier():
        raise UserError(
            Problem("FILE", "a plugin is a Python file whose name is a name in Python", "my_plugin.py", str(file))
        )
    if name in REGISTRIES[kind]:
        reason = f"dstune has a {kind.replace('_', ' ')} named {name!r} already"
        raise UserError(Problem("FILE", reason, str(file.with_name(f"my_{name}.py")), str(file)))
    if file.exists():
        raise UserError(Problem("FILE", "exists already", "give another name", str(file)))
    template, words = TEMPLATES[kind]
    title = "".join(part.capitalize() for part in name.split("_"))
    try:
        files.write(file, template.replace("@name@", name).replace("@Name@", title))
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise UserError(Problem("FILE", reason, "give a file in a folder of yours", str(file))) from None
    return words.replace("@name@", name)
