"""Defines a task: the rows it reads, the model and loss it trains, and how its models are measured, used and exported.

Everything may depend on the task's configuration (`self.config`), such as the kind of loss or a tag scheme. Methods get the
complete `RunConfig` if other sections matter, too. Modules that import torch (`encode`, `head`, `metrics`, `predict`) must be
imported inside the methods below, so that the launcher starts fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dstune.checkpoint.card import Export
    from dstune.config.data_schema import DataConfig
    from dstune.config.schema import RunConfig
    from dstune.core.errors import Problem
    from dstune.data.prepared import Split
    from dstune.data.tokenize.sample import Encoder
    from dstune.inference.predictor import Predictor
    from dstune.inference.rows import Question
    from dstune.models.heads import Head, Rows
    from dstune.trainer.measure import Evaluation, Row, Totals


@dataclass(frozen=True)
class TaskConfig:
    """Base of every task's configuration: fields of a subclass become keys `task.FIELD`."""

    needs: ClassVar[str] = ""
    """Settings without which this task is refused, as advice names them: `task.rewards=[exact_answer]`."""
    name: str = ""


@dataclass(frozen=True)
class FurtherModel:
    """A model that a run loads in addition to the trained one. Both fields name a field of the task's configuration."""

    path: str
    """The field with a folder, hub id or sample, or with None if the run has no such model."""
    revision: str
    """The field with the revision, which is resolved to a commit before the ranks start."""


