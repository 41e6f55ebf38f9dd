"""What other tools and DeepSpeed have and dstune does not offer: refused by its name, with the reason.

An option is offered when it was measured or held against a reference. These need GPUs, of which none could be reached, or a
data path of their own.
"""

from __future__ import annotations

from typing import Any

from dstune.core.errors import Problem

UNMEASURED = "it was neither held against a reference nor measured on a GPU yet"

FEATURES: dict[str, tuple[str, str]] = {
    "adafactor": (
        "Adafactor: it saves memory by the rows and columns of whole matrices, and ZeRO keeps vectors",
        "optimizer=adamw_8bit or optimizer=lion",
    ),
    "schedule_free": (
        "schedule-free AdamW: the weights to evaluate and export are others than those that it trains, in every checkpoint",
        "optimizer=adamw schedule=warmup_stable_decay",
    ),
    "fp8": (f"fp8: {UNMEASURED}", "trainer.precision=bf16"),
    "zeropp": (f"ZeRO++: {UNMEASURED}", "zero=stage3"),
    "zenflow": (f"ZenFlow: {UNMEASURED}", "zero=stage3_offload"),
    "superoffload": (f"SuperOffload: {UNMEASURED}", "zero=stage3_offload"),
    "nvme": (
        "NVMe for weights: only optimizer states on a disk were held against a reference",
        "zero=stage3_nvme, which has optimizer states on a disk and weights in the host's memory",
    ),
    "expert": (f"expert parallelism: {UNMEASURED}", "zero=stage3"),
    "flex": (
        "flex attention: torch has no backward pass of it on a CPU, and no GPU could be reached",
        "model.attention=auto",
    ),
    "liger": (
        "Liger's kernels run on GPUs alone, and none could be reached",
        "model.fused_activations=true and model.fused_rotary=true; norms keep their input alone, and logits are made in chunks",
    ),
    "offloaded": (
        "activations moved to the host's memory: those of a CPU are there already, and no GPU could be reached",
        "trainer.activation_checkpointing=true or selective",
    ),
    "compile": (
        (
            "torch.compile: compiled blocks hand their gradients over in another order on each rank, and ZeRO-2 sums them"
            " by their order: losses were wrong from the second step on; a gain at the other stages was not measured"
        ),
        "model.fused_activations=true and model.fused_rotary=true, which compile what has no weights",
    ),
}
"""By the name of a feature: why it is not offered, and what comes nearest."""

WORDS: dict[tuple[str, str], str] = {
    ("optimizer", "adafactor"): "adafactor",
    ("optimizer.name", "adafactor"): "adafactor",
    ("optimizer", "schedule_free"): "schedule_free",
    ("optimizer.name", "schedule_free"): "schedule_free",
    ("trainer.precision", "fp8"): "fp8",
    ("zero", "zeropp"): "zeropp",
    ("zero", "zenflow"): "zenflow",
    ("zero", "superoffload"): "superoffload",
    ("zero.offload_param", "nvme"): "nvme",
    ("parallel", "expert"): "expert",
    ("model.attention", "flex_attention"): "flex",
    ("model.attention", "flex"): "flex",
    ("model.liger", "true"): "liger",
    ("trainer.liger", "true"): "liger",
    ("trainer.use_liger_kernel", "true"): "liger",
    ("trainer.activation_checkpointing", "offload"): "offloaded",
    ("trainer.activation_checkpointing", "offloaded"): "offloaded",
    ("trainer.activation_checkpointing", "cpu"): "offloaded",
    ("trainer.activation_offloading", "true"): "offloaded",
    ("trainer.torch_compile", "true"): "compile",
    ("trainer.compile", "true"): "compile",
    ("model.compile", "true"): "compile",
}
"""What a user writes for them: key and value."""


def not_offered(key: str, value: Any) -> Problem | None:
    """Return the problem of an override that asks for something that dstune knows and does not offer."""
    word = str(value).lower()
    feature = WORDS.get((key, word))
    if feature is None:
        return None
    reason, fix = FEATURES[feature]
    return Problem(key, f"is not offered: {reason}", fix, word)
