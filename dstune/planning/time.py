"""Predicts the seconds of an optimizer step: arithmetic, memory traffic, communication and the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstune.config.parallel_rules import repeats_of_keys
from dstune.config.schema import Selective
from dstune.planning import activations
from dstune.planning.flops import backward_flops, forward_flops
from dstune.planning.hardware import Cluster
from dstune.planning.rollout import rollout_seconds
from dstune.planning.setup import Setup

# Bytes that elementwise operations move for each byte that a layer keeps: the byte is written, its fp32 or intermediate copy is
# written and read, the backward pass reads it and writes a gradient. A calibration replaces this by a measurement.
TRAFFIC_PER_SAVED_BYTE = 5.0
LOSS_BYTES_PER_LOGIT = 40.0
OPTIMIZER_BYTES_PER_WEIGHT = 34.0
"""AdamW reads and writes the fp32 weight and two moments, reads the gradient and writes the weight."""

OVERLAP = 0.7
"""Share of the communication that runs during the backward pass if DeepSpeed overlaps them (GPUs, stages 2 and 3)."""

HOST_LINK = 25e9
"""Bytes per second between a GPU and the host (PCIe 4 x16), for offloading."""

DISK = 3e9
"""Sustained bytes per second that a node's NVMe disk reads or writes: a guess below the manufacturers' figures, not measured."""


@dataclass(frozen=True)
class Speed:
    """The work that one rank does per second while all other ranks are busy, too."""

    flops: float
    """Floating-point operations of matrix products."""
    saved: float
    """Bytes of kept activations, for the elementwise work of forward and backward."""
    logits: float
    """Elements of logits through the cross entropy and back."""
    weights: float
    """Weights updated by AdamW."""
    link: float
    """Bytes that leave a rank in a ring over all ranks."""
    attention: float = 0.0
    """Floating-point operations of fused attention; 0 if they are as fast as matrix products."""
    node_link: float = 0.0
    """Bytes that leave a rank in a ring within its node; 0 if they are as fast as others."""
    fixed: float = 0.0
    """Seconds that each layer takes per micro-batch, regardless of its size."""


def speed_of(cluster: Cluster, weight_bytes: int) -> Speed:
    """Return the speed from the hardware table. fp32 products are assumed to reach an eighth of the bf16 peak on a GPU, half on a
    CPU."""
    device = cluster.device
    slower = 1 if weight_bytes == 2 else (8 if device.gpu else 2)
    moved = device.bandwidth * 1e9
    return Speed(
        flops=device.tflops * 1e12 * device.share_of_peak / slower,
        saved=moved / TRAFFIC_PER_SAVED_BYTE,
        logits=moved / LOSS_BYTES_PER_LOGIT,
        weights=moved / OPTIMIZER_BYTES_PER_WEIGHT,
        link=cluster.link * 1e9,
        node_link=device.link * 1e9,
        fixed=device.overhead,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank, by cause."""

    compute: float
    elementwise: float
    loss: float
    communication: float
    """Communication that does not overlap with computation."""
    optimizer: float
    tokens: int
    """Positions of the step over all ranks."""
    volume: int
    """Bytes that a rank sends in a step."""
    rollout: float = 0.0
    """Until the model has answered the prompts, without the time of the rewards."""

    @property
    def seconds(self) -> float:
        return self.compute + self.elementwise + self.loss + self.communication + self.optimizer + self.rollout

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def communication(s: Setup) -> int:
    """Return the bytes that a rank sends in a step by ring algorithms (Rajbhandari et al. 2020, arXiv:1910.02054, section 7),
    without those to ranks of its node for copies (`sent_for_copies`)."""
    around = (s.ranks - 1) / s.ranks
    p, trained = s.weight_bytes, s.trained_count
    exchanged = exchanges(s)
    if s.stage == 0:
        return int(2 * around * trained * p) + exchanged
    if s.stage == 1:  # gradients once a step, weights after the update; fp32 sums are sent in the weights' format
        return int(3 * around * trained * p) + exchanged
    if s.stage == 2:  # each micro-batch is all-reduced in buckets; weights are gathered after the update
        return int((2 * s.micro_batches + 1) * around * trained * p) + exchanged
    weights = s.frozen_bytes + trained * p
    # With copies, only the first pass after an update gathers over all ranks, and only what the update changed.
    gathers = trained * p if s.copy_ranks > 1 else s.micro_batches * 2 * weights
    return int(around * (gathers + s.micro_batches * trained * p)) + exchanged


def sent_for_copies(s: Setup) -> int:
    """Return the bytes that a rank sends in a step to ranks of its node, which gather weights from the node's copy (`zero.hpz`)."""
    if s.copy_ranks == 1:
        return 0
    around = (s.copy_ranks - 1) / s.copy_ranks
    passes = 2 * s.micro_batches
    return int(around * (passes * s.frozen_bytes + (passes - 1) * s.trained_count * s.weight_bytes))


