"""Imports GRPO and its variants from TRL's keys, which axolotl has too, below `trl:`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.importing.result import DIFFERENT, MEANINGLESS, Import

LOSSES = ("dapo", "grpo", "dr_grpo", "cispo")
"""Values of TRL's `loss_type` that `task.loss` has under the same name."""
REWARDS = {
    "accuracy_reward": "boxed_answer",
    "think_format_reward": "reasoning_format",
}
"""TRL's built-in reward functions, and their counterparts in dstune."""
DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 512,
    "temperature": 1.0,
    "beta": 0.0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "num_iterations": 1,
    "epsilon": 0.2,
}
"""Defaults of TRL 1.16's GRPOTrainer for absent keys."""
SCALES = {
    True: "group",
    False: "none",
    "True": "group",
    "False": "none",
    "group": "group",
    "batch": "batch",
    "none": "none",
}
OWN_WAY = {
    **dict.fromkeys(
        (
            *("use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_base_url"),
            *("vllm_server_timeout", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"),
            *("vllm_enable_sleep_mode", "vllm_max_model_length"),
        ),
        "the trained model generates the completions itself; for a vLLM server, set task.rollout=vllm and task.rollout_url",
    ),
    **dict.fromkeys(("use_transformers_paged", "rollout_func"), "the trained model generates the completions itself"),
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_cap", "vllm_importance_sampling_mode"),
        "the trained model is also the sampler; with task.rollout=vllm, set task.importance_cap and task.correction",
    ),
    "ds3_gather_for_generation": "weights are gathered if they fit into memory",
    "steps_per_generation": "a step trains on all of its completions",
    "generation_batch_size": "trainer.micro_batch_size prompts are answered at a time",
    "log_completions": "every completion is in RUN/rollouts and in the report",
    "num_completions_to_print": "every completion is in RUN/rollouts and in the report",
    "log_unique_prompts": "every completion is in RUN/rollouts and in the report",
    "shuffle_dataset": "rows are shuffled each epoch",
    "disable_dropout": "the trained model has no dropout",
    "remove_unused_columns": "rewards receive all columns of a row",
    "cast_lm_head_to_fp32": "log-probabilities are computed in fp32",
}
"""Keys that dstune handles in its own way, with the reason."""
KEYS = (
    *(
        "num_generations",
        "num_generations_eval",
        "temperature",
        "scale_rewards",
        "num_iterations",
        "epsilon",
        "epsilon_high",
    ),
    *("mask_truncated_completions", "reward_funcs", "reward_weights", "reward_model_name_or_path"),
    *("importance_sampling_level", "top_p", "top_k", "min_p", "repetition_penalty", "chat_template_kwargs"),
    *(name for name in OWN_WAY if name not in ("shuffle_dataset", "disable_dropout")),
)
"""Keys of `put_policy` that only GRPO has; it also reads `loss_type`, `beta` and `max_completion_length`."""
MISSING = (
    *("generation_kwargs", "cache_implementation", "use_adaptive_entropy"),
    *("multi_objective_aggregation", "sapo_temperature_neg", "sapo_temperature_pos", "max_tool_calling_iterations"),
    *("vllm_structured_outputs_regex", "use_bias_correction_kl", "use_transformers_continuous_batching"),
)
Put = Callable[[str, tuple[str, Any]], None]
"""Called with the other tool's key and the pair (dstune's key, value) that it becomes."""


