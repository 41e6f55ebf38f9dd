"""The typed configuration of `task`: what rows hold, and what loss and metrics are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


class Turns(Enum):
    auto = "auto"
    all = "all"
    last = "last"


class Reasoning(Enum):
    keep = "keep"
    drop = "drop"


@dataclass(frozen=True)
class ChatConfig(TaskConfig):
    """Conversations; the loss is on the assistant's tokens, the end of each turn included."""

    name: str = "chat"
    template_date: str | None = None
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    train_on_prompt: bool = False
    """Let every token count in the loss, not only those of the assistant."""
    turns: Turns = Turns.auto
    """Which of the assistant's turns are trained: `auto` (every one, or those that the template marks with
    `{% generation %}`), `all`, or `last`."""
    reasoning: Reasoning = Reasoning.keep
    """`keep` what the assistant thinks before it answers, or `drop` it from every message."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them. Where nobody
    says, the model is told to think in turns that have reasoning."""


@dataclass(frozen=True)
class CausalLmConfig(TaskConfig):
    """Plain text; the loss is on every token and on the end of each document."""

    name: str = "causal_lm"


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """A label, or several, for a text or a pair of texts."""

    name: str = "classification"
    labels: list[str] = setting([])
    """Label names in the order of their indices; found in the training rows when empty."""
    multi_label: bool = False
    """Any number of labels for a row, each decided by itself (binary cross entropy, threshold 0.5)."""
    regression: bool = False
    """The label is a number that the model predicts (mean squared error)."""
    class_weights: dict[str, float] = setting({})
    """How much the rows of a class count in the loss, by its name; 1 where it is not named."""
    balanced: bool = False
    """Let all classes count alike: a row counts rows / (classes * rows of its class), as in scikit-learn."""
    focal_gamma: float = setting(0.0, at_least=0.0)
    """Above 0 the focal loss (Lin et al. 2017, arXiv:1708.02002): rows that the model is sure of count less."""


class PreferenceLoss(Enum):
    dpo = "dpo"
    ipo = "ipo"
    kto = "kto"
    orpo = "orpo"
    simpo = "simpo"


class Reference(Enum):
    auto = "auto"
    cached = "cached"


@dataclass(frozen=True)
class PreferenceConfig(TaskConfig):
    """Two answers to a prompt, the better one first (with `kto` single answers, good or bad)."""

    name: str = "preference"
    loss: PreferenceLoss = PreferenceLoss.dpo
    """`dpo`, `ipo`, `kto` (against a reference model), `orpo` or `simpo` (without one)."""
    beta: float | None = setting(None, above=0.0)
    """Weight of the log-probability ratios, of the odds ratio with `orpo`; 0.1, and 2 with `simpo`, when not given."""
    label_smoothing: float = setting(0.0, at_least=0.0, below=0.5)
    """Share of pairs taken to be the wrong way round (`dpo` only)."""
    gamma: float = setting(1.0, at_least=0.0)
    """By how much the better answer has to win (`simpo` only), on the scale of beta times the log-probability."""
    desirable_weight: float = setting(1.0, above=0.0)
    """Weight of the loss of good answers (`kto` only)."""
    undesirable_weight: float = setting(1.0, above=0.0)
    """Weight of the loss of bad answers (`kto` only)."""
    reference: Reference = Reference.auto
    """`auto`: the model without its new adapter, else computed once before training (`cached`)."""
    reference_model: str | None = None
    """Another model as the reference (folder, hub id, sample); the model that training starts from when not given."""
    reference_revision: str | None = None
    """Branch, tag or commit of `reference_model` on the hub; resolved to a commit before the ranks start."""
    template_date: str | None = None
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""

    @property
    def single(self) -> bool:
        """Whether a sample is one answer, good or bad, instead of a pair."""
        return self.loss is PreferenceLoss.kto

    @property
    def compares(self) -> bool:
        """Whether the loss needs the log-probabilities of a reference model."""
        return self.loss in (PreferenceLoss.dpo, PreferenceLoss.ipo, PreferenceLoss.kto)


