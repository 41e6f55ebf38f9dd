"""The typed configuration of `method`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting


class Pooling(Enum):
    model = "model"
    cls = "cls"
    mean = "mean"
    last = "last"


@dataclass(frozen=True)
class FullConfig:
    """All weights are trained.

    The most accurate where there are enough rows and memory: gradients and optimizer states of every weight.
    """

    name: str = "full"
    layer_decay: float = setting(1.0, above=0.0, at_most=1.0)
    """Rate of a layer as a share of that of the layer above it (arXiv:1801.06146, arXiv:2003.10555); 1 is one rate for all."""


@dataclass(frozen=True)
class HeadConfig:
    """Only the task's head is trained; the body stays frozen.

    For few rows, or a body that knows the task's language well already. The body runs forward only; every epoch runs it
    again, with dropout, which `features` does not. A head with a pooling of its own is exported with its code
    (`modeling_dstune.py`): dstune loads it as it is, plain transformers with `trust_remote_code=True`.
    """

    name: str = "head"
    pooling: Pooling = Pooling.model
    """What the head reads: `cls` the first token, `mean` of all, `last` token; `model` is the architecture's own head."""
    layers: int = setting(0, at_least=0)
    """Dense layers between pooling and classes."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of each layer of the head."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights."""

    name: str = "lora"
    rank: int = setting(16, at_least=1)
    """Rank of the update matrices."""
    alpha: float = setting(32.0, above=0.0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    target_modules: list[str] = setting(["all-linear"])
    """Module name endings that get an adapter; `all-linear` is every linear layer except the head."""
    modules_to_save: list[str] = setting([])
    """Modules trained whole and saved beside the adapter (a new classification head always is)."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The frozen body reads every row once; a classifier is trained on what it gave, from the cache.

    For many epochs, many tries of a classifier, or no GPU: after the first epoch the body does not run. Beside the
    classifier, scikit-learn's logistic regression and a random forest, which ranks the features by impurity (Breiman 2001).
    Exported like `head`.
    """

    name: str = "features"
    pooling: Pooling = Pooling.mean
    """What the classifier reads: `cls` the first token's state, `mean` of all, `last` token's."""
    layers: int = setting(0, at_least=0)
    """Dense layers between pooling and classes."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of each layer of the classifier."""
    logistic_regression: bool = False
    """Fit scikit-learn's logistic regression on the same features too, and report it."""
    random_forest: bool = False
    """Fit a random forest on the same features too, and report it with its ranking of the features by impurity."""
    trees: int = setting(200, at_least=1)
    """Trees of the random forest."""


@dataclass(frozen=True)
class FreezeConfig:
    """A part of the weights stays as it is: embeddings, layers, or what a regular expression finds.

    Between `head` and `full`: saves gradients and optimizer states of what is frozen, and keeps it to the bit.
    """

    name: str = "freeze"
    embeddings: bool = False
    """Freeze what is below the first layer: token and position embeddings, a tied vocabulary projection."""
    first_layers: int = setting(0, at_least=0)
    """Freeze this many layers from the bottom."""
    last_layers: int = setting(0, at_least=0)
    """Freeze this many layers from the top."""
    parameters: list[str] = setting([])
    """Freeze the parameters whose name one of these regular expressions finds: `[mlp, 'layers\\.[0-3]\\.']`."""
    trained: list[str] = setting([])
    """Regular expressions of what is trained although the other keys freeze it: `[norm, bias$]`."""
    layer_decay: float = setting(1.0, above=0.0, at_most=1.0)
    """Rate of a layer as a share of that of the layer above it; 1 is one rate for all."""


@dataclass(frozen=True)
class UlmfitConfig:
    """Gradual unfreezing from the top, a lower rate for each layer below (Howard and Ruder 2018, arXiv:1801.06146).

    For few rows, and against forgetting: lower layers move late and little. With `schedule=slanted_triangular` these are the
    three techniques of the paper. All weights have optimizer states from the start.
    """

    name: str = "ulmfit"
    rate_factor: float = setting(2.6, at_least=1.0)
    """The rate of a layer is that of the layer above it divided by this."""
    unfreeze_epochs: float = setting(1.0, at_least=0.0)
    """Passes over the rows before the next layer begins to train; 0 trains all from the start."""
    unfreeze_steps: int | None = setting(None, at_least=1)
    """Optimizer steps before the next layer begins to train; replaces `unfreeze_epochs` when given."""
    layers_at_once: int = setting(1, at_least=1)
    """Layers that begin to train together, for deep models."""
    language_model_epochs: int = setting(0, at_least=0)
    """Passes over the texts of the rows as a language model before the classifier is trained; decoders only."""
    language_model_lr: float | None = setting(None, above=0.0)
    """Peak learning rate of that stage; `optimizer.lr` when not given."""


class Selection(Enum):
    squared_gradient = "squared_gradient"
    gradient_weight = "gradient_weight"
    movement = "movement"
    ablation = "ablation"
    magnitude = "magnitude"
    random = "random"


class Unit(Enum):
    entries = "entries"
    tensors = "tensors"


@dataclass(frozen=True)
class ImportanceConfig:
    """Only the most important share of the weights is trained, the others keep every bit; the scores are reported.

    To learn which weights a task needs, and to change few of them. Scores by gradients are compared with ablation (rank
    correlation in importance.json and in the report). Single entries save no memory; whole tensors do.
    """

    name: str = "importance"
    selection: Selection = Selection.gradient_weight
    """Score: squared gradient, |gradient x weight| (arXiv:1611.06440), movement (arXiv:2005.07683), loss without it (ablation);
    magnitude and random to compare with."""
    unit: Unit = Unit.entries
    """Choose single entries, by a mask, or whole tensors, which saves gradients and optimizer states as well."""
    share: float = setting(0.1, above=0.0, below=1.0)
    """Share of the pretrained weights that is trained; new weights (a head) always are."""
    score_steps: int = setting(8, at_least=1)
    """Optimizer steps of a throw-away training along which gradients are scored."""
    ablation_rows: int = setting(0, at_least=0)
    """Validation rows on which each tensor is left out in turn and the loss of it is measured; 0 leaves it out."""


MethodConfig = FullConfig | ImportanceConfig | HeadConfig | FeaturesConfig | FreezeConfig | UlmfitConfig | LoraConfig

METHODS: dict[str, type] = {
    "full": FullConfig,
    "head": HeadConfig,
    "features": FeaturesConfig,
    "freeze": FreezeConfig,
    "ulmfit": UlmfitConfig,
    "importance": ImportanceConfig,
    "lora": LoraConfig,
}
"""Classes of the group by the name of the choice."""
