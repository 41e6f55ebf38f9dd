"""Predicts the memory of one rank, part by part, at every moment of a run that can be its peak.

docs/planning.md has the formulas and their sources. DeepSpeed's buffers were read from the code of its version 0.19.8 and
measured with `benchmarks/plan_accuracy.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstune.config.zero_rules import swap_buffers
from dstune.planning import activations, rollout
from dstune.planning.setup import HeldModel, Setup

GIB = 2**30
MIB = 2**20

ALL_REDUCE_BUCKET = 500_000_000
"""Number of elements that DeepSpeed reduces at a time at stage 0."""

Parts = dict[str, int]
"""Bytes by the name of their purpose."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs."""

    moments: dict[str, Parts]
    """The parts in memory at each moment of a run that can be its peak, by the moment's name."""
    host: int
    """Bytes of host memory that offloading takes, in addition to the device's."""
    margin: int
    """Bytes added to the parts: fragmentation, freed memory that is not returned to the system, and libraries."""
    largest: str = ""
    """The moment of the peak; if empty, the moment with the most bytes."""

    @property
    def peak(self) -> str:
        return self.largest or max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """The parts at the peak."""
        return self.moments[self.peak]

    @property
    def total(self) -> int:
        """Bytes at the peak, including the margin."""
        return sum(self.parts.values()) + self.margin


