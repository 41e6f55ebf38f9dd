"""DeepSpeed files as people have them: in the shapes that DeepSpeed, transformers, axolotl and LLaMA-Factory publish, and with keys
left out for which DeepSpeed has a default."""

from __future__ import annotations

from typing import Any

AUTO_SIZES: dict[str, Any] = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)
AUTO_ADAM: dict[str, Any] = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
RATES: dict[str, Any] = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")


def stage(number: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **keys}}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


SAME: dict[str, dict[str, Any]] = {
    # DeepSpeed's pages: tutorials of CIFAR, BERT, Megatron and the getting-started page
    "getting-started": {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
        "fp16": {"enabled": True},
        **stage(1),
    },
    "cifar": {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        **scheduler("WarmupLR", warmup_min_lr=0, warmup_max_lr=0.001, warmup_num_steps=1000),
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
        "wall_clock_breakdown": False,
        **stage(0, allgather_partitions=True, reduce_scatter=True, allgather_bucket_size=50000000),
    },
    "bert": {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 0.0,
        **adam(lr=4e-3, weight_decay=0.01, bias_correction=True),
        **scheduler("WarmupDecayLR", warmup_min_lr=1e-4, warmup_max_lr=4e-3, warmup_num_steps=5, total_num_steps=20),
        "fp16": {"enabled": False},
        **stage(1),
    },
    "reference page of bf16": {"train_batch_size": 8, "bf16": {"enabled": True}, **adam(lr=1e-4), **stage(2)},
    "former name of bf16": {"train_batch_size": 8, "bfloat16": {"enabled": True}, **stage(2)},
    "both names of bf16": {
        "train_batch_size": 8,
        "bf16": {"enabled": False},
        "bfloat16": {"enabled": True},
        **stage(2),
    },
    "texts as switches": {"train_batch_size": 8, "bf16": {"enabled": "false"}, "fp16": {"enabled": "off"}, **stage(1)},
    "a text that switches on": {"train_batch_size": 8, "bf16": {"enabled": "True"}, **stage(1)},
    # transformers' documentation
    "trainer, stage 2": {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": AUTO_ADAM,
        **scheduler("WarmupLR", **RATES),
        **stage(2, allgather_bucket_size=2e8, reduce_bucket_size=2e8, overlap_comm=True, contiguous_gradients=True),
        "gradient_clipping": "auto",
        **AUTO_SIZES,
    },
    "trainer, stage 3": {
        "bf16": {"enabled": "auto"},
        "optimizer": AUTO_ADAM,
        **scheduler("WarmupDecayLR", total_num_steps="auto", **RATES),
        **stage(3, stage3_prefetch_bucket_size="auto", stage3_max_live_parameters=1e9, sub_group_size=1e9),
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        **AUTO_SIZES,
    },
    "trainer, numbers and auto": {
        **adam(lr=3e-5, betas="auto", eps=1e-6, weight_decay=0.1),
        **scheduler("WarmupLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps=7),
        **stage(2),
        "bf16": {"enabled": False},
        **AUTO_SIZES,
    },
    # axolotl, LLaMA-Factory
    "axolotl, stage 1": {
        **stage(1, overlap_comm=True),
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32},
        "gradient_clipping": "auto",
        **AUTO_SIZES,
        "wall_clock_breakdown": False,
    },
    "llama-factory, stage 0": {
        **AUTO_SIZES,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": "auto", "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        **stage(0, overlap_comm=False, round_robin_gradients=True),
    },
    # schedules
    "warm-up by default": {"train_batch_size": 8, **adam(lr=2e-4), **scheduler("WarmupLR")},
    "no warm-up type": {"train_batch_size": 8, **adam(lr=2e-4), **scheduler("WarmupLR", warmup_num_steps=10)},
    "linear warm-up": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupLR", warmup_num_steps=10, warmup_type="linear"),
    },
    "warm-up of one step": {"train_batch_size": 8, **adam(lr=2e-4), **scheduler("WarmupLR", warmup_num_steps=1)},
    "warm-up from a rate to another than the optimizer's": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupLR", warmup_min_lr=1e-5, warmup_max_lr=3e-4, warmup_num_steps=10),
    },
    "decay without a peak": {
        "train_batch_size": 8,
        **adam(lr=2e-5),
        **scheduler("WarmupDecayLR", total_num_steps=30, warmup_num_steps=4),
    },
    "decay that ends before the run": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupDecayLR", total_num_steps=15, warmup_num_steps=4, warmup_max_lr=2e-4, warmup_min_lr=2e-5),
    },
    "decay longer than the run": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupDecayLR", total_num_steps=500, warmup_num_steps=4, warmup_max_lr=2e-4, warmup_type="linear"),
    },
    "warm-up longer than the decay": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupDecayLR", total_num_steps=5, warmup_num_steps=12, warmup_max_lr=2e-4),
    },
    "cosine": {"train_batch_size": 8, **adam(lr=2e-4), **scheduler("WarmupCosineLR", total_num_steps=30)},
    "cosine with ratios": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler(
            "WarmupCosineLR",
            total_num_steps=30,
            warmup_num_steps=6,
            warmup_min_ratio=0.2,
            cos_min_ratio=0.05,
            warmup_type="linear",
        ),
    },
    "cosine of the run's length": {
        "train_batch_size": 8,
        **adam(lr=2e-4),
        **scheduler("WarmupCosineLR", total_num_steps="auto", warmup_num_steps=6),
    },
    # optimizers
    "no rate": {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, **stage(1)},
    "no rate, torch's Adam": {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"torch_adam": True}}},
    "AdamW, whose mode DeepSpeed ignores": {"train_batch_size": 8, **adam(lr=1e-4, adam_w_mode=False)},
    "SGD": {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    "SGD without a rate": {"train_batch_size": 8, "optimizer": {"type": "SGD"}},
    "Muon, its rate left to the script": {
        "train_batch_size": 8,
        "optimizer": {"type": "Muon", "params": {"lr": "auto", "momentum": 0.9, "weight_decay": 0.1}},
    },
    # batches, clipping
    "batch and steps": {"train_batch_size": 24, "gradient_accumulation_steps": 3, "gradient_clipping": 0.3},
    "micro-batch alone": {"train_micro_batch_size_per_gpu": 6},
    "micro-batch and steps": {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2},
    "all three sizes": {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 5,
    },
}
"""Files for which a run has DeepSpeed's rates, clipping, precision and batches."""

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "Adam with an L2 penalty": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-4, "adam_w_mode": False}}},
        "optimizer.params.adam_w_mode",
        "do not do this",
    ),
    "clipping by the optimizer": (adam(lr=1e-4, max_grad_norm=0), "optimizer.params.max_grad_norm", "no such key"),
    "a misspelt section": ({"optimizer": {"type": "AdamW", "parms": {"lr": 1}}}, "optimizer.parms", "ignores this key"),
    "an optimizer without a type": ({"optimizer": {"params": {"lr": 1e-4}}}, "optimizer.type", "ignores"),
    "Lamb": ({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, "optimizer.type", "no such optimizer"),
    "Muon's rates": (
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": "auto"}}},
        "optimizer.params.muon_lr",
        "clips updates instead of gradients",
    ),
    "Muon's default rate": ({"optimizer": {"type": "Muon"}}, "optimizer.params.lr", "no rate of dstune's Muon"),
    "moments in half precision": (
        adam(lr=1e-4, fp32_optimizer_states=False),
        "optimizer.params.fp32_optimizer_states",
        "do not do this",
    ),
    "a schedule without a type": ({"scheduler": {"params": {"warmup_num_steps": 9}}}, "scheduler.type", "ignores"),
    "decay without an end": (scheduler("WarmupDecayLR"), "scheduler.params.total_num_steps", "needs it"),
    "cycles": (scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=1e-4), "scheduler.type", "no such schedule"),
    "no step of warm-up": (scheduler("WarmupLR", warmup_num_steps=0), "scheduler.params.warmup_num_steps", "at least"),
    "a warm-up that DeepSpeed does not know": (
        scheduler("WarmupLR", warmup_type="exp"),
        "scheduler.params.warmup_type",
        "log or linear",
    ),
    "rates by group": (
        scheduler("WarmupLR", warmup_max_lr=[1e-4, 1e-3]),
        "scheduler.params.warmup_max_lr",
        "one rate",
    ),
    "a parameter of another schedule": (
        scheduler("WarmupCosineLR", total_num_steps=9, warmup_max_lr=1e-4),
        "scheduler.params.warmup_max_lr",
        "no such parameter",
    ),
    "a batch that does not fit": (
        {"train_batch_size": 10, "gradient_accumulation_steps": 3},
        "gradient_accumulation_steps",
        "are not divided by",
    ),
    "bf16 and fp16": ({"bf16": {"enabled": True}, "fp16": {"enabled": "yes"}}, "fp16.enabled", "bf16 is enabled too"),
    "a switch that is neither": ({"bf16": {"enabled": "maybe"}}, "bf16.enabled", "expected true or false"),
    "sums in another format": ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", "fp32"),
}
"""By name: the file, the key that is refused, and words of the reason."""
