"""Seconds of an optimizer step: arithmetic, memory traffic, communication, and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstune.config.parallel_rules import repeats_of_keys
from dstune.config.schema import Selective
from dstune.planning import activations
from dstune.planning.flops import backward_flops, forward_flops
from dstune.planning.hardware import Cluster
from dstune.planning.rollout import rollout_seconds
from dstune.planning.setup import Setup

# Bytes that elementwise operations move for each byte that a layer keeps: written once, its fp32 or intermediate copy
# read and written, read in the backward pass and a gradient written. Replaced by a measurement where calibrated.
TRAFFIC_PER_SAVED_BYTE = 5.0
LOSS_BYTES_PER_LOGIT = 40.0
OPTIMIZER_BYTES_PER_WEIGHT = 34.0
"""Read and write fp32 weight, two moments; read the gradient; write the weight."""

OVERLAP = 0.7
"""Share of the communication that hides behind the backward pass where DeepSpeed overlaps them (GPUs, stages 2 and 3)."""

HOST_LINK = 25e9
"""Bytes a second between a GPU and the host (PCIe 4 x16), for offloading."""

DISK = 3e9
"""Bytes a second that a node's NVMe disk reads or writes for long; a guess below what makers state, not measured."""


@dataclass(frozen=True)
class Speed:
    """What one rank does in a second while all the others are busy too."""

    flops: float
    """Floating-point operations of matrix products."""
    saved: float
    """Bytes of kept activations, for the elementwise work of forward and backward."""
    logits: float
    """Elements of logits through the cross entropy and back."""
    weights: float
    """Weights updated by AdamW."""
    link: float
    """Bytes that leave a rank in a ring."""
    attention: float = 0.0
    """Floating-point operations of fused attention; those of matrix products where 0."""
    fixed: float = 0.0
    """Seconds of a micro-batch and layer whatever its size."""


def speed_of(cluster: Cluster, weight_bytes: int) -> Speed:
    """Return the speed from the hardware table. fp32 products are taken at an eighth of bf16's peak on a GPU, at half on a CPU."""
    device = cluster.device
    slower = 1 if weight_bytes == 2 else (8 if device.gpu else 2)
    moved = device.bandwidth * 1e9
    return Speed(
        flops=device.tflops * 1e12 * device.share_of_peak / slower,
        saved=moved / TRAFFIC_PER_SAVED_BYTE,
        logits=moved / LOSS_BYTES_PER_LOGIT,
        weights=moved / OPTIMIZER_BYTES_PER_WEIGHT,
        link=cluster.link * 1e9,
        fixed=device.overhead,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of one rank."""

    compute: float
    elementwise: float
    loss: float
    communication: float
    """What does not hide behind the backward pass."""
    optimizer: float
    tokens: int
    """Positions of the step over all ranks."""
    volume: int
    """Bytes that leave a rank in a step."""
    rollout: float = 0.0
    """Until the model has answered the prompts, without what rewards take."""

    @property
    def seconds(self) -> float:
        return self.compute + self.elementwise + self.loss + self.communication + self.optimizer + self.rollout

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def communication(s: Setup) -> int:
    """Return bytes that leave a rank in one step, by ring algorithms (Rajbhandari et al. 2020, arXiv:1910.02054, section 7)."""
    around = (s.ranks - 1) / s.ranks
    p, trained = s.weight_bytes, s.trained_count
    exchanged = exchanges(s)
    if s.stage == 0:
        return int(2 * around * trained * p) + exchanged
    if s.stage == 1:  # once a step, and the weights after the step; sums in fp32 are sent in the weights' format
        return int(3 * around * trained * p) + exchanged
    if s.stage == 2:  # every micro-batch is all-reduced in buckets, and the weights gathered after the step
        return int((2 * s.micro_batches + 1) * around * trained * p) + exchanged
    weights = s.frozen * s.frozen_bits // 8 + trained * p
    return int(s.micro_batches * around * (2 * weights + trained * p)) + exchanged


def exchanges(s: Setup) -> int:
    """Return bytes that leave a rank in a step for attention over rows that ranks share (Jacobs et al. 2023, arXiv:2309.14509,
    section 3): queries, keys, values and what is attended, in both passes, and once more where activations are computed again."""
    m = s.model
    keys = m.kv_heads * repeats_of_keys(m.kv_heads, s.sharing)
    states = s.tokens * 2 * (m.heads + keys) * m.head_dim * s.weight_bytes
    passes = 3 if s.checkpointing else 2
    return int(s.micro_batches * m.layers * passes * states * (s.sharing - 1) / s.sharing)


def summed_bytes(s: Setup) -> int:
    """Return bytes that leave a rank in a step for what ranks that share weights add up (Shoeybi et al. 2019, arXiv:1909.08053,
    section 3): in a layer two tensors of the hidden size in each pass, and the attention's once more where activations are
    computed again (behind the last product of the feed-forward part nothing is)."""
    hidden = s.tokens * s.model.hidden * s.weight_bytes
    around = 2 * (s.slices - 1) / s.slices
    return int(s.micro_batches * s.model.layers * (5 if s.checkpointing else 4) * around * hidden)


def _feed_forward_share(s: Setup) -> float:
    """Return the share of the feed-forward part in the products of a layer's matrices."""
    m = s.model
    wide = 3 * m.hidden * m.intermediate
    return wide / (wide + 2 * m.hidden * m.head_dim * (m.heads + m.kv_heads))


def _of_images(s: Setup) -> tuple[float, float]:
    """Return operations of the tower for the images of a micro-batch, and bytes that stand for its elementwise work."""
    if s.tower is None or not s.patches:
        return 0.0, 0.0
    forward = s.tower.forward_flops(s.patches, s.images)
    moved = s.tower.sizes.blocks * s.tower.block_bytes(s.patches, s.weight_bytes)
    if not s.tower.learns:
        return forward, moved / 3
    return forward * (4 if s.checkpointing is True else 3), float(moved)


def step_time(s: Setup, speed: Speed) -> StepTime:
    """Return time of one optimizer step."""
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
    # What is kept stands for the elementwise work, which pieces of feed-forward layers do not make less.
    act = activations.layer(replace(s, tiles=1))
    kept_bytes = s.model.layers * act.saved * (1.4 if s.checkpointing or activations.tiled(s) else 1.0)
    targets = 0 if s.model.encoder else s.tokens * s.target_share * s.model.vocabulary
    volume = communication(s) if s.ranks > 1 else 0
    inside = summed_bytes(s)  # nothing can be computed meanwhile
    hidden = OVERLAP if s.on_gpu and s.stage >= 2 else 0.0
    sent = volume / speed.link
    compute = count * (matmul_flops / speed.flops + attention_flops / rate + s.model.layers * speed.fixed)
    exposed = max(sent * (1 - hidden), sent - 0.66 * compute) if hidden else sent
    share_of_step = s.trained_count / (1 if s.stage == 0 else s.ranks)
    exposed += inside / speed.link
    optimizer = share_of_step / speed.weights
    of_images, moved_by_images = _of_images(s)
    compute += count * of_images / speed.flops
    kept_bytes += moved_by_images
    if s.offload_optimizer and s.on_gpu:
        # Gradients down, weights up; the update runs on the node's cores, at about 1.5e9 weights a second and node.
        optimizer = share_of_step * (4 + s.weight_bytes) / HOST_LINK + share_of_step * s.ranks_per_node / 1.5e9
    if s.swaps:  # gradients are written, all are read, weights and moments are written
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
        volume=volume + inside,
        rollout=rollout_seconds(s, speed.flops, speed.saved * TRAFFIC_PER_SAVED_BYTE),
    )
