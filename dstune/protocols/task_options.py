"""What few tasks do, as protocols: generic code asks `isinstance(task, NeedsReference)`, never for a class.

A task has all methods of a protocol or none: one that has some of them is refused when it registers, since nothing would call
them. To write only some, derive from the protocol, which has a default for each: `class Mine(dstune.Task, NeedsReference)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from dstune.protocols.task import FurtherModel, TaskConfig

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.core.errors import Problem
    from dstune.data.prepared import PreparedData, Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import SourcePrompts
    from dstune.trainer.baseline import Prompted
    from dstune.trainer.counterfactual import EvaluatedRows
    from dstune.trainer.evaluate import Evaluator
    from dstune.trainer.measure import Evaluation, Totals
    from dstune.trainer.rollouts import Rollouts
    from dstune.zero.engine import Engine


@runtime_checkable
class NeedsPackages(Protocol):
    """A task that uses packages which not every machine has."""

    def preflight(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what is missing on the launching machine, before any rank starts."""
        return iter(())


@runtime_checkable
class BuildsBatches(Protocol):
    """A task whose micro-batches are not those of every task (`dstune.data.collate`)."""

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray] | None:
        """Return the arrays of a micro-batch, or None for those of every task. with_index: with `index` [rows] among them,
        the numbers of the samples."""
        return None


@runtime_checkable
class MeasuresSteps(Protocol):
    """A task that reports more of a training step than its loss."""

    def measure_step(self, totals: Totals) -> dict[str, float]:
        """Return further numbers for the row of metrics.jsonl."""
        return {}


@runtime_checkable
class TrainsOnRollouts(Protocol):
    """A task that learns from what the model answers to its rows before a step."""

    @property
    def tokens_written_behind_rows(self) -> int:
        """The most tokens that the model adds to a row before it trains on both."""
        return 0

    @property
    def answers_per_row(self) -> int:
        """Texts that the model writes to a row, of which `trainer.micro_batch_size` are trained at a time."""
        return 1

    def rollouts(
        self,
        run: RunConfig,
        data: PreparedData,
        engine: Engine,
        head: Any,
        tokenizer: Any,
        world: World,
        run_dir: Path,
    ) -> Rollouts | None:
        """Return what turns the prompts of each step into what trains; None where it learns from rows as they are."""
        raise NotImplementedError


@runtime_checkable
class EvaluatesRollouts(Protocol):
    """A task whose evaluations are of what the model answers."""

    def evaluate(self, evaluator: Evaluator, split: Split, progress: Any) -> Evaluation:
        """Return the metrics of `split`, whose prompts the model answers."""
        raise NotImplementedError


@runtime_checkable
class RewritesTemplate(Protocol):
    """A task whose settings change how a server has to render the history."""

    def rewrite_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Change `tokenizer.chat_template` so that it renders as in training."""


@runtime_checkable
class AsksForTargets(Protocol):
    """A task whose rows are sources, for which a prompt asks the model."""

    def sources(self, tokenizer: Any, *, encoder_decoder: bool) -> SourcePrompts:
        """Return what makes a prompt of a source."""
        raise NotImplementedError


@runtime_checkable
class ChangesLoadedModel(Protocol):
    """A task that leaves out or replaces parts of the model that it loads."""

    def after_load(self, model: PreTrainedModel, new: list[str]) -> list[str]:
        """Change the model. new: names of its parameters without pretrained weights; return those that remain."""
        return new


@runtime_checkable
class ReadsArchitecture(Protocol):
    """A task whose settings a finished model's configuration tells."""

    def from_architecture(self, run: RunConfig, architecture: PretrainedConfig) -> RunConfig:
        """Return `run` with what the model's configuration says of the task, to use the model as it is. Raises UserError
        where the model is of another kind."""
        return run


@runtime_checkable
class TakesLabels(Protocol):
    """A task that can be given the labels of a model, for rows that lack some of them."""

    def with_labels(self, labels: Sequence[str]) -> TaskConfig:
        """Return the configuration with these labels, in the model's order."""
        raise NotImplementedError