class Task:
    """Base of every task. Subclasses set `Config` and register with `@dstune.task`.

    Five members make a task; everything else has a default:

    - `formats`: the row formats that it reads.
    - `encoder(...)`: turns rows into tokenized samples.
    - `head(...)`: computes the loss of a batch.
    - `measure(...)`: computes metrics from the head's outputs for held-out rows.
    - `predictor()`: returns the class that answers rows without labels.

    Abilities that few tasks have are optional protocols (`dstune.protocols.task_options`).
    docs/plugins.md explains what these methods take and return.
    """

    Config: ClassVar[type] = TaskConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    # ---- traits: generic code asks for these instead of the task's class ----

    language: ClassVar[bool] = False
    """The loss is the next-token loss of a language model, and heads keep no outputs for single rows."""
    conversational: ClassVar[bool] = False
    """Rows are rendered with the chat template if the model has one; the configuration has a `template_date`."""
    sees_images: ClassVar[bool] = False
    """Rows may contain images; the model must have a vision tower to read them."""
    generates: ClassVar[bool] = False
    """The model writes text."""
    has_head: ClassVar[bool] = False
    """The model has a task-specific head instead of the projection onto the vocabulary."""
    per_token: ClassVar[bool] = False
    """The head reads every token, not one pooled vector per row."""
    unpoolable: ClassVar[str] = "the task has no head of its own"
    """Why the head cannot read a pooled vector of the row; empty if it can."""
    row_loss: ClassVar[bool] = True
    """Every row has its own loss, so losses can be averaged by subgroup and compared between two texts of a row."""
    has_predictions: ClassVar[bool] = True
    """Evaluations contain the prediction for each row (`Evaluation.predictions`), which metrics of plugins read."""
    comparable_loss: ClassVar[bool] = True
    """Training and evaluation losses are comparable, regardless of the number of rows in a step."""
    prefix_positions_ok: ClassVar[bool] = False
    """The head can handle trained positions in front of the row."""
    unpackable: ClassVar[str] = "the task reads rows one by one"
    """Why rows cannot be packed; empty if they can."""
    splits_long_rows: ClassVar[bool] = False
    """A row longer than `data.max_length` becomes several samples instead of being truncated."""
    token_targets: ClassVar[bool] = False
    """Targets are tokens; for other tasks each row is one target."""
    one_pass: bool = False  # not a ClassVar: in some tasks it depends on the configuration
    """Each micro-batch passes exactly once through a decoder and all its layers."""
    countable_flops: ClassVar[bool] = True
    """The operations of a step can be computed from the lengths of its rows (`dstune.planning.flops`)."""
    splits_conversations: ClassVar[bool] = False
    """A row may become several samples if the chat template rewrites its history; metrics count rows."""
    chunked: ClassVar[bool] = False
    """The samples of a long row are measured together, as one row."""
    encoder_decoder: ClassVar[bool] = False
    """Encoder-decoders can be trained on it."""
    tensor_parallel: ClassVar[bool] = False
    """Training with weights that ranks share was compared with a reference."""
    few_shot: ClassVar[bool] = False
    """An untuned language model can be prompted for the answers, with worked examples first."""
    same_label_when_reworded: ClassVar[bool] = False
    """A slightly changed text keeps its label, so `data.augment` may add changed copies."""
    asks_by_prompt: ClassVar[bool] = False
    """The configuration has a `prompt` with a placeholder for the source text."""
    low_learning_rate: ClassVar[bool] = False
    """Adapters are usually trained at a tenth of the learning rate that other tasks use."""
    gives_probabilities: ClassVar[bool] = False
    """Predictions contain a probability for each label."""
    serves: ClassVar[tuple[str, ...]] = ()
    """Kinds of routes that `dstune serve` offers for a task that writes no text: `embed`, `classify`, `rank`, `tag`, `answer`,
    `reward`."""
    predicts_from_text: ClassVar[bool] = True
    """A prediction needs only a single text."""
    metrics_read_rows: ClassVar[bool] = False
    """Metrics need the rows in addition to their samples."""
    texts_per_row: ClassVar[int] = 1
    """Sequences that the model reads for one row."""
    head_classes: ClassVar[str] = ""
    """The end of the names of transformers' classes with this head (`ForTokenClassification`)."""
    peft_type: ClassVar[str] = ""
    """The task's name in `peft.TaskType`; if empty, that of language models."""
    pipeline: ClassVar[str] = "text-generation"
    """The pipeline of transformers and of the hub that runs the task's models."""
    unrecorded: ClassVar[tuple[str, ...]] = ()
    """Fields that an export does not record, since they concern only the training rows or machine."""
    output: ClassVar[str] = "language model"
    """The head on the model's body, as `dstune.planning.architecture` names it."""

    @property
    def whole_batch_loss(self) -> bool:
        """Whether the loss needs a complete step or a second model, so a single micro-batch has no gradient."""
        return False

    @property
    def template_date(self) -> str | None:
        """The date that a chat template may print (YYYY-MM-DD); None for tasks that are not conversational."""
        return self.config.template_date if self.conversational else None

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """The run's arguments for the chat template; empty for tasks that are not conversational."""
        return self.config.chat_template_kwargs if self.conversational else {}

    @property
    def every_position_is_a_target(self) -> bool:
        """Whether all positions of a row are projected onto the vocabulary."""
        return True

    @property
    def needs_answer(self) -> bool:
        """Whether a conversation must contain a message of the assistant."""
        return True

    choice_settings: ClassVar[Mapping[str, Any]] = {}
    """For plugins: the settings of other sections that choosing the task implies, such as `{"data": {"packing": False}}`."""

    # ---- rows ----

    formats: ClassVar[tuple[str, ...]] = ()
    """Row formats that the task reads with any of its settings. If a row fits several, the first one counts."""

    @property
    def read_formats(self) -> tuple[str, ...]:
        """Those of `formats` that the task reads as configured."""
        return self.formats

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels whose names are collected from the rows, unless the configuration lists them in `labels`."""
        return False

    @property
    def several_labels(self) -> bool:
        """Whether a row may have any number of labels."""
        return False

    @property
    def given_labels(self) -> tuple[str, ...]:
        """The label names in the configuration, in the order of their indices; empty if they are collected from the rows."""
        return tuple(self.config.labels) if self.has_labels else ()

    def row_key(self) -> dict[str, Any]:
        """Return the settings that samples depend on, as part of their cache key."""
        key = asdict(self.config)
        if self.conversational:
            key.pop("template_date")  # counts only if the template prints it
        return key

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        """Return the encoder that turns rows into samples. Raises UserError if the tokenizer lacks what task and format need.

        fmt: the rows' format. If sources and parts have several, the first of them in `formats`; the encoder also gets rows of the
            others.
        """
        raise NotImplementedError(f"task={self.name} has no encoder")

    @classmethod
    def for_source(cls, main: TaskConfig, prompt: str | None) -> TaskConfig:
        """Return the configuration for a `data.mixture` source with rows of this task, in a run whose task is `main`.

        If `main` has all settings of this task, because it is the same task or one derived from it (distillation from chat), they
        apply to the source too. Otherwise the source takes the defaults, and from `main` only the settings of the chat template.

        prompt: the source's own prompt; ignored by tasks without a `prompt`.
        """
        has_own_prompt = cls.asks_by_prompt and prompt is not None
        shared_keys: Sequence[str] = ()
        if isinstance(main, cls.Config):
            if not has_own_prompt:
                return main
            shared_keys = [field.name for field in fields(cls.Config)]
        elif cls.conversational:
            shared_keys = [key for key in ("template_date", "chat_template_kwargs") if hasattr(main, key)]
        # `replace` does not work: rules read the configuration through a view, which is not a dataclass.
        values = {key: getattr(main, key) for key in shared_keys}
        return cls.Config(**values | ({"prompt": prompt} if has_own_prompt else {}))

    # ---- configuration ----

    frozen_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that the first start of a run fills in and later starts adopt."""

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings of the task that contradict each other or other sections."""
        return iter(())

    def resolve(self, today: str) -> TaskConfig:
        """Return the configuration with the settings that depend on the day of composition filled in. today: YYYY-MM-DD."""
        if self.conversational and self.config.template_date is None:
            return replace(self.config, template_date=today)
        return self.config

    # ---- prediction ----

    def question(self, labels: Sequence[str], data: DataConfig) -> Question:
        """Return the reader of the columns that predictions need. labels: the model's labels by index. data: with `columns` and
        `format` as in training."""
        return self.predictor().question_class(self.config, labels, data)

    def predictor(self) -> type[Predictor]:
        """Return the class that turns rows into predictions with a model in memory."""
        raise NotImplementedError(f"task={self.name} predicts nothing")

    # ---- metrics ----

    @property
    def metrics(self) -> tuple[str, ...]:
        """Evaluation metrics that may decide which checkpoint is best. A registered metric of that name must say which way is
        better."""
        return ("loss",)

    generation_metrics: ClassVar[tuple[str, ...]] = ()
    """Those of `metrics` that are computed from generated texts (`evaluate.generate_rows`)."""

    def slice_metric(self, measured: Mapping[str, float]) -> str:
        """Return the metric that ranks subgroups if `evaluate.slice_metric` is unset. measured: the metrics of one subgroup."""
        return "loss"

    ranked_by: ClassVar[tuple[tuple[str, bool], ...]] = ()
    """Metrics that can rank untuned models (`dstune models --probe`), each with whether less is better. The first one that all
    models have decides."""

    # ---- model ----

    def model_class(self, architecture: PretrainedConfig) -> Any:
        """Return the class that loads the model, with transformers' `from_pretrained` and `from_config`."""
        raise NotImplementedError(f"task={self.name} has no model class")

    def architecture(
        self, architecture: PretrainedConfig, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Complete the model's configuration, which an export keeps. labels: the rows' labels; empty if they have none."""
        if labels:
            architecture.num_labels = len(labels)
            architecture.id2label = dict(enumerate(labels))
            architecture.label2id = {label: index for index, label in enumerate(labels)}
        if self.has_head:
            architecture.pad_token_id = tokenizer.pad_token_id

    def usage(self, export: Export) -> list[str]:
        """Return lines of Python that load and use an export, for its model card."""
        return export.loading(self.head_classes.removeprefix("For"))

    # ---- loss and evaluation ----

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        """Build the head, which computes the loss of a batch. It must be built before DeepSpeed adds its hooks to the model.

        rows: how a language model gets its rows; None if it gets them unchanged.
        """
        raise NotImplementedError(f"task={self.name} has no head")

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        """Return the metrics of an evaluation. outputs: the head's outputs for each sample of `split`, in its order; empty for
        language models."""
        raise NotImplementedError(f"task={self.name} has no metrics")
