"""Says what happens to each key of a DeepSpeed configuration: the tables for `zero=file` and `zero.settings`.

Keys are dotted paths (`zero_optimization.stage`). A key that is in none of the tables is refused, because a setting that nobody has
examined may change what is computed.
"""

from __future__ import annotations

from typing import Any

from dstune.config.not_offered import FEATURES

ZERO = "zero_optimization"

OWN_KEYS = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_clipping": "trainer.grad_clip",
    f"{ZERO}.stage": "zero.stage",
    f"{ZERO}.offload_optimizer.device": "zero.offload_optimizer",
    f"{ZERO}.offload_optimizer.nvme_path": "zero.nvme_path",
    f"{ZERO}.offload_param.device": "zero.offload_param",
    f"{ZERO}.reduce_bucket_size": "zero.reduce_bucket_size",
    f"{ZERO}.overlap_comm": "zero.overlap_comm",
    f"{ZERO}.param_persistence_threshold": "zero.param_persistence_threshold",
    f"{ZERO}.stage3_param_persistence_threshold": "zero.param_persistence_threshold",
}
"""Keys for which dstune has one of its own."""

TRANSLATED = {
    "gradient_accumulation_steps": "trainer.global_batch_size",
    "fp16.enabled": "trainer.precision",
    "bf16.enabled": "trainer.precision",
    "bfloat16.enabled": "trainer.precision",
    "optimizer.type": "optimizer",
    "scheduler.type": "schedule",
    f"{ZERO}.zero_hpz_partition_size": "zero.hpz",
}
"""Keys that correspond to one of dstune's, with other values (`deepspeed_file` translates these)."""

PASSED: dict[str, type] = {
    "communication_data_type": str,
    "fp16.loss_scale": float,
    "fp16.initial_scale_power": int,
    "fp16.loss_scale_window": int,
    "fp16.hysteresis": int,
    "fp16.consecutive_hysteresis": bool,
    "fp16.min_loss_scale": float,
    f"{ZERO}.contiguous_gradients": bool,
    f"{ZERO}.reduce_scatter": bool,
    f"{ZERO}.use_multi_rank_bucket_allreduce": bool,
    f"{ZERO}.allgather_partitions": bool,
    f"{ZERO}.allgather_bucket_size": int,
    f"{ZERO}.round_robin_gradients": bool,
    f"{ZERO}.ignore_unused_parameters": bool,
    f"{ZERO}.memory_efficient_linear": bool,
    f"{ZERO}.log_trace_cache_warnings": bool,
    f"{ZERO}.sub_group_size": int,
    **{
        f"{ZERO}.{prefix}{name}": kind
        for prefix in ("", "stage3_")
        for name, kind in {
            "prefetch_bucket_size": int,
            "model_persistence_threshold": int,
            "max_live_parameters": int,
            "max_reuse_distance": int,
            "module_granularity_threshold": int,
            "use_all_reduce_for_fetch_params": bool,
            "allgather_sequential": bool,
        }.items()
    },
    **{f"{ZERO}.offload_{part}.pin_memory": bool for part in ("optimizer", "param")},
    **{f"{ZERO}.offload_{part}.buffer_count": int for part in ("optimizer", "param")},
    f"{ZERO}.offload_optimizer.cpuadam_cores_perc": float,
    f"{ZERO}.offload_param.buffer_size": int,
    f"{ZERO}.offload_param.max_in_cpu": int,
    "aio.block_size": int,
    "aio.queue_depth": int,
    "aio.intra_op_parallelism": int,
    "aio.single_submit": bool,
    "aio.overlap_events": bool,
}
"""Keys that are passed to DeepSpeed unchanged, with the type of their value."""

GATHER = f"{ZERO}.gather_16bit_weights_on_model_save"
WITHOUT_EFFECT = {
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "seq_parallel_communication_data_type",
    "aio.thread_count",  # the former name of intra_op_parallelism
    GATHER,
    GATHER.replace(".", ".stage3_"),
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save",
}
"""Keys for what dstune does itself: its own log, torch's optimizers, its own export. They are ignored."""

