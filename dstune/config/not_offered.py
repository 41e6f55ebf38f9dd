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
    "critic": (
        (
            "PPO with a critic: a second model as large as the policy would be trained, sharded and saved with it; the other"
            " completions of a prompt give the baseline instead (GRPO, arXiv:2402.03300)"
        ),
        "task=reinforcement task.loss=rloo, or another task.loss, which have PPO's clipped ratio",
    ),
    "moving_reference": (
        (
            "a reference model that follows the policy: `kl` would mean another distance at each step, and every checkpoint would"
            " have to hold a second model"
        ),
        "task.kl.coefficient=0.01, whose reference is the model at the start; model.path=RUN/export starts from a later one",
    ),
    "curriculum": (
        "a curriculum: the rows of a step depend on seed and step alone, never on rewards, so that a resumed run repeats them",
        "data.order=FILE with the rows of every step, easy ones first; task.redraws=4 leaves out what is too easy or too hard",
    ),
    "overlapped_rollouts": (
        (
            "rollouts that overlap with training: completions would come from older weights, by how fast the ranks were, so that"
            " a run could be neither repeated nor resumed to the bit"
        ),
        "task.rollout=fast or vllm, which sample with the current weights",
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
    ("task", "ppo"): "critic",
    ("task.loss", "ppo"): "critic",
    ("task.loss", "gae"): "critic",
    ("task.rollout", "async"): "overlapped_rollouts",
    ("task.rollout", "asynchronous"): "overlapped_rollouts",
}
"""The name of the feature by the key and value that a user writes for it."""

KEYS: dict[str, str] = {
    **dict.fromkeys(("task.critic", "task.critic_model", "task.value_model"), "critic"),
    **dict.fromkeys(("task.gae_lambda", "task.vf_coef", "task.cliprange_value"), "critic"),
    **dict.fromkeys(
        ("task.sync_ref_model", "task.ref_model_sync_steps", "task.ref_model_mixup_alpha"), "moving_reference"
    ),
    **dict.fromkeys(("task.kl.moving", "task.kl.sync_every"), "moving_reference"),
    **dict.fromkeys(("task.curriculum", "data.curriculum", "trainer.curriculum"), "curriculum"),
    **dict.fromkeys(("task.max_staleness", "task.staleness", "task.max_off_policy_steps"), "overlapped_rollouts"),
    **dict.fromkeys(("task.async", "task.one_step_off_policy"), "overlapped_rollouts"),
}
"""The name of the feature by a key that only the feature has, whatever its value, unless that switches it off."""


def not_offered(key: str, value: Any) -> Problem | None:
    """Return the problem if `key=value` asks for a feature that dstune does not offer; else None."""
    word = str(value).lower()
    feature = WORDS.get((key, word)) or (None if word in ("false", "none", "0") else KEYS.get(key))
    if feature is None:
        return None
    reason, fix = FEATURES[feature]
    return Problem(key, f"is not offered: {reason}", fix, word)
