"""What GRPO and its relatives are called by TRL, whose names axolotl has too, below `trl:`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.importing.result import DIFFERENT, MEANINGLESS, Import

LOSSES = ("dapo", "grpo", "dr_grpo", "cispo")
"""Values of TRL's `loss_type` that are values of `task.loss`."""
REWARDS = {
    "accuracy_reward": "boxed_answer",
    "think_format_reward": "reasoning_format",
}
"""Reward functions that TRL brings, and what is like them here."""
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
"""What GRPOTrainer of TRL 1.16 does where a file is silent."""
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
            "use_vllm",
            "vllm_mode",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_base_url",
            "vllm_server_timeout",
        ),
        "the model that trains writes the completions itself",
    ),
    **dict.fromkeys(
        ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_max_model_length"),
        "the model that trains writes the completions itself",
    ),
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_cap", "vllm_importance_sampling_mode"),
        "the sampler is the model that trains: nothing is to be corrected, and a difference stops the run",
    ),
    "use_transformers_paged": "the model that trains writes the completions itself",
    "ds3_gather_for_generation": "weights are gathered where they fit",
    "steps_per_generation": "a step trains on all of its completions",
    "generation_batch_size": "prompts are answered trainer.micro_batch_size at a time",
    "log_completions": "every completion is in RUN/rollouts and in the report",
    "num_completions_to_print": "every completion is in RUN/rollouts and in the report",
    "log_unique_prompts": "every completion is in RUN/rollouts and in the report",
    "shuffle_dataset": "rows are shuffled each epoch",
    "disable_dropout": "the model that trains has no dropout",
    "remove_unused_columns": "all columns of a row reach the rewards",
    "cast_lm_head_to_fp32": "log-probabilities are computed in fp32",
    "rollout_func": "the model that trains writes the completions itself",
}
"""Keys that ask for something that dstune does on a way of its own."""
KEYS = (
    *("num_generations", "temperature", "scale_rewards", "num_iterations", "epsilon", "epsilon_high"),
    *("mask_truncated_completions", "reward_funcs", "reward_weights", "reward_model_name_or_path"),
    *("importance_sampling_level", "top_p", "top_k", "min_p", "repetition_penalty", "chat_template_kwargs"),
    *(name for name in OWN_WAY if name not in ("shuffle_dataset", "disable_dropout")),
)
"""What `put_policy` looks at, beside `loss_type`, `beta` and `max_completion_length`, which other trainers have too."""
MISSING = (
    *("num_generations_eval", "generation_kwargs", "cache_implementation", "use_adaptive_entropy"),
    *("multi_objective_aggregation", "sapo_temperature_neg", "sapo_temperature_pos", "max_tool_calling_iterations"),
    *("vllm_structured_outputs_regex", "use_bias_correction_kl", "use_transformers_continuous_batching"),
)
Put = Callable[[str, Any], None]


def put_policy(imported: Import, settings: Mapping[str, Any], drop: Callable[..., None], put: Put) -> None:
    """Give `task=reinforcement` what `settings` say under TRL's names. drop, put: on behalf of a key.

    settings: with TRL's defaults. Raises UserError for a loss that dstune does not have.
    """
    imported.choose("task", "reinforcement")
    sequence = settings.get("importance_sampling_level") in ("sequence", "sequence_token")
    loss = str(settings["loss_type"])
    if loss not in LOSSES:
        raise UserError(Problem("loss_type", "this loss is not supported", f"one of {', '.join(LOSSES)}", loss))
    put("loss_type", ("task.loss", "gspo" if sequence else loss))
    put("num_generations", ("task.samples", int(settings["num_generations"])))
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
        reason = "with one update for each rollout every ratio is 1, and nothing is clipped"
        drop("epsilon", reason, MEANINGLESS)
        drop("epsilon_high", reason, MEANINGLESS)
    if settings.get("mask_truncated_completions"):
        put("mask_truncated_completions", ("task.mask_truncated", True))
    _put_rewards(imported, settings, drop, put)
    for name, reason in OWN_WAY.items():
        drop(name, reason, MEANINGLESS)
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        if settings.get(name) not in (None, 0, 1, 1.0, 0.0, -1):
            drop(name, "the model is trained on what it samples from: all tokens, at task.temperature")
        else:
            drop(name, "all tokens are sampled from", MEANINGLESS)
    if settings.get("chat_template_kwargs"):
        put("chat_template_kwargs", ("task.chat_template_kwargs", dict(settings["chat_template_kwargs"])))


def _put_rewards(imported: Import, settings: Mapping[str, Any], drop: Callable[..., None], put: Put) -> None:
    functions = settings.get("reward_funcs") or []
    functions = [functions] if isinstance(functions, str) else list(functions)
    judge = settings.get("reward_model_name_or_path")
    functions = ([judge] if judge else []) + functions  # the order of TRL's script, which the weights are in
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
        drop("reward_funcs", f"{', '.join(own_functions)}: Python of your own; {fix}")
        imported.assume(
            "every reward function of your own is to be registered (docs/reinforcement.md) and named in task.rewards"
        )
    weights = list(settings.get("reward_weights") or [])
    if weights and own_functions:
        drop("reward_weights", "some of the rewards are not carried: give task.reward_weights with them", DIFFERENT)
    elif weights and len(weights) != len(functions):
        drop(
            "reward_weights",
            f"{len(weights)} weights for {len(functions)} rewards: give task.reward_weights",
            DIFFERENT,
        )
    elif weights:  # here, the weights of reward models stand behind those of rewards
        pairs = list(zip(functions, map(float, weights), strict=True))
        ordered = [pair for pair in pairs if pair[0] in REWARDS] + [pair for pair in pairs if pair[0] not in REWARDS]
        put("reward_weights", ("task.reward_weights", [weight for _, weight in ordered]))


def count_prompts(imported: Import, rows: int, accumulated: int, samples: int) -> None:
    """Count the prompts of a step, where the file counts completions."""
    completions = rows * accumulated * imported.ranks
    imported.values["trainer.micro_batch_size"] = rows
    imported.values["trainer.global_batch_size"] = max(1, completions // samples)
    imported.assume(
        f"{imported.ranks} rank(s): {rows} x {accumulated} x {imported.ranks} = {completions} completions of a step are "
        f"{max(1, completions // samples)} prompts with {samples} each (trainer.global_batch_size, task.samples)"
    )
