"""The typed configuration of `method`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


class Pooling(Enum):
    model = "model"
    cls = "cls"
    mean = "mean"
    last = "last"


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """All weights are trained.

    The most accurate where there are enough rows and memory: gradients and optimizer states of every weight.
    """

    name: str = "full"
    layer_decay: float = setting(1.0, above=0.0, at_most=1.0)
    """Rate of a layer as a share of that of the layer above it (arXiv:1801.06146, arXiv:2003.10555); 1 is one rate for all."""


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
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


class LoraInit(Enum):
    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    olora = "olora"
    loftq = "loftq"


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """What every method of peft has: a few new parameters beside frozen weights."""

    name: str = ""
    adapter: str | None = None
    """Start from this adapter: an export, or a run with one in `export/`. Its own settings replace those not given here."""


@dataclass(frozen=True)
class ModuleAdapterConfig(AdapterConfig):
    """Adapters on modules of the model."""

    target_modules: list[str] = setting(["all-linear"])
    """Module name endings that get an adapter; `all-linear` is every linear layer except the head."""
    modules_to_save: list[str] = setting([])
    """Modules trained whole and saved beside the adapter (a new classification head always is)."""


@dataclass(frozen=True)
class LoraConfig(ModuleAdapterConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights.

    The default: near full fine-tuning at a fraction of its memory, and an adapter of a few MB that merges into the model.
    DoRA helps low ranks, PiSSA and OLoRA a fast start; rank-stabilised scaling is for high ranks.
    """

    name: str = "lora"
    rank: int = setting(16, at_least=1)
    """Rank of the update matrices."""
    alpha: float = setting(32.0, above=0.0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    rank_pattern: dict[str, int] = setting({})
    """Other ranks by ending of the module's name, or regular expression: `{q_proj: 32, 'layers.0.mlp.*': 4}`."""
    alpha_pattern: dict[str, float] = setting({})
    """Other values of `alpha`, by module like `rank_pattern`."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed: direction by the adapter, a trained magnitude for each output (Liu et al. 2024, arXiv:2402.09353)."""
    init: LoraInit = LoraInit.default
    """First values: `default` and `gaussian` (B is zero), `pissa` (arXiv:2404.02948) and `olora` (arXiv:2406.01775), which
    split each weight into the adapter and a frozen rest, and with qlora `loftq` (arXiv:2310.08659), which makes up for what
    rounding took."""
    init_iterations: int | None = setting(None, at_least=1)
    """With `init=pissa`: subspace iterations of a randomised SVD, for large models; the exact SVD when not given."""
    lr_ratio: float = setting(1.0, above=0.0)
    """LoRA+: the rate of B as a multiple of that of A, for example 16 (Hayou et al. 2024, arXiv:2402.12354)."""
    frozen_adapters: list[str] = setting([])
    """Finished LoRA adapters (exports or runs) on which the new one is trained: the export holds their sum."""


@dataclass(frozen=True)
class FeaturesConfig(MethodConfig):
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
class FreezeConfig(MethodConfig):
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
class UlmfitConfig(MethodConfig):
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
class ImportanceConfig(MethodConfig):
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


@dataclass(frozen=True)
class QloraConfig(LoraConfig):
    """Low-rank adapters on frozen weights that are kept in 4-bit NF4 (Dettmers et al. 2023, arXiv:2305.14314).

    Where the frozen weights do not fit otherwise: a quarter of 16 bits, for slower steps and a small loss of accuracy.
    """

    name: str = "qlora"
    double_quantization: bool = True
    """Quantize the scales of the blocks of 64 weights as well: 4.13 instead of 4.5 bits a weight."""


@dataclass(frozen=True)
class Ia3Config(ModuleAdapterConfig):
    """A trained scale for each key, value and feed-forward feature (Liu et al. 2022, arXiv:2205.05638).

    For few rows, or thousands of adapters on one model: a hundredth of LoRA's parameters, and it merges.
    """

    name: str = "ia3"
    target_modules: list[str] = setting([])
    """Module name endings that are scaled; peft's choice for the architecture when empty (llama: k_proj, v_proj, down_proj)."""
    feedforward_modules: list[str] = setting([])
    """Those of `target_modules` whose inputs are scaled instead of their outputs; peft's choice with them."""


@dataclass(frozen=True)
class VeraConfig(ModuleAdapterConfig):
    """Two trained vectors for each module between fixed random matrices shared by all (Kopiczko et al. 2023, arXiv:2310.11454).

    For many small adapters: a tenth of LoRA's parameters at a higher rank; the shared matrices are saved with each.
    """

    name: str = "vera"
    rank: int = setting(256, at_least=1)
    """Rows of the shared matrices; more than with LoRA, since each costs one trained number a module."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    first_scale: float = setting(0.1, above=0.0)
    """First value of the vector between the two matrices."""
    projection_seed: int = setting(0, at_least=0)
    """Seed of the shared matrices; they are saved with the adapter."""


@dataclass(frozen=True)
class OftConfig(ModuleAdapterConfig):
    """Orthogonal rotations of the modules' inputs, block by block (Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847).

    Where the geometry of pretrained features has to survive: angles between neurons stay as they are.
    """

    name: str = "oft"
    block_size: int = setting(32, at_least=2)
    """Features rotated together; where it does not divide a module's inputs, peft takes the nearest size that does."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Share of the blocks that do not rotate in a forward pass."""
    block_share: bool = False
    """One rotation for all blocks of a module."""
    exact: bool = False
    """Cayley transform by solving instead of five terms of its series: exactly orthogonal, and slower."""


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """Trained token embeddings in front of every row (Lester et al. 2021, arXiv:2104.08691).

    For one served copy of a large model and a prompt for each task; small models learn little from it.
    """

    name: str = "prompt"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the trained prompt; it comes on top of `data.max_length`."""
    init_text: str | None = None
    """Begin with the embeddings of this text, repeated or cut to the length; with those of random tokens when not given."""


@dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """Trained keys and values in front of every layer's own (Li and Liang 2021, arXiv:2101.00190).

    As `prompt`, with a say in every layer; decoders only.
    """

    name: str = "prefix"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the prefix."""
    projection_size: int | None = setting(None, at_least=1)
    """Train the prefix through a two-layer network of this width; as it is when not given."""


class PTuningEncoder(Enum):
    mlp = "mlp"
    lstm = "lstm"


@dataclass(frozen=True)
class PTuningConfig(AdapterConfig):
    """A trained prompt that comes out of a small network (Liu et al. 2021, arXiv:2103.10385).

    As `prompt`, easier to train; the network is not exported, so an export is served but not trained on.
    """

    name: str = "p_tuning"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the trained prompt; it comes on top of `data.max_length`."""
    encoder: PTuningEncoder = PTuningEncoder.mlp
    """The network: three linear layers, or an LSTM in front of two."""
    encoder_size: int = setting(128, at_least=1)
    """Its width."""
    encoder_layers: int = setting(2, at_least=1)
    """Layers of the LSTM."""
    encoder_dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout between the layers of the LSTM."""
