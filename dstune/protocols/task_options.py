"""What few tasks do, as protocols: generic code asks `isinstance(task, NeedsReference)`, never for a class.

A task has all methods of a protocol or none: one that has some of them is refused when it registers, since nothing would call
them. To write only some, derive from the protocol, which has a default for each: `class Mine(dstune.Task, NeedsReference)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from dstune.protocols.task import FurtherModel, TaskConfig

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.data.prepared import PreparedData, Split
    from dstune.trainer.baseline import Prompted
    from dstune.trainer.evaluate import Evaluator
    from dstune.trainer.measure import Evaluation
    from dstune.zero.engine import Engine


@runtime_checkable
class NeedsReference(Protocol):
    """A task whose loss compares the model with another one, or with itself before training."""

    further_models: ClassVar[tuple[FurtherModel, ...]] = ()

    def caches_reference(self, run: RunConfig) -> bool:
        """Whether another model's log-probabilities of the training rows are computed before training."""
        return False

    def before_loading(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
    ) -> PreparedData:
        """`data` with what another model says of its rows, before the model of the run is loaded. Every rank calls it, for
        training and evaluation. Raises UserError."""
        return data

    def before_training(
        self,
        run: RunConfig,
        data: PreparedData,
        engine: Engine,
        head: Any,
        world: World,
        pad_token_id: int,
        precision: Precision,
    ) -> PreparedData:
        """`data` with what the model says of its rows before anything is trained or loaded from a checkpoint. Every rank calls
        it at every start of a run."""
        return data


@runtime_checkable
class EvaluatesOtherwise(Protocol):
    """A task that measures a finished model under other settings than it trained with."""

    config: Any

    def for_evaluation(self, run: RunConfig) -> TaskConfig:
        """The configuration under which a finished run's model is evaluated. Raises UserError where it cannot be."""
        return self.config

    def check_evaluation(self) -> None:
        """Raises UserError where the settings do not suffice to evaluate a model."""


@runtime_checkable
class AsksUntunedModel(Protocol):
    """A task whose answers an untuned language model can be asked for (`few_shot`) in other words than the rows have."""

    config: Any

    def as_text_task(self, run: RunConfig) -> TaskConfig:
        """The configuration under which an untuned language model is asked for the answers (`few_shot`). Raises UserError where
        the model of `run` is none."""
        return self.config

    def prompted(self, run: RunConfig, data: PreparedData, tokenizer: Any, key: str) -> Prompted | None:
        """What asks an untuned language model with worked examples in front of each row; None where the loss of the rows'
        targets tells it. key: what a UserError is about."""
        return None


@runtime_checkable
class MeasuresFurther(Protocol):
    """A task whose evaluations take more than one pass over the rows."""

    def extra_evaluation(
        self,
        evaluator: Evaluator,
        split: Split,
        measured: Evaluation,
        context: Sequence[int] = (),
        *,
        one_line: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """`measured` with what takes more than one pass over the rows (texts that the model generates). Every rank calls it.

        context: tokens in front of every row (worked examples). one_line: a generated text ends with its first line, where
        no target of the rows has a second one. progress: gets how many of this rank's batches are done, and how many there are.
        """
        return measured


@runtime_checkable
class CompletesLabels(Protocol):
    """A task whose labels follow a scheme, so that some have to exist beside those that were found."""

    def complete_labels(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The labels found in the training rows, with those that have to exist beside them."""
        return labels

    def check_labels(self, run: RunConfig, labels: tuple[str, ...]) -> None:
        """Raises UserError where these labels do not fit the settings."""


@runtime_checkable
class WeighsClasses(Protocol):
    """A task whose rows count by their label."""

    def class_weights(self, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int) -> list[float]:
        """How much a row of each label counts in the loss; empty where all count alike. counts: training rows by label.

        Raises UserError for weights of unknown labels.
        """
        return []


@runtime_checkable
class ExportsFiles(Protocol):
    """A task whose exports have files of another library beside the model, which say that it is the task of such a folder."""

    @classmethod
    def overrides_from(cls, folder: Path) -> list[str]:
        """What files beside a published model say of the task, as overrides, `task=NAME` first; empty where nothing does."""
        return []

    def write_export(self, run: RunConfig, architecture: PretrainedConfig, folder: Path) -> None:
        """Files that an export has beside model and tokenizer."""


TASK_OPTIONS = (
    NeedsReference,
    EvaluatesOtherwise,
    AsksUntunedModel,
    MeasuresFurther,
    CompletesLabels,
    WeighsClasses,
    ExportsFiles,
)