@runtime_checkable
class BuildsQueries(Protocol):
    """A task whose rows a client cannot send as they are."""

    def as_query(self, fields: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a client would send of a training row, as `question` reads it. row: `fields`, normalised."""
        return dict(fields)


@runtime_checkable
class ComparesAnswers(Protocol):
    """A task whose answers can be compared between two texts of a row (`evaluate.counterfactual`)."""

    def counterfactual(
        self, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return how the answers change where terms are swapped: by name, a value for each row of `after`.

        places: of each of these rows, the number of the same row in `before`.
        """
        return {}


@runtime_checkable
class KeepsFurtherModels(Protocol):
    """A task whose further models stay in memory while the model trains: a plan counts them."""

    @property
    def resident_models(self) -> tuple[FurtherModel, ...]:
        """At stage 3 partitioned, beside a whole copy of their vocabulary projection; else whole on every rank."""
        return ()

    def keeps_start_model(self, run: RunConfig) -> bool:
        """Return whether one of the further models is a copy of the model that training starts from."""
        return False


@runtime_checkable
class NeedsReference(Protocol):
    """A task whose loss compares the model with another one, or with itself before training."""

    further_models: ClassVar[tuple[FurtherModel, ...]] = ()

    def caches_reference(self, run: RunConfig) -> bool:
        """Return whether another model's log-probabilities of the training rows are computed before training."""
        return False

    def before_loading(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
    ) -> PreparedData:
        """Return `data` with what another model says of its rows, before the model of the run is loaded. Every rank calls it,
        for training and evaluation. Raises UserError."""
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
        """Return `data` with what the model says of its rows before anything is trained or loaded from a checkpoint. Every rank
        calls it at every start of a run."""
        return data


@runtime_checkable
class EvaluatesOtherwise(Protocol):
    """A task that measures a finished model under other settings than it trained with."""

    config: Any

    def for_evaluation(self, run: RunConfig) -> TaskConfig:
        """Return the configuration under which a finished run's model is evaluated. Raises UserError where it cannot be."""
        return self.config

    def check_evaluation(self) -> None:
        """Raises UserError where the settings do not suffice to evaluate a model."""


@runtime_checkable
class AsksUntunedModel(Protocol):
    """A task whose answers an untuned language model can be asked for (`few_shot`) in other words than the rows have."""

    config: Any

    def as_text_task(self, run: RunConfig) -> TaskConfig:
        """Return the configuration under which an untuned language model is asked for the answers (`few_shot`). Raises UserError
        where the model of `run` is none."""
        return self.config

    def prompted(self, run: RunConfig, data: PreparedData, tokenizer: Any, key: str) -> Prompted | None:
        """Return the prompts that ask an untuned language model with worked examples in front of each row; None where the loss
        of the rows' targets tells it. key: what a UserError is about."""
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
        """Return `measured` with what takes more than one pass over the rows (texts that the model generates). Every rank calls it.

        context: tokens in front of every row (worked examples). one_line: a generated text ends with its first line, where
        no target of the rows has a second one. progress: gets how many of this rank's batches are done, and how many there are.
        """
        return measured


@runtime_checkable
class CompletesLabels(Protocol):
    """A task whose labels follow a scheme, so that some have to exist beside those that were found."""

    def complete_labels(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Return the labels found in the training rows, with those that have to exist beside them."""
        return labels

    def check_labels(self, run: RunConfig, labels: tuple[str, ...]) -> None:
        """Raises UserError where these labels do not fit the settings."""


@runtime_checkable
class WeighsClasses(Protocol):
    """A task whose rows count by their label."""

    def class_weights(self, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int) -> list[float]:
        """Return how much a row of each label counts in the loss; empty where all count alike. counts: training rows by label.

        Raises UserError for weights of unknown labels.
        """
        return []


@runtime_checkable
class ExportsFiles(Protocol):
    """A task whose exports have files of another library beside the model, which say that it is the task of such a folder."""

    @classmethod
    def overrides_from(cls, folder: Path) -> list[str]:
        """Return what files beside a published model say of the task, as overrides, `task=NAME` first; empty where nothing does."""
        return []

    def write_export(self, run: RunConfig, architecture: PretrainedConfig, folder: Path) -> None:
        """Write files that an export has beside model and tokenizer."""


@runtime_checkable
class HoldsModels(Protocol):
    """A task that has models in memory beside the one that trains."""

    def close(self) -> None:
        """Let go of them."""


TASK_OPTIONS = (
    NeedsPackages,
    BuildsBatches,
    MeasuresSteps,
    TrainsOnRollouts,
    EvaluatesRollouts,
    RewritesTemplate,
    AsksForTargets,
    ChangesLoadedModel,
    ReadsArchitecture,
    TakesLabels,
    BuildsQueries,
    ComparesAnswers,
    NeedsReference,
    KeepsFurtherModels,
    EvaluatesOtherwise,
    AsksUntunedModel,
    MeasuresFurther,
    CompletesLabels,
    WeighsClasses,
    ExportsFiles,
    HoldsModels,
)
