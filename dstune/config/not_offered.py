"""Lists features of other tools and DeepSpeed that dstune does not offer, with the reason for refusing each.

dstune offers an option once it has been measured or compared with a reference. These need GPUs, none of which could be reached, or
a separate data path.
"""

from __future__ import annotations

from typing import Any

from dstune.core.errors import Problem

UNMEASURED = "it has been neither compared with a reference nor measured on a GPU yet"

FEATURES: dict[str, tuple[str, str]] = {
    "adafactor": (
        "Adafactor: it saves memory by keeping rows and columns of complete matrices, but ZeRO keeps flat vectors",
        "optimizer=adamw_8bit or optimizer=lion",
    ),
    "schedule_free": (
        "schedule-free AdamW: it evaluates and exports other weights than it trains, which every checkpoint would have to store",
        "optimizer=adamw schedule=warmup_stable_decay",
    ),
    "fp8": (f"fp8: {UNMEASURED}", "trainer.precision=bf16"),
    "zeropp": (
        "ZeRO++ is three settings: hpZ, which changes no result, is zero.hpz; qwZ and qgZ round what is sent to fewer bits",
        "zero=stage3 zero.hpz=true",
    ),
    "qwz": (
        (
            "qwZ sends weights in 8 bits (arXiv:2306.10209), so that a run's result depends on its number of ranks,"
            f" and its kernels run on GPUs only: {UNMEASURED}"
        ),
        "zero.hpz=true",
    ),
    "qgz": (
        (
            "qgZ sends gradients in 4 bits (arXiv:2306.10209), so that a run's result depends on its number of ranks,"
            f" and its kernels run on GPUs only: {UNMEASURED}"
        ),
        "zero.hpz=true",
    ),
    "mics": (
        "MiCS was removed from DeepSpeed in 0.19, which refuses the key",
        "zero.hpz=true, which also gathers weights within a node",
    ),
    "zenflow": (
        (
            "ZenFlow applies only the largest gradients at once and the others some steps later (arXiv:2505.12242), so it is"
            f" another algorithm than the optimizer's; {UNMEASURED}"
        ),
        "zero=stage3_offload",
    ),
    "superoffload": (
        (
            "SuperOffload updates weights before the gradient's norm is known and takes such updates back (arXiv:2509.21271);"
            f" DeepSpeed 0.19.8 starts it on NVIDIA GPUs alone, and {UNMEASURED}"
        ),
        "zero=stage3_offload",
    ),
    "nvme": (
        "NVMe for weights: only optimizer states on a disk were compared with a reference",
        "zero=stage3_nvme, which has optimizer states on a disk and weights in the host's memory",
    ),
    "expert": (
        "expert parallelism: DeepSpeed 0.19.8's AutoEP fails with transformers 5.24 when it starts (docs/experts.md)",
        "zero=stage3, which partitions experts like other weights",
    ),
    "flex": (
        "flex attention: torch has no backward pass of it on a CPU, and no GPU could be reached",
        "model.attention=auto",
    ),
    "liger": (
        "Liger's kernels run only on GPUs, and none could be reached to measure them",
        "model.fused_activations=true and model.fused_rotary=true; norms keep their input alone, and logits are made in chunks",
    ),
    "offloaded": (
        "activations in host memory: on a CPU they are there already, and no GPU could be reached to measure them",
        "trainer.activation_checkpointing=true or selective",
    ),
    "deepcompile": (
        "DeepCompile compiles ZeRO's gathers into the model's graph, for GPUs only, and is built on torch.compile",
        "zero.hpz=true between nodes, and model.fused_activations=true",
    ),
    "compile": (
        (
            "torch.compile: compiled blocks deliver their gradients in a different order on each rank, and ZeRO-2 sums them"
            " by that order, so losses were wrong from the second step on; a gain at the other stages was not measured"
        ),
        "model.fused_activations=true and model.fused_rotary=true, which compile what has no weights",
    ),
}
"""By the name of a feature: why it is not offered, and the nearest alternative."""

WORDS: dict[tuple[str, str], str] = {
    ("optimizer", "adafactor"): "adafactor",
    ("optimizer.name", "adafactor"): "adafactor",
    ("optimizer", "schedule_free"): "schedule_free",
    ("optimizer.name", "schedule_free"): "schedule_free",
    ("trainer.precision", "fp8"): "fp8",
    ("zero", "zeropp"): "zeropp",
    ("zero", "mics"): "mics",
    ("zero.compile", "true"): "deepcompile",
    ("zero.deepcompile", "true"): "deepcompile",
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
"""The name of the feature by the key and value that a user writes for it."""


def not_offered(key: str, value: Any) -> Problem | None:
    """Return the problem if `key=value` asks for a feature that dstune does not offer; else None."""
    word = str(value).lower()
    feature = WORDS.get((key, word))
    if feature is None:
        return None
    reason, fix = FEATURES[feature]
    return Problem(key, f"is not offered: {reason}", fix, word)