def memory(s: Setup) -> Memory:
    """Return the predicted memory of one rank."""
    resident, host = _resident(s)
    moments = {
        "forward": _at_the_head(s, resident),
        "backward": _in_the_layers(s, resident),
        "reduction": _at_the_reduction(s, resident),
        "step": _at_the_step(s, resident),
    }
    if s.patches:
        moments |= _with_images(s, resident, moments)
    if s.evaluation_batch:
        moments["evaluation"] = resident | {"gathered": gathered(s), "activations": activations.evaluation(s)}
    for held in s.held:
        moments[f"{held.name}'s forward"] = resident | _in_its_forward(s, held)
    if s.written:
        moments["rollout"] = resident | {"gathered": gathered(s), "completions": rollout.sampling_bytes(s)}
    if not s.on_gpu:  # ranks on a CPU offload to the memory that they already use
        moments = {name: parts | ({"offloaded": host} if host else {}) for name, parts in moments.items()}
        host = 0
    if s.on_gpu:
        # Fragmentation, and memory that torch does not count: the CUDA context, NCCL and cuBLAS.
        return Memory(moments, host, GIB + max(sum(parts.values()) for parts in moments.values()) * 3 // 100)
    return _with_heap(s, moments)


def _with_images(s: Setup, resident: Parts, moments: Mapping[str, Parts]) -> dict[str, Parts]:
    """Return the parts of the forward and backward pass with the images of a micro-batch, and of the tower's passes."""
    tower, p = s.tower, s.weight_bytes
    assert tower is not None and tower.images is not None
    pixels = s.images * tower.images.values * (4 if p == 4 else 4 + p)  # as loaded, and in the tower's precision
    of_block = tower.block_bytes(s.patches, p)
    boundary = s.patches * p * tower.sizes.width
    kept = pixels + (tower.sizes.blocks * (boundary if s.checkpointing else of_block) if tower.learns else 0)
    with_images = {name: moments[name] | {"images": kept} for name in ("forward", "backward")}
    at_the_tower = resident | {"gathered": gathered(s), "images": kept + tower.working_bytes(s.patches, p)}
    if tower.learns:  # the backward pass ends in the tower, when all other gradients are computed
        at_the_tower |= {"images": kept + of_block, "gradients": _running_gradients(s, s.trained_count)}
    return with_images | {"tower": at_the_tower}


LARGE = 32 * MIB
"""glibc maps allocations above this size and returns them to the system when they are freed. Smaller ones come from the heap, which
rarely shrinks (`M_MMAP_THRESHOLD`, whose dynamic limit is 32 MiB on 64-bit machines)."""


GAPS = 0.25
"""Unused bytes between the tensors of a pass in the heap, which have many sizes, as a share of these tensors: fitted to the cases
of `benchmarks/plan_accuracy.py` on glibc 2.41."""


def _with_heap(s: Setup, moments: dict[str, Parts]) -> Memory:
    """Return the memory of a rank on a CPU, whose heap keeps its largest size for the rest of the run."""
    heap = {name: _in_heap(s, parts) for name, parts in moments.items()}
    held = {name: sum(kinds.values()) for name, kinds in heap.items()}
    size = max(held[name] + _gaps(s, kinds) for name, kinds in heap.items())
    peak = max(moments, key=lambda name: sum(moments[name].values()) - held[name])
    libraries = CPU_LIBRARIES + (PEFT if s.adapter else 0)
    return Memory(moments, 0, size - held[peak] + libraries, peak)


def _gaps(s: Setup, kinds: Parts) -> int:
    """Return the unused bytes between the tensors of a pass. Merged weights of experts have one size and leave no gaps."""
    merged = (s.model.layers + 2) * activations.merged_experts(s)
    return int(GAPS * (max(0, kinds.get("activations", 0) - merged) + kinds.get("gradients", 0)))


CPU_LIBRARIES = 45 * MIB
"""Libraries that a rank loads after its baseline memory is measured: optimizer, gloo, matrix kernels."""
PEFT = 11 * MIB
"""peft, which imports bitsandbytes, is also loaded after the baseline: measured separately (`models/peft_import.py`)."""


def _in_heap(s: Setup, parts: Parts) -> Parts:
    """Return the bytes of tensors that come from the heap, since they are too small to be mapped, by kind."""
    m, p = s.model, s.weight_bytes
    table = m.vocabulary * m.hidden * p
    small: Parts = {}
    if s.tokens * p * max(m.hidden, m.intermediate) < LARGE:
        small["activations"] = parts.get("activations", 0)
    if activations.head(s).peak < 2 * LARGE:
        small["logits"] = parts.get("logits", 0)
    for name in ("gradients", "gathered", *(("weights",) if s.stage == 0 else ())):
        held = parts.get(name, 0)
        small[name] = held if table < LARGE else max(0, held - table)
    return small


def _partitioned(s: Setup) -> int:
    """Return how many weights stage 3 partitions: all but those of tensors up to the persistence threshold."""
    return sum(t.count for t in _all(s) if t.count > s.persistence)


def _all(s: Setup) -> tuple:
    trained_names = {t.name for t in s.trained}
    return (*s.trained, *(t for t in s.model.tensors if t.name not in trained_names))


def _weights(s: Setup) -> int:
    frozen, trained = s.frozen_bytes, s.trained_count * s.weight_bytes
    if s.stage < 3:
        return frozen + trained
    if s.offload_param and s.on_gpu:
        return _persistent(s)
    return (frozen + trained) // s.ranks + _persistent(s)


def _persistent(s: Setup) -> int:
    return (s.total - _partitioned(s)) * s.weight_bytes


def gathered(s: Setup) -> int:
    """Return the bytes of weights that stage 3 has gathered while layers compute; 0 at lower stages.

    DeepSpeed does not release a weight that is used again within the next `max_reuse` elements. A weight therefore stays gathered
    from the forward to the backward pass if at most half as many elements follow it in the model. DeepSpeed also prefetches
    `prefetch_bucket` elements. Weights that are fetched together arrive in one buffer, and each is copied out of it.
    """
    if s.stage < 3:
        return 0
    embedding = max(t.count for t in s.model.tensors)
    least = max(embedding, s.model.layer_parameters) + s.prefetch_bucket
    whole = min(_partitioned(s), max(min(s.max_live, s.max_reuse // 2), least))
    # All weights of a layer are fetched together (`zero.engine`).
    buffer = min(max(s.prefetch_bucket, s.model.layer_parameters), max(0, _partitioned(s) - embedding))
    return (whole + buffer) * s.weight_bytes


def _resident(s: Setup) -> tuple[Parts, int]:
    """Return the parts that a rank holds from the first step to the last, and the bytes that it offloads to the host's memory."""
    trained = s.trained_count
    share = trained if s.stage == 0 else -(-trained // s.ranks)
    # Stage 0, and stage 3 in fp32, update the model's weights directly.
    master = 0 if s.stage == 0 or (s.stage == 3 and s.weight_bytes == 4 and not s.offload_optimizer) else 4 * share
    states = round(s.state_bytes * share)
    parts: Parts = {"weights": _weights(s)}
    if s.copy_ranks > 1:
        parts["copy in the node"] = (s.frozen_bytes + trained * s.weight_bytes) // s.copy_ranks
    host = 0
    if s.offload_optimizer:
        kept_bytes = _swap_buffers(s) if s.swaps else master + states
        host = kept_bytes + 4 * share + (s.weight_bytes * share if s.stage < 3 else 0)
        # Gradients on their way to the host.
        parts["gradient sums"] = 2 * max((t.count for t in s.trained), default=0) * s.weight_bytes if s.stage < 3 else 0
    else:
        parts["optimizer"] = master + states
        parts["gradient sums"] = _gradient_store(s)
    if s.offload_param:
        host += (s.total + s.unreached) * s.weight_bytes // s.ranks
    for held in s.held:
        parts[held.name], offloaded = _held_weights(s, held)
        host += offloaded
    if s.on_gpu and s.stage >= 2:
        # DeepSpeed's contiguous buffer; two of them at stage 2 if the reduction overlaps with the backward pass.
        parts["buffers"] = s.reduce_bucket * s.weight_bytes * (2 if s.stage == 2 and s.overlaps else 1)
    return parts, host


def _held_weights(s: Setup, held: HeldModel) -> tuple[int, int]:
    """Return the bytes on the device and in the host's memory of a model that is not trained. At stage 3 it is partitioned, except
    for a full copy of its projection, with which a loss computes logits chunk by chunk."""
    m, p = held.model, s.weight_bytes
    total = m.parameters + held.unreached
    if s.stage < 3:
        return total * p, 0
    small = sum(tensor.count for tensor in m.tensors if tensor.count <= s.persistence)
    share = -(-(total - small) // s.ranks)
    whole = small + m.vocabulary * m.hidden
    return (whole * p, share * p) if s.offload_param else ((whole + share) * p, 0)


def _in_its_forward(s: Setup, held: HeldModel) -> Parts:
    m = held.model
    alone = replace(s, model=m, trained=m.tensors, frozen=0, adapter=False, evaluation_batch=None)
    return {"gathered": gathered(alone), "activations": activations.evaluation(alone)}


def _swap_buffers(s: Setup) -> int:
    """Return the bytes of the fp32 buffers through which optimizer states on a disk are read and written. Each has the size of the
    largest sub-group, which collects complete tensors until it has at least `swapped_at_once` elements."""
    shares = [-(-t.count // s.ranks) for t in s.trained]
    return swap_buffers(s.moments) * 4 * min(sum(shares), max(shares, default=0) + s.swapped_at_once)


def _gradient_store(s: Setup) -> int:
    """Return the bytes of a step's accumulated gradients, in addition to those of the running backward pass."""
    trained, share = s.trained_count, -(-s.trained_count // s.ranks)
    mixed = s.weight_bytes == 2
    if s.own_sums:
        return s.weight_bytes * share if s.stage >= 2 else 0
    if s.stage == 1 and mixed:
        return 4 * trained  # BF16_Optimizer: fp32 sums of all gradients
    if s.stage == 2:  # in fp32 the sums are the gradients of this rank's tensors
        return 4 * share if mixed or s.micro_batches > 1 else 0
    if s.stage == 3:
        return 4 * share
    return 0


def _running_gradients(s: Setup, done: int) -> int:
    """Return the bytes of the running backward pass's gradients when those of `done` weights have been computed."""
    p = s.weight_bytes
    if s.stage == 1 and p == 2 and s.on_gpu and not s.own_sums:  # added to their sums at once
        return p * min(done, s.model.layer_parameters)
    if s.stage < 2:
        accumulates = p == 4 and s.micro_batches > 1  # from the second micro-batch on all gradients exist
        return p * (s.trained_count if accumulates else done)
    if s.on_gpu:  # those of earlier layers are in the bucket's buffer
        return p * min(done, s.model.layer_parameters)
    return p * min(done, max(s.reduce_bucket, s.model.layer_parameters))


def _at_the_head(s: Setup, resident: Parts) -> Parts:
    act = activations.layer(s)
    kept_bytes = s.model.layers * act.kept_bytes(s.checkpointing) + activations.shared(s)
    # At stage 2 the first reduction allocates the sums and the step frees them: the first forward pass has none.
    sums = 0 if s.stage == 2 and s.micro_batches == 1 else resident["gradient sums"]
    return resident | {
        "gathered": gathered(s),
        "activations": kept_bytes,
        "logits": activations.head(s).peak,
        "gradient sums": sums,
        "gradients": _running_gradients(s, 0),
    }


def _in_the_layers(s: Setup, resident: Parts) -> Parts:
    """Return the parts at the peak of the backward pass through the layers, which goes from the last to the first."""
    act = activations.layer(s)
    m = s.model
    last = sum(t.count for t in s.trained if t.layer is None and not _is_embedding(s, t))
    # The gradient of a tied embedding exists as soon as the projection's is computed.
    tied = m.tied and not m.encoder and not s.adapter
    if tied:
        last += m.vocabulary * m.hidden
    of_layer: dict[int, int] = {}
    for tensor in s.trained:
        if tensor.layer is not None:
            of_layer[tensor.layer] = of_layer.get(tensor.layer, 0) + tensor.count
    best: Parts = {}
    done = last
    for index in reversed(range(m.layers)):
        done += of_layer.get(index, 0)
        saved = act.kept_bytes(s.checkpointing) * index + act.saved
        moment = resident | {
            "gathered": gathered(s),
            "activations": saved + act.working + activations.shared(s),
            "gradients": _running_gradients(s, done),
        }
        if sum(moment.values()) > sum(best.values()):
            best = moment
    if not s.adapter:  # the embedding's gradient, in addition to the projection's if they are tied
        table = m.vocabulary * m.hidden
        end = resident | {
            "gathered": gathered(s),
            "activations": activations.shared(s),
            "gradients": _running_gradients(s, done) + table * s.weight_bytes,
        }
        if sum(end.values()) > sum(best.values()):
            best = end
    return best


def _is_embedding(s: Setup, tensor: object) -> bool:
    return getattr(tensor, "shape", None) == (s.model.vocabulary, s.model.hidden)


def _at_the_reduction(s: Setup, resident: Parts) -> Parts:
    return resident | {
        "gathered": gathered(s),
        "gradients": _running_gradients(s, s.trained_count),
        "communication": _copies(s) if s.ranks > 1 or s.weight_bytes == 2 else 0,
    }


def _copies(s: Setup) -> int:
    """Return the bytes of the copies of gradients while they are reduced and summed."""
    p, trained = s.weight_bytes, s.trained_count
    share = -(-trained // s.ranks)
    largest = max((t.count for t in s.trained), default=0)
    bucket = min(trained, max(s.reduce_bucket, largest))
    mixed = p == 2
    # One flat fp32 copy of the gradients; at stage 1 in mixed precision also a bf16 copy, which is sent.
    if s.stage == 0 or (s.stage == 1 and mixed):
        return (4 + (p if s.stage == 1 else 0)) * min(trained, ALL_REDUCE_BUCKET)
    flat = p * bucket
    if s.stage == 3:
        if not s.on_gpu:
            flat *= 2  # gloo has no reduce-scatter: torch clones the input and all-reduces it
        return flat + (4 * bucket // s.ranks if mixed else 0)  # this rank's shares in fp32
    return flat + (4 * min(largest, share) if mixed else 0)  # one tensor's share in fp32, on its way into the sums


def _at_the_step(s: Setup, resident: Parts) -> Parts:
    """Return the parts in memory during the optimizer step."""
    trained, share = s.trained_count, -(-s.trained_count // s.ranks)
    largest = max((t.count for t in s.trained), default=0)
    mixed = s.weight_bytes == 2
    if s.stage == 0:
        return resident | {"gradients": 4 * trained}
    if s.offload_optimizer:
        return dict(resident)
    if s.stage == 1 and mixed:  # the running gradients are freed after the step
        return resident | {"gradients": _running_gradients(s, trained)}
    flat = 0 if s.stage == 2 and mixed else 4 * share
    # The gradient norm is computed in fp64, one tensor's share at a time.
    norm = 8 * (largest // s.ranks if s.stage == 3 else min(largest, share))
    return resident | {"copies of gradients": max(flat, norm)}