ELSEWHERE = "dstune does this by itself"
NOT_YET = "this version does not support it"
QWZ, QGZ, MICS, ZENFLOW, SUPEROFFLOAD, NVME, EXPERT, COMPILE, DEEPCOMPILE = (
    FEATURES[name][0]
    for name in ("qwz", "qgz", "mics", "zenflow", "superoffload", "nvme", "expert", "compile", "deepcompile")
)
FIXED: dict[str, tuple[Any, str]] = {
    "wall_clock_breakdown": (False, f"{ELSEWHERE}: step_seconds in metrics.jsonl"),
    "memory_breakdown": (False, f"{ELSEWHERE}: peak_memory_gib in metrics.jsonl"),
    "dump_state": (False, f"{ELSEWHERE}: run.yaml and environment.json"),
    "prescale_gradients": (False, "the loss is scaled to the mean over the whole global batch"),
    "gradient_predivide_factor": (1.0, "the loss is scaled to the mean over the whole global batch"),
    "gradient_allreduce_op": ("mean", "the loss is scaled to the mean over the whole global batch"),
    "managed_gradient_accumulation": (True, "the trainer closes a step's micro-batches"),
    "sparse_gradients": (False, NOT_YET),
    "disable_allgather": (False, NOT_YET),
    "disable_python_gc": (False, NOT_YET),
    "dataloader_drop_last": (False, "every row is trained, whatever the number of ranks"),
    "data_types.grad_accum_dtype": ("fp32", "gradients of half precision accumulate in fp32"),
    "fp16.auto_cast": (False, "inputs are token numbers"),
    "fp16.fp16_master_weights_and_grads": (False, "weights are updated in fp32"),
    "bf16.immediate_grad_update": (False, "gradients are applied once per step"),
    "bf16.check_grad_overflow": (True, "a step with non-finite gradients is skipped on all ranks"),
    "bf16.bf16_master_weights_and_grads": (False, "weights are updated in fp32"),
    "bf16.bf16_optimizer_states": (False, "optimizer states are fp32"),
    f"{ZERO}.load_from_fp32_weights": (True, "checkpoints are dstune's own"),
    f"{ZERO}.elastic_checkpoint": (False, "checkpoints are dstune's own"),
    f"{ZERO}.pipeline_loading_checkpoint": (False, "checkpoints are dstune's own"),
    f"{ZERO}.legacy_stage1": (False, NOT_YET),
    f"{ZERO}.compute_grad_norm": (True, "the norm is clipped by and written to metrics.jsonl"),
    f"{ZERO}.override_module_apply": (True, NOT_YET),
    f"{ZERO}.parameter_alignment": (False, NOT_YET),
    f"{ZERO}.enable_sanity_checks": (False, NOT_YET),
    f"{ZERO}.zero_quantized_weights": (False, QWZ),
    f"{ZERO}.zero_quantized_nontrainable_weights": (False, QWZ),
    f"{ZERO}.zero_quantized_gradients": (False, QGZ),
    f"{ZERO}.mics_shard_size": (-1, MICS),
    f"{ZERO}.mics_hierarchical_params_gather": (False, MICS),
    f"{ZERO}.cpu_offload": (False, "this old key is offload_optimizer today"),
    f"{ZERO}.cpu_offload_param": (False, "this old key is offload_param today"),
    f"{ZERO}.cpu_offload_use_pin_memory": (False, "this old key is pin_memory of an offload section today"),
    f"{ZERO}.offload_optimizer.ratio": (1.0, f"offloading a part: {NOT_YET}"),
    f"{ZERO}.offload_optimizer.super_offload": (False, SUPEROFFLOAD),
    **{
        f"{ZERO}.offload_optimizer.{name}": (False, NOT_YET)
        for name in ("pipeline_read", "pipeline_write", "fast_init")
    },
    f"{ZERO}.offload_param.nvme_path": (None, NVME),
    "aio.use_gds": (False, NOT_YET),
    **{
        f"activation_checkpointing.{name}": (
            off,
            "activations are computed again by trainer.activation_checkpointing=true",
        )
        for name, off in {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
            "number_checkpoints": None,
        }.items()
    },
}
"""Keys that are accepted only with the value that describes what dstune does anyway: that value, and the reason."""

