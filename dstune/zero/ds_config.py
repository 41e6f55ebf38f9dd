"""RunConfig + world size -> DeepSpeed's configuration, as a pure function."""

from __future__ import annotations

from typing import Any

from dstune.config.schema import GradientDtype, Offload, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.config.zero_rules import SWAPPED_AT_ONCE, overlaps, swap_buffers
from dstune.protocols import optimizer_of, parallelism_of

SHARD_SETTINGS = ("round_robin_gradients", "sub_group_size")
"""Of `zero_optimization`: what decides which elements stand where in DeepSpeed's shards, beside stage and ranks."""


def micro_batches_per_rank(config: RunConfig, world_size: int) -> int:
    """Return the micro-batches of a full step on each rank, zero-target fillers included. Ranks of a group have the same ones."""
    micro_batches = -(-config.trainer.global_batch_size // config.trainer.rows)
    return -(-micro_batches // max(1, world_size // parallelism_of(config.parallel).size))


def deepspeed_config(
    config: RunConfig, world_size: int, precision: Precision, *, on_gpu: bool, prefetch: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one run on `world_size` ranks. prefetch: of `planning.setup.prefetch`, where the model
    is known.

    `precision` is resolved (never `auto`). Every default that DeepSpeed has changed over time is written out:
    `gradient_clipping` is 1.0 when absent since 0.19, `overlap_comm` depends on the stage.
    """
    assert precision is not Precision.auto
    per_rank = micro_batches_per_rank(config, world_size)
    # Ranks that share weights are one to DeepSpeed's arithmetic, those that share rows are not.
    replicas = world_size // parallelism_of(config.parallel).weight_ranks
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.trainer.rows,
        "gradient_accumulation_steps": per_rank,
        "train_batch_size": config.trainer.rows * per_rank * replicas,
        "gradient_clipping": config.trainer.grad_clip,
        "zero_optimization": _zero(config, replicas, on_gpu=on_gpu, prefetch=prefetch),
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: as fast as DeepSpeed's, without a compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        # It waits for the device before and after every micro-batch; `trainer/step_timer.py` does not.
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": precision is Precision.bf16} | _immediate(config, precision, on_gpu=on_gpu),
        # The scale starts where a pretrained model survives the first steps and grows from there.
        "fp16": {"enabled": precision is Precision.fp16, "loss_scale": 0, "initial_scale_power": 12},
    }
    if precision is not Precision.fp32:
        # bf16 sums of many micro-batches lose the small gradients: 8 bits of mantissa (`benchmarks/gradient_dtype.py`).
        keeps_model_dtype = config.zero.gradient_dtype is GradientDtype.model
        settings["data_types"] = {"grad_accum_dtype": precision.value if keeps_model_dtype else "fp32"}
    return _with(settings, config.zero.settings)


def _zero(config: RunConfig, replicas: int, *, on_gpu: bool, prefetch: tuple[int, int] | None) -> dict[str, Any]:
    """Return the section `zero_optimization`. replicas: ranks with weights of their own, as DeepSpeed counts them."""
    stage = stage_of(config.zero)
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero |= {
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "overlap_comm": overlaps(config, replicas, on_gpu=on_gpu),
            # Gradients stay where backward puts them: 0.14 s of a 8.7 s step on a CPU; a GPU's allocator fragments
            # without the contiguous buffer.
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
    """Return the settings that add a gradient to its sum as soon as it is there, at stage 1 in bf16 with sums in fp32: else
    those of the whole model are held in bf16 beside their sums until the backward pass ends."""
    summed = (
        stage_of(config.zero) == 1 and precision is Precision.bf16 and config.zero.gradient_dtype is GradientDtype.fp32
    )
    return {"immediate_grad_update": True} if summed and on_gpu else {}


def _with(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with `zero.settings` in it; what it says about offloading needs something to be offloaded."""
    for key, value in changes.items():
        if isinstance(value, dict):
            if key in settings or not key.startswith("offload_"):
                settings[key] = _with(dict(settings.get(key, {})), value)
        else:
            settings[key] = value
    return settings