def exchanges(s: Setup) -> int:
    """Return the bytes that a rank sends in a step for attention over rows that ranks share (Jacobs et al. 2023, arXiv:2309.14509,
    section 3): queries, keys, values and the attention's output, in both passes, and once more if activations are recomputed."""
    m = s.model
    keys = m.kv_heads * repeats_of_keys(m.kv_heads, s.sharing)
    states = s.tokens * 2 * (m.heads + keys) * m.head_dim * s.weight_bytes
    passes = 3 if s.checkpointing else 2
    return int(s.micro_batches * m.layers * passes * states * (s.sharing - 1) / s.sharing)


def summed_bytes(s: Setup) -> int:
    """Return the bytes that a rank sends in a step for the all-reduces between ranks that share weights (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3): for each layer two tensors of the hidden size in each pass. If activations are recomputed, the
    attention's tensor is reduced once more; the feed-forward part's is not, since nothing after its last product is recomputed."""
    hidden = s.tokens * s.model.hidden * s.weight_bytes
    around = 2 * (s.slices - 1) / s.slices
    return int(s.micro_batches * s.model.layers * (5 if s.checkpointing else 4) * around * hidden)


def _feed_forward_share(s: Setup) -> float:
    """Return the feed-forward part's share of the operations in a layer's matrix products, without attention."""
    m = s.model
    wide = 3 * m.hidden * m.intermediate
    return wide / (wide + 2 * m.hidden * m.head_dim * (m.heads + m.kv_heads))


def _of_images(s: Setup) -> tuple[float, float]:
    """Return the vision tower's operations for the images of a micro-batch, and the bytes that measure its elementwise work."""
    if s.tower is None or not s.patches:
        return 0.0, 0.0
    forward = s.tower.forward_flops(s.patches, s.images)
    moved = s.tower.sizes.blocks * s.tower.block_bytes(s.patches, s.weight_bytes)
    if not s.tower.learns:
        return forward, moved / 3
    return forward * (4 if s.checkpointing is True else 3), float(moved)


def step_time(s: Setup, speed: Speed) -> StepTime:
    """Return the predicted time of one optimizer step."""
    linear, attention, head = forward_flops(s)
    forward = linear + attention + head
    of_linear, of_attention, of_head = backward_flops(s)
    backward = of_linear + of_attention + of_head
    again = linear + attention if s.checkpointing is True else 0.0
    if activations.tiled(s) or (isinstance(s.checkpointing, Selective) and s.model.experts):
        again += linear * _feed_forward_share(s)
    count = s.micro_batches
    rate = speed.attention or speed.flops
    attention_flops = attention * (2 if s.checkpointing is True else 1) + of_attention
    matmul_flops = forward + backward + again - attention_flops
    # Saved bytes measure the elementwise work. Computing feed-forward layers in pieces saves fewer bytes for the same work.
    act = activations.layer(replace(s, tiles=1))
    kept_bytes = s.model.layers * act.saved * (1.4 if s.checkpointing or activations.tiled(s) else 1.0)
    targets = 0 if s.model.encoder else s.tokens * s.target_share * s.model.vocabulary
    volume = communication(s) if s.ranks > 1 else 0
    for_copies = sent_for_copies(s)
    inside = summed_bytes(s)  # cannot overlap with computation
    hidden = OVERLAP if s.on_gpu and s.stage >= 2 else 0.0
    sent = volume / speed.link + for_copies / (speed.node_link or speed.link)
    compute = count * (matmul_flops / speed.flops + attention_flops / rate + s.model.layers * speed.fixed)
    exposed = max(sent * (1 - hidden), sent - 0.66 * compute) if hidden else sent
    share_of_step = s.trained_count / (1 if s.stage == 0 else s.ranks)
    exposed += inside / speed.link
    optimizer = share_of_step / speed.weights
    if s.rounded:  # each pass reads the rounded weights, writes them in full and reads these
        passes = 3 if s.checkpointing is True else 2
        moved = s.rounded * (s.frozen_bits / 8 + 2 * s.weight_bytes)
        compute += count * passes * moved / (speed.saved * TRAFFIC_PER_SAVED_BYTE)
    of_images, moved_by_images = _of_images(s)
    compute += count * of_images / speed.flops
    kept_bytes += moved_by_images
    if s.offload_optimizer and s.on_gpu:
        # Gradients go to the host and weights come back. The node's cores update about 1.5e9 weights per second.
        optimizer = share_of_step * (4 + s.weight_bytes) / HOST_LINK + share_of_step * s.ranks_per_node / 1.5e9
    if s.swaps:  # gradients are written, everything is read, weights and moments are written back
        optimizer += share_of_step * s.ranks_per_node * 4 * (4 + 2 * s.moments) / DISK
    if s.offload_param and s.on_gpu:
        exposed += count * 2 * s.total * s.weight_bytes / s.ranks / HOST_LINK
    return StepTime(
        compute=compute,
        elementwise=count * kept_bytes / speed.saved,
        loss=count * targets / speed.logits,
        communication=exposed,
        optimizer=optimizer,
        tokens=s.global_batch_size * s.answers * s.texts * s.length,
        volume=volume + for_copies + inside,
        rollout=rollout_seconds(s, speed.flops, speed.saved * TRAFFIC_PER_SAVED_BYTE),
    )