def put_policy(imported: Import, settings: Mapping[str, Any], drop: Callable[..., None], put: Put) -> None:
    """Convert settings of GRPO into those of `task=reinforcement`.

    settings: by TRL's names, including its defaults. drop, put: called with the key that is dropped or carried. Raises UserError
    for a loss that dstune does not have.
    """
    imported.choose("task", "reinforcement")
    has_sequence_ratios = settings.get("importance_sampling_level") in ("sequence", "sequence_token")
    loss = str(settings["loss_type"])
    if loss not in LOSSES:
        raise UserError(Problem("loss_type", "this loss is not supported", f"one of {', '.join(LOSSES)}", loss))
    put("loss_type", ("task.loss", "gspo" if has_sequence_ratios else loss))
    put("num_generations", ("task.samples", int(settings["num_generations"])))
    if settings.get("num_generations_eval"):
        put("num_generations_eval", ("task.evaluation_samples", int(settings["num_generations_eval"])))
    put("max_completion_length", ("task.max_new_tokens", int(settings["max_completion_length"])))
    put("temperature", ("task.temperature", float(settings["temperature"])))
    put("scale_rewards", ("task.scale_rewards", SCALES.get(settings["scale_rewards"], "auto")))
    put("beta", ("task.kl.coefficient", float(settings["beta"])))
    updates = int(settings["num_iterations"])
    put("num_iterations", ("task.updates", updates))
    low = float(settings["epsilon"])
    high = float(settings.get("epsilon_high") or low)
    if updates > 1:
        put("epsilon", ("task.clip_low", low))
        put("epsilon_high", ("task.clip_high", high))
    else:
        reason = "with one update per rollout every ratio is 1, so nothing is clipped"
        drop("epsilon", reason, MEANINGLESS)
        drop("epsilon_high", reason, MEANINGLESS)
    if settings.get("mask_truncated_completions"):
        put("mask_truncated_completions", ("task.mask_truncated", True))
    _put_rewards(imported, settings, drop, put)
    for name, reason in OWN_WAY.items():
        drop(name, reason, MEANINGLESS)
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        if settings.get(name) not in (None, 0, 1, 1.0, 0.0, -1):
            drop(
                name,
                "dstune samples from all tokens, at task.temperature, which is also the distribution that it trains",
            )
        else:
            drop(name, "dstune samples from all tokens", MEANINGLESS)
    if settings.get("chat_template_kwargs"):
        put("chat_template_kwargs", ("task.chat_template_kwargs", dict(settings["chat_template_kwargs"])))


def _put_rewards(imported: Import, settings: Mapping[str, Any], drop: Callable[..., None], put: Put) -> None:
    functions = settings.get("reward_funcs") or []
    functions = [functions] if isinstance(functions, str) else list(functions)
    judge = settings.get("reward_model_name_or_path")
    functions = ([judge] if judge else []) + functions  # the order of TRL's script, and so that of the weights
    rewards = [REWARDS[name] for name in functions if name in REWARDS]
    others = [str(name) for name in functions if name not in REWARDS]
    models = [name for name in others if "/" in name or name == judge]
    own_functions = [name for name in others if name not in models]
    if rewards:
        put("reward_funcs", ("task.rewards", rewards))
        if "boxed_answer" in rewards:
            imported.assume(
                "accuracy_reward became boxed_answer, which reads the column answer: data.columns={answer: solution}"
            )
    if models:
        put("reward_model_name_or_path", ("task.reward_models", models))
    if own_functions:
        fix = "register it: @dstune.reward above the function, plugins=[./FILE.py] task.rewards=[NAME]"
        drop("reward_funcs", f"{', '.join(own_functions)}: Python functions of your own; {fix}")
        imported.assume("register each reward function of your own (docs/reinforcement.md) and name it in task.rewards")
    weights = list(settings.get("reward_weights") or [])
    if weights and own_functions:
        drop("reward_weights", "some rewards are not carried: set task.reward_weights when you add them", DIFFERENT)
    elif weights and len(weights) != len(functions):
        drop(
            "reward_weights",
            f"{len(weights)} weights for {len(functions)} rewards: set task.reward_weights",
            DIFFERENT,
        )
    elif weights:  # in dstune, the weights of reward models follow those of rewards
        pairs = list(zip(functions, map(float, weights), strict=True))
        ordered = [pair for pair in pairs if pair[0] in REWARDS] + [pair for pair in pairs if pair[0] not in REWARDS]
        put("reward_weights", ("task.reward_weights", [weight for _, weight in ordered]))


def count_prompts(imported: Import, rows: int, accumulated: int, samples: int) -> None:
    """Set the batch sizes, which count prompts in dstune and completions in TRL.

    rows: completions per rank and micro-batch. accumulated: micro-batches per step. samples: completions per prompt.
    """
    completions = rows * accumulated * imported.ranks
    imported.values["trainer.micro_batch_size"] = rows
    imported.values["trainer.global_batch_size"] = max(1, completions // samples)
    imported.assume(
        f"{imported.ranks} rank(s): {rows} x {accumulated} x {imported.ranks} = {completions} completions per step are "
        f"{max(1, completions // samples)} prompts with {samples} completions each (trainer.global_batch_size, task.samples)"
    )