MONITOR = "set tracking.* instead"
REFUSED = {
    "amp": "DeepSpeed has no apex any more; precision is trainer.precision",
    "autotuning": f"it starts runs of its own; {NOT_YET}",
    "checkpoint": "checkpoints are dstune's own",
    "comet": MONITOR,
    "comms_config": MONITOR,
    "comms_logger": MONITOR,
    "compile": f"{COMPILE}; {DEEPCOMPILE}",
    "compression_training": NOT_YET,
    "csv_monitor": f"{ELSEWHERE}: metrics.jsonl",
    "curriculum_learning": "the order of rows is dstune's own, so that a run can be continued",
    "data_efficiency": "the order of rows is dstune's own, so that a run can be continued",
    "eigenvalue": NOT_YET,
    "elasticity": "the global batch never changes: the loss is the mean over it on any number of ranks",
    "expert_parallel": EXPERT,
    "flops_profiler": f"{ELSEWHERE}: utilization in metrics.jsonl, and trainer.profile_steps=N",
    "hybrid_engine": NOT_YET,
    "monitor_config": MONITOR,
    "nebula": "checkpoints are dstune's own",
    "pipeline": NOT_YET,
    "progressive_layer_drop": NOT_YET,
    "quantize_training": NOT_YET,
    "sequence_parallel_size": "set parallel=ulysses parallel.size=N instead",
    "sparse_attention": NOT_YET,
    "tensor_parallel": "set parallel=tensor parallel.size=N instead",
    "tensorboard": MONITOR,
    "timers": MONITOR,
    "torch_autocast": "precision is trainer.precision",
    "wandb": "set tracking.wandb.mode instead",
    "weight_quantization": NOT_YET,
    "zero_optimization.zenflow": ZENFLOW,
    "zero_optimization.leaf_module": NOT_YET,
    "zero_optimization.zeropp_loco_param": QGZ,
}
"""Sections that are refused unless they are switched off, with the reason."""

OFFLOADED = '"offload_%s": {"device": "cpu"}'
INSTEAD: dict[str, str] = {
    "amp": "trainer.precision=bf16",
    "torch_autocast": "trainer.precision=bf16",
    "sequence_parallel_size": "parallel=ulysses parallel.size={size}",
    "tensor_parallel": "parallel=tensor parallel.size={size}",
    "flops_profiler": "trainer.profile_steps=5",
    "wandb": "tracking.wandb.mode=online",
    "data_types.grad_accum_dtype": "zero.gradient_dtype=model",
    **{
        f"{ZERO}.{name}": f"{FEATURES[feature][1]}"
        for name, feature in {
            "zero_quantized_weights": "qwz",
            "zero_quantized_nontrainable_weights": "qwz",
            "zero_quantized_gradients": "qgz",
            "mics_shard_size": "mics",
            "mics_hierarchical_params_gather": "mics",
        }.items()
    },
    **{
        key: "trainer.activation_checkpointing=true"
        for key in FIXED
        if key.startswith("activation_checkpointing.") and not key.endswith(("profile", "number_checkpoints"))
    },
}
"""dstune's settings for what a refused key is for. {size}: the number of ranks that the value names."""
RENAMED: dict[str, str] = {
    f"{ZERO}.cpu_offload": OFFLOADED % "optimizer",
    f"{ZERO}.cpu_offload_param": OFFLOADED % "param",
    f"{ZERO}.cpu_offload_use_pin_memory": '"offload_optimizer": {"device": "cpu", "pin_memory": true}',
}
"""What the file says today instead of a former key."""
