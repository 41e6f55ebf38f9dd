"""Memory of one rank, part by part, at each moment of a run that can be its peak.

Formulas and their sources: docs/planning.md. What DeepSpeed holds was read from the code of its version 0.19.8 and
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
"""Elements that DeepSpeed reduces at a time at stage 0."""

Parts = dict[str, int]
"""Bytes by the name of what they are for."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    moments: dict[str, Parts]
    """What is held at each moment of a run that may be the peak."""
    host: int
    """Bytes in the host's memory that offloading takes, beside those of the device."""
    margin: int
    """Fragmentation, what freed memory is not given back, and libraries: what is added to the parts."""
    largest: str = ""
    """The moment of the peak; the one that holds most where empty."""

    @property
    def peak(self) -> str:
        return self.largest or max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """The parts at the peak."""
        return self.moments[self.peak]

    @property
    def total(self) -> int:
        """At the peak, margin included."""
        return sum(self.parts.values()) + self.margin


def memory(s: Setup) -> Memory:
    """Return the memory of one rank of `s`."""
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
    if not s.on_gpu:  # a CPU's ranks offload to the memory that they are in
        moments = {name: parts | ({"offloaded": host} if host else {}) for name, parts in moments.items()}
        host = 0
    if s.on_gpu:
        # Fragmentation, and the CUDA context, NCCL and cuBLAS: the device's memory holds them, torch does not count them.
        return Memory(moments, host, GIB + max(sum(parts.values()) for parts in moments.values()) * 3 // 100)
    return _with_heap(s, moments)


def _with_images(s: Setup, resident: Parts, moments: Mapping[str, Parts]) -> dict[str, Parts]:
    """Return the forward and the backward pass with what the images of a micro-batch hold, and the passes of the tower."""
    tower, p = s.tower, s.weight_bytes
    assert tower is not None and tower.images is not None
    pixels = s.images * tower.images.values * (4 if p == 4 else 4 + p)  # as they come, and as the tower takes them
    of_block = tower.block_bytes(s.patches, p)
    boundary = s.patches * p * tower.sizes.width
    kept = pixels + (tower.sizes.blocks * (boundary if s.checkpointing else of_block) if tower.learns else 0)
    with_images = {name: moments[name] | {"images": kept} for name in ("forward", "backward")}
    own = resident | {"gathered": gathered(s), "images": kept + tower.working_bytes(s.patches, p)}
    if tower.learns:  # last in the backward pass, with the gradients of all others
        own |= {"images": kept + of_block, "gradients": _running_gradients(s, s.trained_count)}
    return with_images | {"tower": own}


LARGE = 32 * MIB
"""glibc maps what is larger and gives it back when it is freed; what is smaller comes from the heap, which rarely shrinks
(`M_MMAP_THRESHOLD`, whose dynamic limit is 32 MiB on 64-bit machines)."""


GAPS = 0.25
"""Of the tensors of a pass in the heap, which are of many sizes, the share that lies between them: fitted to the cases of
`benchmarks/plan_accuracy.py` on glibc 2.41."""


def _with_heap(s: Setup, moments: dict[str, Parts]) -> Memory:
    """Return a CPU's rank: the heap keeps the size that it had at most, whatever is held later."""
    heap = {name: _in_heap(s, parts) for name, parts in moments.items()}
    held = {name: sum(kinds.values()) for name, kinds in heap.items()}
    size = max(held[name] + _gaps(s, kinds) for name, kinds in heap.items())
    peak = max(moments, key=lambda name: sum(moments[name].values()) - held[name])
    libraries = CPU_LIBRARIES + (PEFT if s.adapter else 0)
    return Memory(moments, 0, size - held[peak] + libraries, peak)


def _gaps(s: Setup, kinds: Parts) -> int:
    """Return the bytes between the tensors of a pass; experts with adapters, whole and of one size, leave none."""
    merged = (s.model.layers + 2) * activations.merged_experts(s)
    return int(GAPS * (max(0, kinds.get("activations", 0) - merged) + kinds.get("gradients", 0)))


CPU_LIBRARIES = 45 * MIB
"""What is imported and started after the level that a rank's memory is measured from: optimizer, gloo, matrix kernels."""
PEFT = 11 * MIB
"""peft, and bitsandbytes with it, is imported after that level, too: measured alone (`models/peft_import.py`)."""


def _in_heap(s: Setup, parts: Parts) -> Parts:
    """Return bytes of tensors that are too small to be mapped one by one, by their kind."""
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
    """Return weights that stage 3 partitions: of all tensors but the small ones."""
    return sum(t.count for t in _all(s) if t.count > s.persistence)


def _all(s: Setup) -> tuple:
    trained_names = {t.name for t in s.trained}
    return (*s.trained, *(t for t in s.model.tensors if t.name not in trained_names))


def _weights(s: Setup) -> int:
    frozen, trained = (s.frozen + s.unreached) * s.frozen_bits // 8, s.trained_count * s.weight_bytes
    if s.stage < 3:
        return frozen + trained
    if s.offload_param and s.on_gpu:
        return _persistent(s)
    return (frozen + trained) // s.ranks + _persistent(s)


def _persistent(s: Setup) -> int:
    return (s.total - _partitioned(s)) * s.weight_bytes


def gathered(s: Setup) -> int:
    """Return the bytes of weights that are whole while layers compute, at stage 3.

    DeepSpeed keeps a weight that is used again within `max_reuse` elements, so that it stays whole from a forward pass to
    the backward pass where at most half as many elements lie behind it; it prefetches `prefetch_bucket` elements. Weights that
    are fetched together come in one buffer, and each is copied out of it.
    """
    if s.stage < 3:
        return 0
    embedding = max(t.count for t in s.model.tensors)
    least = max(embedding, s.model.layer_parameters) + s.prefetch_bucket
    whole = min(_partitioned(s), max(min(s.max_live, s.max_reuse // 2), least))
    # A layer is fetched at once (`zero.engine`).
    buffer = min(max(s.prefetch_bucket, s.model.layer_parameters), max(0, _partitioned(s) - embedding))
    return (whole + buffer) * s.weight_bytes


def _resident(s: Setup) -> tuple[Parts, int]:
    """Return what a rank holds from the first step to the last, and what of it lies in the host's memory."""
    trained = s.trained_count
    share = trained if s.stage == 0 else -(-trained // s.ranks)
    # Stage 0, and stage 3 in fp32, step on the model's own weights.
    master = 0 if s.stage == 0 or (s.stage == 3 and s.weight_bytes == 4 and not s.offload_optimizer) else 4 * share
    states = round(s.state_bytes * share)
    parts: Parts = {"weights": _weights(s)}
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
        # DeepSpeed's contiguous buffer; two of them at stage 2 where the reduction overlaps with the backward pass.
        parts["buffers"] = s.reduce_bucket * s.weight_bytes * (2 if s.stage == 2 and s.overlaps else 1)
    return parts, host


def _held_weights(s: Setup, held: HeldModel) -> tuple[int, int]:
    """Return bytes on the device and in the host's memory of a model that only answers: whole, or at stage 3 partitioned beside
    a whole copy of its projection, which a loss asks for logits a chunk at a time."""
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
    """Return fp32 buffers of the size of the largest sub-group, through which states on a disk are read and written. A sub-group
    takes whole tensors until it has `swapped_at_once` elements or more."""
    shares = [-(-t.count // s.ranks) for t in s.trained]
    return swap_buffers(s.moments) * 4 * min(sum(shares), max(shares, default=0) + s.swapped_at_once)


def _gradient_store(s: Setup) -> int:
    """Return gradients of a whole step that are held beside those of the running backward pass."""
    trained, share = s.trained_count, -(-s.trained_count // s.ranks)
    mixed = s.weight_bytes == 2
    if s.own_sums:
        return s.weight_bytes * share if s.stage >= 2 else 0
    if s.stage == 1 and mixed:
        return 4 * trained  # BF16_Optimizer: fp32 sums of all of them
    if s.stage == 2:  # in fp32 they are the gradients of this rank's tensors themselves
        return 4 * share if mixed or s.micro_batches > 1 else 0
    if s.stage == 3:
        return 4 * share
    return 0


def _running_gradients(s: Setup, done: int) -> int:
    """Return gradients of the running backward pass when those of `done` weights are computed."""
    p = s.weight_bytes
    if s.stage == 1 and p == 2 and s.on_gpu and not s.own_sums:  # added to their sums at once
        return p * min(done, s.model.layer_parameters)
    if s.stage < 2:
        accumulates = p == 4 and s.micro_batches > 1  # from the second micro-batch on they are all there
        return p * (s.trained_count if accumulates else done)
    if s.on_gpu:  # in the bucket's buffer already, but for those of the layer
        return p * min(done, s.model.layer_parameters)
    return p * min(done, max(s.reduce_bucket, s.model.layer_parameters))


def _at_the_head(s: Setup, resident: Parts) -> Parts:
    act = activations.layer(s)
    kept_bytes = s.model.layers * act.kept_bytes(s.checkpointing) + activations.shared(s)
    # At stage 2 they are made by the first reduction and freed by the step: not there in the first forward pass.
    sums = 0 if s.stage == 2 and s.micro_batches == 1 else resident["gradient sums"]
    return resident | {
        "gathered": gathered(s),
        "activations": kept_bytes,
        "logits": activations.head(s).peak,
        "gradient sums": sums,
        "gradients": _running_gradients(s, 0),
    }


def _in_the_layers(s: Setup, resident: Parts) -> Parts:
    """Return what is in memory at the largest moment of the backward pass through the layers, from the last to the first."""
    act = activations.layer(s)
    m = s.model
    last = sum(t.count for t in s.trained if t.layer is None and not _is_embedding(s, t))
    # A tied embedding has the gradient of the projection before that of the embedding.
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
    if not s.adapter:  # the embedding's own gradient, beside that of the projection where they are tied
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
    # One flat copy; in mixed precision of the fp32 sums, with another in bf16 to send.
    if s.stage == 0 or (s.stage == 1 and mixed):
        return (4 + (p if s.stage == 1 else 0)) * min(trained, ALL_REDUCE_BUCKET)
    flat = p * bucket
    if s.stage == 3:
        if not s.on_gpu:
            flat *= 2  # gloo has no reduce-scatter of its own: torch clones the input and reduces all of it
        return flat + (4 * bucket // s.ranks if mixed else 0)  # this rank's shares in fp32
    return flat + (4 * min(largest, share) if mixed else 0)  # one tensor's share in fp32, on its way into the sums


def _at_the_step(s: Setup, resident: Parts) -> Parts:
    """Return what is in memory during the optimizer step."""
    trained, share = s.trained_count, -(-s.trained_count // s.ranks)
    largest = max((t.count for t in s.trained), default=0)
    mixed = s.weight_bytes == 2
    if s.stage == 0:
        return resident | {"gradients": 4 * trained}
    if s.offload_optimizer:
        return dict(resident)
    if s.stage == 1 and mixed:  # the running gradients are freed after it
        return resident | {"gradients": _running_gradients(s, trained)}
    flat = 0 if s.stage == 2 and mixed else 4 * share
    # The norm is taken in fp64, one tensor's share at a time.
    norm = 8 * (largest // s.ranks if s.stage == 3 else min(largest, share))
    return resident | {"copies of gradients": max(flat, norm)}
