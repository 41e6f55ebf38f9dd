"""Derives DeepSpeed's configuration from a RunConfig and the number of ranks, as a pure function."""

from __future__ import annotations

from typing import Any

from dstune.config.schema import GradientDtype, Offload, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.config.zero_rules import SWAPPED_AT_ONCE, overlaps, swap_buffers
from dstune.protocols import optimizer_of, parallelism_of

SHARD_SETTINGS = ("round_robin_gradients", "sub_group_size")
"""Keys of `zero_optimization` that decide, with the stage and the ranks, the order of elements in DeepSpeed's shards."""


def micro_batches_per_rank(config: RunConfig, world_size: int) -> int:
    """Return how many micro-batches each rank has in a full step, including fillers without targets. Ranks that share rows or
    weights have the same ones."""
    micro_batches = -(-config.trainer.global_batch_size // config.trainer.rows)
    return -(-micro_batches // max(1, world_size // parallelism_of(config.parallel).size))


def deepspeed_config(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    *,
    on_gpu: bool,
    prefetch: tuple[int, int] | None = None,
    copy_ranks: int = 1,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one run on `world_size` ranks. prefetch: from `planning.setup.prefetch`, if it knows
    the model. copy_ranks: from `node_copies.copy_ranks_of`.

    `precision` must be resolved (not `auto`). Every default that DeepSpeed has changed over time is set explicitly: since 0.19
    `gradient_clipping` defaults to 1.0, and `overlap_comm` depends on the stage.
    """
    assert precision is not Precision.auto
    per_rank = micro_batches_per_rank(config, world_size)
    # To DeepSpeed's arithmetic, ranks that share weights count as one; ranks that share rows do not.
    replicas = world_size // parallelism_of(config.parallel).weight_ranks
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.trainer.rows,
        "gradient_accumulation_steps": per_rank,
        "train_batch_size": config.trainer.rows * per_rank * replicas,
        "gradient_clipping": config.trainer.grad_clip,
        "zero_optimization": _zero(config, replicas, on_gpu=on_gpu, prefetch=prefetch)
        | ({"zero_hpz_partition_size": copy_ranks} if copy_ranks > 1 else {}),
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: as fast as DeepSpeed's, without a compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        # DeepSpeed's timer waits for the device before and after every micro-batch; `trainer/step_timer.py` does not.
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": precision is Precision.bf16} | _immediate(config, precision, on_gpu=on_gpu),
        # The loss scale starts at a value that does not overflow in a pretrained model's first steps, and grows from there.
        "fp16": {"enabled": precision is Precision.fp16, "loss_scale": 0, "initial_scale_power": 12},
    }
    if precision is not Precision.fp32:
        # Sums over many micro-batches in bf16, with its 8 bits of mantissa, lose small gradients (`benchmarks/gradient_dtype.py`).
        keeps_model_dtype = config.zero.gradient_dtype is GradientDtype.model
        settings["data_types"] = {"grad_accum_dtype": precision.value if keeps_model_dtype else "fp32"}
    return _merged(settings, config.zero.settings)


def _zero(config: RunConfig, replicas: int, *, on_gpu: bool, prefetch: tuple[int, int] | None) -> dict[str, Any]:
    """Return the section `zero_optimization`. replicas: the number of ranks as DeepSpeed counts them, where those that share
    weights are one."""
    stage = stage_of(config.zero)
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero |= {
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "overlap_comm": overlaps(config, replicas, on_gpu=on_gpu),
            # Without it, gradients stay where backward puts them, which saves 0.14 s of a step of 8.7 s on a CPU. A GPU's
            # allocator fragments without the contiguous buffer.
            "contiguous_gradients": on_gpu,
        }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.zero.param_persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        if prefetch is not None and on_gpu:
            zero["stage3_prefetch_bucket_size"], zero["stage3_max_live_parameters"] = prefetch
        if config.zero.offload_param is Offload.cpu:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    if stage > 0 and config.zero.offload_optimizer is OptimizerOffload.cpu:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if stage == 3 and config.zero.offload_optimizer is OptimizerOffload.nvme:
        zero["offload_optimizer"] = {
            "device": "nvme",
            "nvme_path": config.zero.nvme_path,
            "pin_memory": on_gpu,
            "buffer_count": swap_buffers(optimizer_of(config.optimizer).states_per_parameter),
        }
        zero["sub_group_size"] = SWAPPED_AT_ONCE
    return zero


def _immediate(config: RunConfig, precision: Precision, *, on_gpu: bool) -> dict[str, bool]:
    """Return the setting that adds each gradient to its sum at once, for stage 1 in bf16 with sums in fp32. Otherwise all bf16
    gradients of the model stay in memory beside the sums until the backward pass ends."""
    summed = (
        stage_of(config.zero) == 1 and precision is Precision.bf16 and config.zero.gradient_dtype is GradientDtype.fp32
    )
    return {"immediate_grad_update": True} if summed and on_gpu else {}


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` updated by `changes` (`zero.settings`). Offloading sections are ignored unless `settings` has them."""
    for key, value in changes.items():
        if isinstance(value, dict):
            if key in settings or not key.startswith("offload_"):
                settings[key] = _merged(dict(settings.get(key, {})), value)
        else:
            settings[key] = value
    return settings
