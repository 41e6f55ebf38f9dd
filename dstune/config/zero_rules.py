"""Rules of `zero`: what a stage requires, and what offloaded optimizer states rule out."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.deepspeed_file import settings_problems
from dstune.config.schema import Offload, OptimizerOffload, Precision, RunConfig, SaveMode, ZeroConfig, stage_of
from dstune.core.errors import Problem
from dstune.protocols import method_of, optimizer_of

MIN_SWAP_BUFFERS = 4
"""The number that AdamW needs. SGD could use fewer, but that is untested."""

SWAPPED_AT_ONCE = 20_000_000
"""Elements of a sub-group on a rank. With DeepSpeed's 1e9, all states of a small model would be in memory at once, in 16 GB of
buffers."""

STATES_ON_A_DISK = "optimizer states on a disk are loaded into memory part by part, and only during an update"


def swap_buffers(states: int) -> int:
    """Return how many buffers an update needs in memory for a sub-group whose states are on a disk: one for weights, one for
    gradients, and one for each of the `states` that the optimizer keeps per parameter."""
    return max(MIN_SWAP_BUFFERS, 2 + states)


def overlaps(config: RunConfig, replicas: int, *, on_gpu: bool) -> bool:
    """Return whether gradients are reduced on a separate stream while the backward pass runs.

    That needs a GPU, and gradients that must be sent to other ranks or moved to host memory. At stage 2, DeepSpeed then keeps a
    second bucket, and waits for the device at the end of each backward pass.

    replicas: ranks that partition the same weights.
    """
    zero = config.zero
    stage = stage_of(zero)
    moves_gradients = replicas > 1 or stage == 3 or zero.offload_optimizer is not OptimizerOffload.none
    return zero.overlap_comm and on_gpu and stage >= 2 and moves_gradients


def copy_ranks(zero: ZeroConfig, ranks: int, ranks_per_node: int) -> int:
    """Return how many ranks share the second copy of the weights that `zero.hpz` keeps in each node; 1 for no copy: where all ranks
    are on one node, or a node has a single rank, which would keep all weights."""
    if not zero.hpz or stage_of(zero) < 3 or not nodes_can_hold_copies(ranks, ranks_per_node):
        return 1
    return ranks_per_node


def nodes_can_hold_copies(ranks: int, ranks_per_node: int) -> bool:
    """Return whether `ranks` are on several nodes with as many ranks each, and more than one."""
    return 1 < ranks_per_node < ranks and ranks % ranks_per_node == 0


def check_zero(config: RunConfig) -> Iterator[Problem]:
    zero, precision = config.zero, config.trainer.precision
    if stage_of(zero) == 0 and precision in (Precision.bf16, Precision.fp16):
        yield Problem(
            "zero.stage",
            f"DeepSpeed's stage 0 with {precision.name} makes a step with zero gradients before the first real one",
            "zero=stage1 (the same memory on one rank), or trainer.precision=fp32",
            "0",
        )
    swaps = zero.offload_optimizer is OptimizerOffload.nvme
    for name, lowest in (("offload_optimizer", 3 if swaps else 1), ("offload_param", 3)):
        value = getattr(zero, name)
        if value.name != "none" and stage_of(zero) < lowest:
            reason = f"this needs stage {lowest}{'' if lowest == 3 else ' or more'}, and zero.stage is {stage_of(zero)}"
            preset = "stage3_nvme" if value is OptimizerOffload.nvme else "stage3_offload"
            yield Problem(f"zero.{name}", reason, f"zero={preset}, or zero.{name}=none", value.name)
    if zero.hpz and stage_of(zero) < 3:
        reason = f"each node copies what stage 3 partitions, the weights, and zero.stage is {stage_of(zero)}"
        yield Problem("zero.hpz", reason, "zero.stage=3, or zero.hpz=false", "true")
    if zero.hpz and zero.offload_param is not Offload.none:
        reason = "each node would keep its copy of the weights in host memory too, which was not measured"
        yield Problem("zero.hpz", reason, "zero.hpz=false, or zero.offload_param=none", "true")
    if swaps:
        yield from _check_states_on_a_disk(config)
    yield from settings_problems(zero.settings)


def _check_states_on_a_disk(config: RunConfig) -> Iterator[Problem]:
    """Yield what cannot be combined with `zero.offload_optimizer=nvme`."""
    if method_of(config.method).alters_updates:
        reason = f"it changes gradients and states outside of the optimizer, but {STATES_ON_A_DISK}"
        yield Problem("method", reason, "zero.offload_optimizer=cpu, or method=full", config.method.name)
    for name in ("l2sp", "ewc"):
        strength = getattr(config.forgetting, name)
        if strength:
            reason = f"it reads the weights outside of updates, but {STATES_ON_A_DISK}"
            yield Problem(f"forgetting.{name}", reason, "zero.offload_optimizer=cpu", format_value(strength))
    if config.trainer.precision is Precision.fp16:
        reason = "checkpoints of optimizer states on a disk do not contain the loss scale of fp16"
        yield Problem("trainer.precision", reason, "trainer.precision=bf16, or zero.offload_optimizer=cpu", "fp16")
    if config.checkpoint.mode is SaveMode["async"]:
        reason = f"it copies the states into memory before it saves them, but {STATES_ON_A_DISK}"
        yield Problem("checkpoint.mode", reason, "checkpoint.mode=sync", "async")
    offload = config.zero.settings.get("zero_optimization", {}).get("offload_optimizer", {})
    states = optimizer_of(config.optimizer).states_per_parameter
    needed = swap_buffers(states)
    if offload.get("buffer_count", needed) < needed:
        key = "zero.settings.zero_optimization.offload_optimizer.buffer_count"
        reason = f"an update needs the weights, the gradients and {states} optimizer states of a part at the same time"
        yield Problem(key, reason, f"{needed} or more", format_value(offload["buffer_count"]))
    if not config.zero.nvme_path.strip():
        yield Problem("zero.nvme_path", "no folder is given", "zero.nvme_path=/folder/on/a/local/disk", "''")
