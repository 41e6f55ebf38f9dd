"""The tensors of a model, and what memory and time depend on beside them."""

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
    """Share of the positions that are multiplied by it: all by a linear layer, by an expert those that are sent to it."""

    @cached_property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """What memory and time depend on."""

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
    """DeBERTa: scores of positions are added to those of content, whole matrices of them."""
    window: int | None = None
    """Sliding window of attention in tokens, of `windowed_layers` layers."""
    windowed_layers: int = 0
    soft_capped: bool = False
    experts: int = 0
    """Experts that a position is sent to in a feed-forward layer that is made of them; `intermediate` is that of all of these
    together."""
    expert_pattern: str = ""
    """As which of its patterns peft adapts the experts; by `kind` where empty."""
    unadapted: tuple[str, ...] = ()
    """Linear layers by their last name on which peft puts no low-rank matrices."""
    unreached: int | None = None
    """Weights that rows of text never reach, beside `tensors`; None where they are not counted (`planning.towers`)."""

    @property
    def is_counted(self) -> bool:
        """Whether transformers listed the tensors, for want of a closed form (`planning.counted`)."""
        return self.unreached is not None

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors)

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
