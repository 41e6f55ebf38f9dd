"""Derives the numbers that memory and time depend on from a `RunConfig`, an architecture and the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dstune.config.architectures import row_limit
from dstune.config.schema import (
    Attention,
    GradientDtype,
    Offload,
    OptimizerOffload,
    Precision,
    RunConfig,
    Selective,
    stage_of,
)
from dstune.config.zero_rules import SWAPPED_AT_ONCE, copy_ranks, overlaps
from dstune.core.errors import UserError
from dstune.planning.architecture import DEFAULTS, Architecture, Tensor, sliced
from dstune.planning.vision import Images, Tower
from dstune.protocols import Method, method_of, optimizer_of, parallelism_of, task_of
from dstune.protocols.method_options import PutsPositionsInFront, QuantizesWeights
from dstune.protocols.task_options import TrainsOnRollouts

CLASSES_UNKNOWN = 2
"""Number of classes assumed if the labels are only found in the rows: a head of a few thousand weights."""

SCALE_BITS_OF_64 = 9
"""Bits for the scale of 64 rounded weights: 8 with double quantization, and 32 for each 256 scales (Dettmers et al. 2023,
arXiv:2305.14314, section 3), rounded up."""

PADDING = 8
"""Rows without packing are padded to a multiple of this."""


@dataclass(frozen=True)
class HeldModel:
    """A model that a rank holds in addition to the trained one, for forward passes only."""

    name: str
    """Name of its part of the memory."""
    model: Architecture
    unreached: int = 0
    """See `Setup.unreached`."""


@dataclass(frozen=True)
class Setup:
    """One way to train one model."""

    model: Architecture
    trained: tuple[Tensor, ...]
    frozen: int
    """Number of weights that are not trained."""
    stage: int
    offload_optimizer: bool
    swaps: bool
    """Whether offloaded optimizer states are on a disk, except for those that are being updated."""
    swapped_at_once: int
    """Size of a sub-group of these states: tensors are added to it until it has at least this many elements."""
    offload_param: bool
    weight_bytes: int
    """Bytes of a weight in the model: 2 or 4."""
    frozen_bits: int
    """Bits of a frozen weight that the method rounds: 4 for QLoRA, otherwise as many as a trained one."""
    moments: int
    """Optimizer tensors per weight, in addition to the fp32 weight: 2 for Adam."""
    state_bytes: float
    """Average bytes of optimizer states per trained weight: 8 for Adam."""
    ranks: int
    """Ranks that partition the same weights: all ranks, or one of each group that shares weights."""
    ranks_per_node: int
    on_gpu: bool
    micro_batch_size: int
    texts: int
    """Sequences that the model reads for one row of the data: two for pairs."""
    length: int
    """Tokens of the longest row."""
    global_batch_size: int
    attention: str
    """`sdpa`, `eager`, `flash_attention_2` (any kernel without a mask), or `samples` (attention sample by sample)."""
    checkpointing: bool | Selective
    tiles: int
    """Number of pieces in which feed-forward layers are computed. The backward pass recomputes each piece."""
    adapter: bool
    target_share: float
    """Share of the positions that are projected onto the vocabulary."""
    dropout: float
    adapter_dropout: bool
    reduce_bucket: int
    overlaps: bool
    """See `config.zero_rules.overlaps`."""
    persistence: int
    prefetch_bucket: int
    max_live: int
    max_reuse: int
    evaluation_batch: int | None
    """Rows of a forward pass in evaluations; None for the micro-batch size of training."""
    copy_ranks: int = 1
    """Ranks of a node that share a second copy of the weights; 1 for no copy."""
    sharing: int = 1
    """Ranks that share the positions of a row."""
    slices: int = 1
    """Ranks that share the weights of each layer; `model` and `trained` describe one rank's slice."""
    unreached: int = 0
    """Number of weights outside the language model (`model`), which rows of text never use: no rank trains or gathers them."""
    answers: int = 1
    """Texts that the model writes for a row before it trains on them. A micro-batch then consists of these texts instead of
    rows."""
    written: int = 0
    """Maximum tokens of each such text; 0 if the model writes none."""
    rounded: int = 0
    """Number of frozen weights that the method rounds to `frozen_bits`: those of linear layers in blocks. The other frozen
    weights (embeddings, norms, the projection to the vocabulary) are stored like trained ones."""
    own_sums: bool = False
    """Whether gradients are summed in the weights' half precision (`zero.gradient_dtype=model`)."""
    held: tuple[HeldModel, ...] = ()
    tower: Tower | None = None
    """The vision tower of a model that reads images. Its weights are in `unreached` or, if it is trained, in `trained`."""

    @property
    def images_of_row(self) -> Images | None:
        """Images of a row; None if rows are assumed to have none."""
        return self.tower.images if self.tower else None

    @property
    def images(self) -> int:
        """Number of images in a micro-batch."""
        return self.rows * self.images_of_row.in_row if self.images_of_row else 0

    @property
    def patches(self) -> int:
        """Number of patches of all images in a micro-batch."""
        return self.images * self.images_of_row.patches if self.images_of_row else 0

    @property
    def trained_count(self) -> int:
        return sum(tensor.count for tensor in self.trained)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of all frozen weights, those that text never reaches included."""
        whole = (self.frozen + self.unreached - self.rounded) * self.weight_bytes
        return whole + (self.rounded * self.frozen_bits + self.rounded * SCALE_BITS_OF_64 // 64) // 8

    @property
    def total(self) -> int:
        """Number of trained and frozen weights, including adapters."""
        return self.trained_count + self.frozen

    @property
    def rows(self) -> int:
        """Number of sequences that the model reads in one micro-batch."""
        return self.micro_batch_size * self.texts

    @property
    def tokens(self) -> int:
        """Number of positions that a rank computes in one micro-batch."""
        return self.rows * ceil(self.length / self.sharing)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a rank in one optimizer step."""
        return ceil(ceil(self.global_batch_size * self.answers / self.micro_batch_size) / self.groups)

    @property
    def groups(self) -> int:
        """Number of ranks with different rows; ranks that share rows or weights count as one."""
        return max(1, self.ranks // self.sharing)


def head_of(config: RunConfig) -> str:
    return task_of(config.task).output


def labels_of(config: RunConfig) -> int:
    return len(task_of(config.task).given_labels) or CLASSES_UNKNOWN


def added_length(method: Method) -> int:
    """Return how many positions `method` puts in front of each row that pass through every layer."""
    return method.added_length if isinstance(method, PutsPositionsInFront) else 0


def setup(
    config: RunConfig,
    model: Architecture,
    *,
    ranks: int,
    ranks_per_node: int,
    on_gpu: bool,
    precision: Precision,
    values: dict[str, Any],
) -> Setup:
    """Return the numbers that memory and time of a run depend on.

    model: the architecture before ranks share its weights. precision: resolved, never `auto`. values: the model's `config.json`,
    for its dropout and its limit on positions.

    Raises UserError if the method cannot train this architecture.
    """
    method = method_of(config.method)
    if (problem := method.architecture_problem(model)) is not None:
        raise UserError(problem)
    slices = parallelism_of(config.parallel).weight_ranks
    model = sliced(model, slices) if slices > 1 else model
    trained, frozen = method.trained(model)
    weight_bytes = 4 if precision is Precision.fp32 else 2
    zero = config.zero
    zero_settings = zero.settings.get("zero_optimization", {})
    length = _row_length(config, values) + added_length(method)
    values = DEFAULTS.get(model.kind, {}) | values
    ahead, live = prefetch(model) if on_gpu else (PREFETCH, LIVE)
    return Setup(
        model=model,
        trained=trained,
        frozen=frozen,
        stage=stage_of(zero),
        offload_optimizer=zero.offload_optimizer is not OptimizerOffload.none and stage_of(zero) > 0,
        swaps=zero.offload_optimizer is OptimizerOffload.nvme and stage_of(zero) == 3,
        swapped_at_once=zero_settings.get("sub_group_size", SWAPPED_AT_ONCE),
        offload_param=zero.offload_param is not Offload.none and stage_of(zero) == 3,
        weight_bytes=weight_bytes,
        frozen_bits=method.frozen_bits(weight_bytes) if isinstance(method, QuantizesWeights) else 8 * weight_bytes,
        moments=optimizer_of(config.optimizer).states_per_parameter,
        state_bytes=_state_bytes(config, trained),
        ranks=max(1, ranks // slices),
        ranks_per_node=ranks_per_node,
        on_gpu=on_gpu,
        micro_batch_size=config.trainer.rows,
        texts=task_of(config.task).texts_per_row,
        length=length,
        global_batch_size=config.trainer.global_batch_size,
        attention=_attention(config, model, values, on_gpu=on_gpu, half=weight_bytes == 2),
        checkpointing=config.trainer.activation_checkpointing,
        tiles=config.trainer.mlp_tiles,
        adapter=method.adapter,
        target_share=1.0,
        dropout=_dropout(values),
        adapter_dropout=method.adapter_dropout > 0,
        reduce_bucket=zero.reduce_bucket_size,
        overlaps=overlaps(config, max(1, ranks // slices), on_gpu=on_gpu),
        persistence=zero.param_persistence_threshold,
        prefetch_bucket=_number(zero_settings, "stage3_prefetch_bucket_size", ahead),
        max_live=_number(zero_settings, "stage3_max_live_parameters", live),
        max_reuse=_number(zero_settings, "stage3_max_reuse_distance", 1_000_000_000),
        evaluation_batch=config.evaluate.micro_batch_size,
        copy_ranks=copy_ranks(zero, ranks, ranks_per_node),
        sharing=parallelism_of(config.parallel).row_ranks,
        slices=slices,
        answers=_answers_per_row(config),
        written=_written(config),
        rounded=_rounded(model, trained) if isinstance(method, QuantizesWeights) else 0,
        own_sums=weight_bytes == 2 and zero.gradient_dtype is GradientDtype.model,
    )


def _rounded(model: Architecture, trained: Sequence[Tensor]) -> int:
    """Return how many frozen weights a method rounds that rounds the linear layers of blocks."""
    names = {tensor.name for tensor in trained}
    return sum(t.count for t in model.tensors if t.linear and t.layer is not None and t.name not in names)


def _state_bytes(config: RunConfig, trained: Sequence[Tensor]) -> float:
    optimizer = optimizer_of(config.optimizer)

    def of(tensor: Tensor) -> float:
        # Adapters do not count an expert router as a linear layer, but it is no table either: it multiplies every position.
        is_table = len(tensor.shape) == 2 and not tensor.linear and not tensor.used
        return tensor.count * optimizer.state_bytes(optimizer.kind(tensor.name, tensor.shape, is_table=is_table))

    return sum(map(of, trained)) / max(1, sum(tensor.count for tensor in trained))


def _answers_per_row(config: RunConfig) -> int:
    task = task_of(config.task)
    return task.answers_per_row if isinstance(task, TrainsOnRollouts) else 1


def _written(config: RunConfig) -> int:
    task = task_of(config.task)
    return task.tokens_written_behind_rows if isinstance(task, TrainsOnRollouts) else 0


def _row_length(config: RunConfig, values: dict[str, Any]) -> int:
    """Return the tokens of the longest row, including its padding."""
    written = _written(config)
    length = config.data.max_length + written
    longest = min(length, row_limit(values) or length)
    return longest if config.data.packing else -(-longest // PADDING) * PADDING


def _dropout(values: dict[str, Any]) -> float:
    rates = (values.get(key) for key in ("hidden_dropout_prob", "dropout_rate", "dropout"))
    return next((float(rate) for rate in rates if isinstance(rate, int | float) and rate), 0.0)


PREFETCH, LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults at stage 3: elements that it prefetches, and the most that it holds (deepspeed/runtime/zero/config.py)."""


def prefetch(model: Architecture) -> tuple[int, int]:
    """Return how many elements stage 3 should prefetch, and hold at most, for this model: at least a layer, and at least three
    layers with all tensors outside the layers. A layer of an 8B model has 218M elements: with DeepSpeed's default of 50M, ranks
    would wait for each layer."""
    layers: dict[int, int] = {}
    outside = 0
    for tensor in model.tensors:
        size = math.prod(tensor.shape)
        if tensor.layer is None:
            outside += size
        else:
            layers[tensor.layer] = layers.get(tensor.layer, 0) + size
    largest = max(layers.values(), default=0)
    return max(PREFETCH, largest), max(LIVE, 3 * largest + outside)


def _number(settings: dict[str, Any], key: str, default: int) -> int:
    value = settings.get(key, default)
    return int(value) if isinstance(value, (int, float)) else default


def _attention(config: RunConfig, model: Architecture, values: dict[str, Any], *, on_gpu: bool, half: bool) -> str:
    """Return the attention that `dstune.models.attention` and `dstune.models.varlen` will choose, assuming that a GPU has a kernel
    for packed rows."""
    if config.model.attention is not Attention.auto:
        return config.model.attention.value
    dropout = values.get("attention_dropout")
    is_supported = not (
        method_of(config.method).in_front or model.encoder or model.encoder_decoder or model.soft_capped or dropout
    )
    language = task_of(config.task).language
    if not (language and is_supported):
        return "sdpa"
    if on_gpu:
        return "flash_attention_2" if half else "sdpa"
    return "samples"
