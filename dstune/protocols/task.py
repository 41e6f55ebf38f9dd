"""What a task is: the rows it reads, the model and loss it trains, how it is measured, predicted and exported.

Everything is a function of the task's own configuration (`self.config`), since a regression, a tag scheme or a loss changes
the answer. Methods get the whole `RunConfig` where other sections matter. Only what a room keeps in its own `encode`, `head`,
`metrics` and `predict` modules may import torch: import them inside the methods below, so that the launcher stays light.
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

    name: str = ""


@dataclass(frozen=True)
class FurtherModel:
    """A model that a run reads beside the one it trains, by the names of two fields of the task's configuration."""

    path: str
    """Folder, hub id or sample; None where the run has no such model."""
    revision: str
    """Resolved to a commit before the ranks start."""


class Task:
    """Base of every task. Subclasses set `Config` and register with `@dstune.task`.

    Five members make a task; everything else has a default:

    - `formats`: the row formats that it reads.
    - `encoder(...)`: turns rows into tokenized samples.
    - `head(...)`: computes the loss of a batch.
    - `measure(...)`: makes metrics of what the head kept of held-out rows.
    - `predictor()`: answers rows without labels.

    What few tasks do is an optional protocol: a task has its methods or has not (`dstune.protocols.task_options`).
    docs/plugins.md explains what these methods take and return.
    """

    Config: ClassVar[type] = TaskConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    # ---- traits: what other parts of the program rule by, in place of the task's class ----

    language: ClassVar[bool] = False
    """The loss is the next-token loss of a language model, and heads keep nothing of single rows."""
    conversational: ClassVar[bool] = False
    """Rows are rendered with the chat template, where the model has one; the configuration has a `template_date`."""
    sees_images: ClassVar[bool] = False
    """Rows may hold images, which the model sees where it has a tower for them."""
    generates: ClassVar[bool] = False
    """The model writes text."""
    has_head: ClassVar[bool] = False
    """The model has a head of its own in place of the vocabulary's."""
    per_token: ClassVar[bool] = False
    """The head reads every token, not one vector of the row."""
    unpoolable: ClassVar[str] = "the task has no head of its own"
    """Why the head cannot read a pooled vector of the row; empty where it can."""
    row_loss: ClassVar[bool] = True
    """Every row has a loss of its own, which can be told apart by subgroups and compared with other texts of the row."""
    has_predictions: ClassVar[bool] = True
    """Its evaluations have what was predicted for each row (`Evaluation.predictions`), which metrics of plugins read."""
    comparable_loss: ClassVar[bool] = True
    """The losses of training and evaluation can be compared, however many rows a step has."""
    prefix_positions_ok: ClassVar[bool] = False
    """The head expects that trained positions may stand in front of the row."""
    unpackable: ClassVar[str] = "the task reads rows one by one"
    """Why rows are not packed; empty where they can be."""
    splits_long_rows: ClassVar[bool] = False
    """A row longer than `data.max_length` becomes several samples; nothing of it is cut off."""
    token_targets: ClassVar[bool] = False
    """Targets are tokens; those of other tasks are rows."""
    one_pass: bool = False  # of some tasks, by their keys
    """Each micro-batch goes through a decoder once, and with it through every layer."""
    countable_flops: ClassVar[bool] = True
    """The operations of a step follow from the lengths of its rows (`dstune.planning.flops`)."""
    splits_conversations: ClassVar[bool] = False
    """A row may be several samples, where a chat template rewrites its history; metrics count the row."""
    chunked: ClassVar[bool] = False
    """The samples that a long row becomes are measured together, as one row."""
    encoder_decoder: ClassVar[bool] = False
    """Encoder-decoders can be trained on it."""
    tensor_parallel: ClassVar[bool] = False
    """Held against a reference with weights that ranks share."""
    few_shot: ClassVar[bool] = False
    """An untuned language model can be asked for the answers, with worked examples in front."""
    same_label_when_reworded: ClassVar[bool] = False
    """A text that is changed a little keeps its label, so `data.augment` may add copies."""
    asks_by_prompt: ClassVar[bool] = False
    """The configuration has a `prompt` with a place for the source text."""
    low_learning_rate: ClassVar[bool] = False
    """Adapters are usually trained at a tenth of the rates of other tasks."""
    gives_probabilities: ClassVar[bool] = False
    """A prediction has a probability for each label."""
    serves: ClassVar[tuple[str, ...]] = ()
    """What `dstune serve` has routes for, of a task that writes no text: `embed`, `classify`, `rank`, `tag`, `answer`, `reward`."""
    predicts_from_text: ClassVar[bool] = True
    """A prediction needs a single text and nothing else."""
    metrics_read_rows: ClassVar[bool] = False
    """Metrics need the rows beside their samples."""
    texts_per_row: ClassVar[int] = 1
    """Sequences that the model reads for one row."""
    head_classes: ClassVar[str] = ""
    """How model classes of transformers that have the head are called at the end (`ForTokenClassification`)."""
    peft_type: ClassVar[str] = ""
    """The task's name in `peft.TaskType`; that of language models where empty."""
    pipeline: ClassVar[str] = "text-generation"
    """The pipeline of transformers and of the hub that a model is for."""
    unrecorded: ClassVar[tuple[str, ...]] = ()
    """Fields that an export does not repeat: they belong to the rows or to the machine of the training."""
    output: ClassVar[str] = "language model"
    """What stands on top of the model's body: a head that `dstune.planning.architecture` knows."""

    @property
    def whole_batch_loss(self) -> bool:
        """Whether the loss needs the whole step or a second model, so that one micro-batch alone gives no gradient."""
        return False

    @property
    def template_date(self) -> str | None:
        """The date that a chat template may print (YYYY-MM-DD), of conversational tasks."""
        return self.config.template_date if self.conversational else None

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """The run's arguments of the chat template, of conversational tasks."""
        return self.config.chat_template_kwargs if self.conversational else {}

    @property
    def every_position_is_a_target(self) -> bool:
        """Whether all positions of a row are projected onto the vocabulary."""
        return True

    @property
    def needs_answer(self) -> bool:
        """Whether a conversation has to have something that the assistant says."""
        return True

    choice_settings: ClassVar[Mapping[str, Any]] = {}
    """Of a plugin: what choosing the task sets in other sections, such as `{"data": {"packing": False}}`."""

    # ---- rows ----

    formats: ClassVar[tuple[str, ...]] = ()
    """Row formats that the task reads in some of its settings, the first that fits first."""

    @property
    def read_formats(self) -> tuple[str, ...]:
        """Those that it reads as it is configured."""
        return self.formats

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels whose names are to be found; the configuration may name them in `labels`."""
        return False

    @property
    def several_labels(self) -> bool:
        """Whether a row has any number of labels."""
        return False

    @property
    def given_labels(self) -> tuple[str, ...]:
        """The names of labels that the configuration gives, in the order of their indices; empty where they are found."""
        return tuple(self.config.labels) if self.has_labels else ()

    def row_key(self) -> dict[str, Any]:
        """Return the settings that samples depend on: part of the key under which they are cached."""
        key = asdict(self.config)
        if self.conversational:
            key.pop("template_date")  # counts only where the template prints it
        return key

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        """Return the encoder that turns rows into samples. Raises UserError if the tokenizer lacks what task and format need.

        fmt: where sources and parts have several formats, the first of `formats` among them; rows of the others come as well.
        """
        raise NotImplementedError(f"task={self.name} has no encoder")

    @classmethod
    def for_source(cls, main: TaskConfig, prompt: str | None) -> TaskConfig:
        """Return the configuration for a source of `data.mixture` with rows of this task, in a run of the task `main`."""
        is_same_task = isinstance(main, cls.Config)
        prompt = prompt if cls.asks_by_prompt else None
        if is_same_task and prompt is None:
            return main
        # Not `replace`: rules read the configuration through a view, which is no dataclass.
        values = {field.name: getattr(main, field.name) for field in fields(cls.Config)} if is_same_task else {}
        if cls.conversational:
            of_template = ("template_date", "chat_template_kwargs")
            values |= {key: getattr(main, key) for key in of_template if hasattr(main, key)}
        return cls.Config(**values | ({} if prompt is None else {"prompt": prompt}))

    # ---- configuration ----

    frozen_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that the first start of a run fills in, and every later start takes over."""

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what the settings of the task and the other sections may not say together."""
        return iter(())

    def resolve(self, today: str) -> TaskConfig:
        """Return the configuration with what depends on the day of composition (YYYY-MM-DD) filled in."""
        if self.conversational and self.config.template_date is None:
            return replace(self.config, template_date=today)
        return self.config

    # ---- prediction ----

    def question(self, labels: Sequence[str], data: DataConfig) -> Question:
        """Return the reader of the columns that predictions need. labels: of the model, in their order. data: `columns` and
        `format` as in training."""
        return self.predictor().question_class(self.config, labels, data)

    def predictor(self) -> type[Predictor]:
        """Return the class that turns rows into predictions, by a model in memory."""
        raise NotImplementedError(f"task={self.name} predicts nothing")

    # ---- metrics ----

    @property
    def metrics(self) -> tuple[str, ...]:
        """Evaluation metrics that may decide which checkpoint is best, if one registered by that name says which way is better."""
        return ("loss",)

    generation_metrics: ClassVar[tuple[str, ...]] = ()
    """Those of `metrics` for which targets are generated (`evaluate.generate_rows`)."""

    def slice_metric(self, measured: Mapping[str, float]) -> str:
        """Return the metric that tells the worst subgroup where `evaluate.slice_metric` names none. measured: of one of them."""
        return "loss"

    ranked_by: ClassVar[tuple[tuple[str, bool], ...]] = ()
    """Metrics that rank untuned models (`dstune models --probe`), the first that all have, and whether less is better."""

    # ---- model ----

    def model_class(self, architecture: PretrainedConfig) -> Any:
        """Return the class of transformers, with `from_pretrained` and `from_config`."""
        raise NotImplementedError(f"task={self.name} has no model class")

    def architecture(
        self, architecture: PretrainedConfig, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Complete the model's configuration, which an export keeps. labels: of the rows, empty where they have none."""
        if labels:
            architecture.num_labels = len(labels)
            architecture.id2label = dict(enumerate(labels))
            architecture.label2id = {label: index for index, label in enumerate(labels)}
        if self.has_head:
            architecture.pad_token_id = tokenizer.pad_token_id

    def usage(self, export: Export) -> list[str]:
        """Return lines of Python that load an export and use it, for its model card."""
        return export.loading(self.head_classes.removeprefix("For"))

    # ---- loss and evaluation ----

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        """Build the head, which computes the loss of a batch; must be built before DeepSpeed puts its own hooks on the model.

        rows: how a language model gets its rows, where not as they are.
        """
        raise NotImplementedError(f"task={self.name} has no head")

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        """Return the metrics of an evaluation. outputs: of each sample of `split`, in its order; empty for language models."""
        raise NotImplementedError(f"task={self.name} has no metrics")
