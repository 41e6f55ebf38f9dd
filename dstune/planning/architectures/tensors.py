"""The tensors of a model, and the other properties that determine memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

LANGUAGE_MODEL = "language model"
CLASSIFIER = "classifier"
TOKEN_CLASSIFIER = "token classifier"
BODY = "body"


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    """The weight of a linear layer, which an adapter may wrap."""
    layer: int | None = None
    """Index of the block it belongs to; None for embeddings, the last norm and the head."""
    used: float = 0.0
    """Share of the positions that are multiplied by it: all for a linear layer; for an expert, those sent to it."""

    @cached_property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """The properties of a model that determine memory and time."""

    kind: str
    """`model_type` of config.json."""
    tensors: tuple[Tensor, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    """A feed-forward layer of gate, up and down projection."""
    tied: bool
    """The vocabulary projection is the embedding's weight."""
    norms: int
    """Norms over the hidden size in a layer."""
    query_norm: bool = False
    encoder: bool = False
    encoder_decoder: bool = False
    relative_attention: bool = False
    """DeBERTa: full matrices of position scores are added to the content scores."""
    window: int | None = None
    """Sliding window of attention in tokens, of `windowed_layers` layers."""
    windowed_layers: int = 0
    soft_capped: bool = False
    experts: int = 0
    """Experts that a position is sent to in a layer with experts; `intermediate` is the width of all of these together."""
    expert_pattern: str = ""
    """The pattern by which peft adapts the experts; empty selects it by `kind`."""
    unadapted: tuple[str, ...] = ()
    """Last names of linear layers to which peft adds no low-rank matrices."""
    unreached: int | None = None
    """Weights, not in `tensors`, that rows of text never use; None if they are not counted (`planning.towers`)."""

    @property
    def is_counted(self) -> bool:
        """Whether transformers listed the tensors, because there is no closed form (`planning.counted`)."""
        return self.unreached is not None

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the experts, the share that it is sent to."""
        experts = [tensor for tensor in self.tensors if len(tensor.shape) == 3 and 0 < tensor.used < 1]
        return self.parameters - sum(round(tensor.count * (1 - tensor.used)) for tensor in experts)

    def of_layer(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.layer == index)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        counts: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.layer is not None:
                counts[tensor.layer] = counts.get(tensor.layer, 0) + tensor.count
        return max(counts.values(), default=0)


class Collector:
    """Collects tensors in the order of `named_parameters()`."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = False, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (outputs, inputs), linear=True, layer=layer, used=1.0))
        if bias:
            self.found.append(Tensor(f"{name}.bias", (outputs,), layer=layer))

    def table(self, name: str, rows: int, width: int, *, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (rows, width), layer=layer))

    def experts(self, at: str, count: int, chosen: int, inner: int, hidden: int, *, layer: int) -> None:
        """Add a router and the experts behind it, whose weights transformers stacks."""
        self.found.append(Tensor(f"{at}.gate.weight", (count, hidden), layer=layer, used=1.0))
        for name, shape in (("gate_up_proj", (count, 2 * inner, hidden)), ("down_proj", (count, hidden, inner))):
            self.found.append(Tensor(f"{at}.experts.{name}", shape, layer=layer, used=chosen / count))

    def norm(self, name: str, width: int, *, bias: bool = False, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (width,), layer=layer))
        if bias:
            self.found.append(Tensor(f"{name}.bias", (width,), layer=layer))