@dataclass(frozen=True)
class RewardConfig(TaskConfig):
    """A score for an answer, learnt from pairs of a better and a worse one."""

    name: str = "reward"
    template_date: str | None = None
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""


class Pooling(Enum):
    mean = "mean"
    cls = "cls"
    last = "last"


@dataclass(frozen=True)
class EmbeddingConfig(TaskConfig):
    """A vector for a text, learnt from texts that belong together; all others of a step are what does not."""

    name: str = "embedding"
    pooling: Pooling = Pooling.mean
    """What of the last layer is the text's vector: the `mean` of its tokens, the first (`cls`) or the `last` one."""
    temperature: float = setting(0.05, above=0.0)
    """Cosines are divided by it; a lower one looks at the nearest texts more."""
    symmetric: bool = False
    """Let positives find their anchors as well."""


class TagScheme(Enum):
    auto = "auto"
    bio = "bio"
    plain = "plain"


class TrainedSubwords(Enum):
    first = "first"
    all = "all"


@dataclass(frozen=True)
class TokenClassificationConfig(TaskConfig):
    """A tag for each word: named entities, parts of speech."""

    name: str = "token_classification"
    labels: list[str] = setting([])
    """Tag names in the order of their indices; found in the training rows when empty. Names tags that are numbers."""
    scheme: TagScheme = TagScheme.auto
    """`bio`: entities by B- and I- tags, which are checked; `plain`: any tags; `auto`: `bio` where all tags look so."""
    repair: bool = False
    """Let an I- tag that continues no entity begin one (as in IOB1), where the row would else be a bad row."""
    subwords: TrainedSubwords = TrainedSubwords.first
    """Sub-words of a word that count in the loss; metrics count the first one only."""
    stride: int = setting(64, at_least=0)
    """Sub-words that windows of a sentence longer than `data.max_length` have in common; at most half a window."""


@dataclass(frozen=True)
class QuestionAnsweringConfig(TaskConfig):
    """The answer to a question as a span of a text (SQuAD, Rajpurkar et al. 2016 and 2018)."""

    name: str = "question_answering"
    no_answer: bool = False
    """Some questions have no answer in their text, as in SQuAD 2: the model has to tell so."""
    threshold: float = 0.0
    """With `no_answer`: how much more than the best span, in logits, having no answer has to score to be predicted."""
    max_answer_tokens: int = setting(30, at_least=1)
    """Longest span that is predicted, in tokens."""
    stride: int = setting(128, at_least=0)
    """Tokens of a long text that two windows of it have in common; at most half of what has room beside the question."""


@dataclass(frozen=True)
class Seq2SeqConfig(TaskConfig):
    """A target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

    name: str = "seq2seq"
    prompt: str = "{source}"
    """What the model reads, `{source}` in it: `"Translate to Spanish: {source}"`."""
    chat: bool = True
    """A decoder with a chat template is asked through it; else the target follows the prompt and `separator`."""
    separator: str = "\n"
    """Between prompt and target where a decoder is asked without a chat template."""
    template_date: str | None = None
    """The date that a chat template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    max_target_length: int | None = setting(None, at_least=2)
    """Longest target in tokens, its end included; `data.max_length` when not given. Longer ones are cut."""
    max_new_tokens: int | None = setting(None, at_least=1)
    """Longest generated target; when not given a quarter more than the longest target among the evaluated rows."""


CONVERSATIONS = (ChatConfig, PreferenceConfig, RewardConfig, Seq2SeqConfig)
"""Tasks whose rows are rendered with the chat template, where the model has one."""

WRITERS = (ChatConfig, CausalLmConfig, PreferenceConfig, Seq2SeqConfig)
"""Tasks whose models write text."""

HEADED = (ClassificationConfig, RewardConfig, TokenClassificationConfig, QuestionAnsweringConfig)
"""Tasks whose models have a head of their own in place of the vocabulary's."""

DEFAULT_BETA = {PreferenceLoss.simpo: 2.0}
"""By loss; 0.1 for the others."""


def beta_of(task: PreferenceConfig) -> float:
    """`task.beta`, or what the loss uses where it is not given."""
    return task.beta if task.beta is not None else DEFAULT_BETA.get(task.loss, 0.1)
