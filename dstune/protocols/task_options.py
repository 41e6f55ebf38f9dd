"""Optional protocols for abilities that few tasks have. Generic code asks `isinstance(task, NeedsReference)`, never for a class.

A task implements all methods of a protocol or none. Registration refuses a task with only some of them, since nothing would call
these. To write only some, derive from the protocol, which has a default for each: `class Mine(dstune.Task, NeedsReference)`.
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
    """A task that needs packages that not every machine has."""

    def preflight(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what is missing on the launching machine, before any rank starts."""
        return iter(())


@runtime_checkable
class BuildsBatches(Protocol):
    """A task that builds its own micro-batches instead of those of `dstune.data.collate`."""

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray] | None:
        """Return the arrays of a micro-batch; None for those of `dstune.data.collate`. with_index: whether to add the array `index`
        [rows], the numbers of the samples."""
        return None


@runtime_checkable
class MeasuresSteps(Protocol):
    """A task that reports further numbers of a training step, in addition to its loss."""

    def measure_step(self, totals: Totals) -> dict[str, float]:
        """Return further numbers for the step's row of metrics.jsonl, by name."""
        return {}


@runtime_checkable
class TrainsOnRollouts(Protocol):
    """A task that learns from the model's own answers, which are generated before a step."""

    @property
    def tokens_written_behind_rows(self) -> int:
        """The most tokens that the model adds to a row before it trains on both."""
        return 0

    @property
    def answers_per_row(self) -> int:
        """Number of texts that the model writes for a row. A micro-batch has `trainer.micro_batch_size` of these texts."""
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
        """Return the object that turns the prompts of a step into training samples; None if the task trains on the rows
        themselves."""
        raise NotImplementedError


@runtime_checkable
class EvaluatesRollouts(Protocol):
    """A task whose evaluations measure the model's generated answers."""

    def evaluate(self, evaluator: Evaluator, split: Split, progress: Any) -> Evaluation:
        """Let the model answer the prompts of `split`, and return the metrics of the answers."""
        raise NotImplementedError


@runtime_checkable
class RewritesTemplate(Protocol):
    """A task whose settings change how a server must render the history of a conversation."""

    def rewrite_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Change `tokenizer.chat_template` so that it renders as in training."""


@runtime_checkable
class AsksForTargets(Protocol):
    """A task whose rows are source texts; a prompt asks the model for the target."""

    def sources(self, tokenizer: Any, *, encoder_decoder: bool) -> SourcePrompts:
        """Return the object that turns a source text into a prompt."""
        raise NotImplementedError


@runtime_checkable
class ChangesLoadedModel(Protocol):
    """A task that removes or replaces parts of the loaded model."""

    def after_load(self, model: PreTrainedModel, new: list[str]) -> list[str]:
        """Change the model in place. new: names of its parameters without pretrained weights. Returns the names that remain."""
        return new


@runtime_checkable
class ReadsArchitecture(Protocol):
    """A task whose settings can be read from a finished model's configuration."""

    def from_architecture(self, run: RunConfig, architecture: PretrainedConfig) -> RunConfig:
        """Return `run` with the task's settings from the model's configuration, to use the model as it is. Raises UserError if the
        model is of another kind."""
        return run


@runtime_checkable
class TakesLabels(Protocol):
    """A task that can use the labels of a model, for rows in which some of them do not occur."""

    def with_labels(self, labels: Sequence[str]) -> TaskConfig:
        """Return the configuration with these labels, in the model's order."""
        raise NotImplementedError


@runtime_checkable
class BuildsQueries(Protocol):
    """A task whose training rows differ from the requests of a client."""

    def as_query(self, fields: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request that a client would send for a training row, as `question` reads it. row: `fields` in normalized
        form."""
        return dict(fields)


@runtime_checkable
class ComparesAnswers(Protocol):
    """A task that can compare the answers to two versions of a row's text (`evaluate.counterfactual`)."""

    def counterfactual(
        self, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return how the answers change when terms are swapped: by name, a value for each row of `after`.

        places: [rows of `after`], the index of the same row in `before`.
        """
        return {}


@runtime_checkable
class KeepsFurtherModels(Protocol):
    """A task whose further models stay in memory while the model trains: a plan counts them."""

    @property
    def resident_models(self) -> tuple[FurtherModel, ...]:
        """These models. Stage 3 partitions them, but keeps a full copy of their vocabulary projection; at other stages every rank
        has full copies."""
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
        """Return `data` with another model's outputs for its rows, before the model of the run is loaded. Every rank calls this,
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
        """Return `data` with the model's outputs for its rows, before anything is trained or loaded from a checkpoint. Every rank
        calls this at every start of a run."""
        return data


@runtime_checkable
class EvaluatesOtherwise(Protocol):
    """A task that evaluates a finished model with other settings than those of its training."""

    config: Any

    def for_evaluation(self, run: RunConfig) -> TaskConfig:
        """Return the configuration with which a finished run's model is evaluated. Raises UserError if it cannot be evaluated."""
        return self.config

    def check_evaluation(self) -> None:
        """Raise UserError if the settings do not suffice to evaluate a model."""


@runtime_checkable
class AsksUntunedModel(Protocol):
    """A task that can prompt an untuned language model for its answers (`few_shot`), in a form that differs from its rows."""

    config: Any

    def as_text_task(self, run: RunConfig) -> TaskConfig:
        """Return the configuration with which an untuned language model is prompted for the answers (`few_shot`). Raises UserError
        if the model of `run` is not a language model."""
        return self.config

    def prompted(self, run: RunConfig, data: PreparedData, tokenizer: Any, key: str) -> Prompted | None:
        """Return prompts with worked examples in front of each row, for an untuned language model; None if the loss of the rows'
        targets gives its answers. key: the key that a UserError names."""
        return None


@runtime_checkable
class MeasuresFurther(Protocol):
    """A task whose evaluations need more than one pass over the rows."""

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
        """Return `measured` with the metrics that need a further pass over the rows, such as those of generated texts. Every rank
        calls this.

        context: tokens in front of every row (worked examples). one_line: whether generation stops after the first line, if no
        target of the rows has a second one. progress: called with the numbers of this rank's finished and of all its batches.
        """
        return measured


@runtime_checkable
class CompletesLabels(Protocol):
    """A task whose labels follow a scheme, which requires some labels even if no row has them."""

    def complete_labels(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Return the labels that were found in the training rows, completed by those that the scheme requires."""
        return labels

    def check_labels(self, run: RunConfig, labels: tuple[str, ...]) -> None:
        """Raise UserError if these labels do not fit the settings."""


@runtime_checkable
class WeighsClasses(Protocol):
    """A task that weights rows by their label."""

    def class_weights(self, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int) -> list[float]:
        """Return the weight in the loss of each label's rows; empty for equal weights. counts: returns the training rows by label.

        Raises UserError for weights of unknown labels.
        """
        return []


@runtime_checkable
class ExportsFiles(Protocol):
    """A task whose exports contain files of another library, from which the task of a published model can be recognized."""

    @classmethod
    def overrides_from(cls, folder: Path) -> list[str]:
        """Return overrides that the files of a published model imply, `task=NAME` first; empty if they do not tell the task."""
        return []

    def write_export(self, run: RunConfig, architecture: PretrainedConfig, folder: Path) -> None:
        """Write the files that an export has in addition to model and tokenizer."""


@runtime_checkable
class HoldsModels(Protocol):
    """A task that keeps models in memory in addition to the trained one."""

    def close(self) -> None:
        """Release them."""


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
