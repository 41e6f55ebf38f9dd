"""Imports TRL: the YAML of `trl sft --config`, recipes of the alignment handbook, or a command line with the same arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from dstune.core.errors import Problem, UserError
from dstune.importing import common, policy
from dstune.importing.common import HUGGING_FACE, HUGGING_FACE_DEFAULTS, LATER
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED, Import
from dstune.importing.rules import Rule, missing, own_code, own_way, same, with_others
from dstune.importing.sources import Source, put_sources, with_split

DEFAULTS: dict[str, Any] = {
    **HUGGING_FACE_DEFAULTS,
    "learning_rate": 2e-5,
    "max_length": 1024,
    "packing": False,
    "gradient_checkpointing": True,
    "assistant_only_loss": False,
    "eval_strategy": "no",
}
"""Defaults of TRL's SFTTrainer for absent keys, where dstune's defaults differ."""


def recognised(raw: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in raw


SUPPORTED = ("sft", "dpo", "kto", "orpo", "reward", "grpo")
"""Trainers whose runs are imported."""
NOT_IMPORTED = (
    *("a2po", "async_grpo", "bco", "cpo", "distillation", "dpo_online", "gkd", "gmpo", "gold", "gspo"),
    *("minillm", "mpo", "nash_md", "online_dpo", "papo", "ppo", "prm", "rloo", "sdft", "sdpo", "tpo", "xpo"),
)
"""Trainers of TRL whose runs are not imported, including the names of their scripts."""
LOSSES = {"dpo": {"sigmoid": "dpo", "ipo": "ipo"}, "kto": {"kto": "kto"}, "sft": {"nll": "", "chunked_nll": ""}}
"""By trainer, the supported values of `loss_type`, each with its value of `task.loss`."""

PREFERENCE_DEFAULTS: dict[str, Any] = {
    **HUGGING_FACE_DEFAULTS,
    "learning_rate": 1e-6,
    "max_length": 1024,
    "gradient_checkpointing": True,
    "eval_strategy": "no",
    "beta": 0.1,
}
DEFAULTS_BY_TRAINER: dict[str, dict[str, Any]] = {
    "sft": DEFAULTS,
    "dpo": {**PREFERENCE_DEFAULTS, "loss_type": "sigmoid"},
    "kto": {**PREFERENCE_DEFAULTS, "loss_type": "kto"},
    "orpo": PREFERENCE_DEFAULTS,
    "reward": {
        **{key: PREFERENCE_DEFAULTS[key] for key in PREFERENCE_DEFAULTS if key != "beta"},
        "learning_rate": 1e-4,
    },
    "grpo": {
        **{key: PREFERENCE_DEFAULTS[key] for key in PREFERENCE_DEFAULTS if key not in ("beta", "max_length")},
        **policy.DEFAULTS,
        "trainer": "grpo",
    },
}
"""Defaults of TRL 1.16 for absent keys, by trainer."""


def defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRL's defaults for keys that the file does not have."""
    return DEFAULTS_BY_TRAINER[trainer_for(raw)]


def trainer_in(script: str) -> str | None:
    """Return the trainer that a script is named after (`run_dpo` -> `dpo`), or None.

    Of several matching names the longest wins (`run_dpo_online` -> `dpo_online`).
    """
    names = sorted((*SUPPORTED, *NOT_IMPORTED), key=len, reverse=True)
    return next((name for name in names if f"_{name}_" in f"_{script}_"), None)


def trainer_for(raw: Mapping[str, Any]) -> str:
    """Return the trainer of a file or command: the one it names, else the one that its keys imply.

    Raises:
        UserError: the trainer is not supported, or the keys fit several trainers.
    """
    if trainer := raw.get("trainer"):
        if trainer not in SUPPORTED:
            names = ", ".join(SUPPORTED)
            raise UserError(Problem("FILE", f"{trainer} is not supported", f"a run of {names}", str(trainer)))
        return str(trainer)
    if raw.keys() & {"num_generations", "reward_funcs"}:
        return "grpo"
    if raw.keys() & {"desirable_weight", "undesirable_weight"}:
        return "kto"
    if "center_rewards_coefficient" in raw:
        return "reward"
    if "loss_type" in raw:
        losses = _losses(raw["loss_type"])
        for name, supported in LOSSES.items():
            if losses and set(losses) <= set(supported):
                return name
        _refuse_loss(raw["loss_type"], [loss for losses in LOSSES.values() for loss in losses])
    for key in ("beta", "max_prompt_length"):
        if key in raw:
            reason = "several trainers of TRL have this key, and no other key of the file tells which one to use"
            raise UserError(Problem(key, reason, "--trainer dpo, kto or orpo", str(raw[key])))
    return "sft"


def check(raw: Mapping[str, Any]) -> None:
    """Check the trainer and its loss. Raises UserError for those that are not imported."""
    trainer = trainer_for(raw)
    supported = LOSSES.get(trainer, {})
    if supported and "loss_type" in raw:
        losses = _losses(raw["loss_type"])
        if len(losses) != 1 or losses[0] not in supported:
            _refuse_loss(raw["loss_type"], supported)


def _losses(value: Any) -> list[str]:
    return [str(loss) for loss in (value if isinstance(value, list) else [value])]


def _refuse_loss(value: Any, supported: Iterable[str]) -> NoReturn:
    raise UserError(Problem("loss_type", "this loss is not supported", f"one of {', '.join(supported)}", str(value)))


def _set_task(imported: Import) -> None:
    trainer = trainer_for(imported.raw)
    if trainer == "grpo":
        imported.choose("task", "reinforcement")
        return
    if trainer == "reward":
        imported.choose("task", "reward")
        return
    if trainer != "sft":
        imported.choose("task", "preference")
        return
    if column := imported.get("dataset_text_field"):
        imported.choose("task", "causal_lm")
        imported.put("data.format", "text")
        if column != "text":
            imported.put("data.columns", {"text": str(column)})
        imported.carried["dataset_text_field"] = ["task", "data.columns"]
        return
    imported.choose("task", "chat")
    imported.assume("rows are conversations or prompt and completion (task=chat); for plain text give task=causal_lm")


def trainer_name(imported: Import, value: Any) -> None:
    _set_task(imported)
    if value == "grpo":
        _set_policy(imported)
    if value in ("kto", "orpo"):
        imported.put("task.loss", value)


def _set_policy(imported: Import) -> None:
    def put(name: str, setting: tuple[str, Any]) -> None:
        key, value = setting
        imported.values[key] = value
        if name in imported.raw:
            imported.carried[name] = [key]

    def drop(name: str, reason: str, kind: str = NOT_SUPPORTED) -> None:
        if imported.raw.get(name) is not None:
            imported.drop(reason, kind, key=name)

    policy.put_policy(imported, imported.raw, drop, put)


def grpo_only(imported: Import, value: Any) -> None:
    """Drop a key of GRPO in a file for another trainer. For GRPO, `trainer_name` carries it."""
    if trainer_for(imported.raw) != "grpo":
        imported.drop("only training on generated answers (GRPO) uses it", MEANINGLESS)


def completion_length(imported: Import, value: Any) -> None:
    if trainer_for(imported.raw) != "grpo":
        imported.drop("data.max_length is the limit of a row")


def beta(imported: Import, value: Any) -> None:
    if trainer_for(imported.raw) != "grpo":
        imported.put("task.beta", value)


def batch_size(imported: Import, value: Any) -> None:
    if trainer_for(imported.raw) != "grpo":
        common.global_batch(imported, "per_device_train_batch_size", "gradient_accumulation_steps")
        return
    rows = int(imported.get("per_device_train_batch_size", 8))
    accumulation_steps = int(imported.get("gradient_accumulation_steps", 1))
    samples = int(imported.get("num_generations", policy.DEFAULTS["num_generations"]))
    policy.count_prompts(imported, rows, accumulation_steps, samples)
    imported.note("trainer.global_batch_size")


def loss_type(imported: Import, value: Any) -> None:
    trainer = trainer_for(imported.raw)
    if trainer == "grpo":
        return
    if trainer in ("dpo", "kto"):
        (loss,) = _losses(value)
        imported.choose("task", "preference")
        imported.put("task.loss", LOSSES[trainer][loss])
    elif trainer == "sft":
        imported.drop("next-token cross entropy, computed for trained tokens only", MEANINGLESS)
    else:
        imported.drop(f"the trainer {trainer} has one loss only", MEANINGLESS)


def reference_log_probs(imported: Import, value: Any) -> None:
    if value:
        imported.put("task.reference", "cached")


def divergence_type(imported: Import, value: Any) -> None:
    if value != "reverse_kl":
        imported.drop("dstune always uses the reverse KL divergence")


def dataset_name(imported: Import, value: Any) -> None:
    if imported.get("dataset_mixture") or imported.get("datasets"):
        imported.drop("the file also has a mixture, which TRL uses instead", MEANINGLESS)
        return
    source = Source(with_split(str(value), imported.get("dataset_train_split")), subset=imported.get("dataset_config"))
    for name, dstune_key in (("dataset_train_split", "data.train"), ("dataset_config", "data.subset")):
        if imported.get(name):
            imported.carried[name] = [dstune_key]
    put_sources(imported, [source])
    _set_task(imported)
    if str(imported.get("eval_strategy", "no")) in ("steps", "epoch"):
        split = str(imported.get("dataset_test_split", "test"))
        imported.values["data.validation"] = f"{value}:{split}"
        imported.carried["dataset_test_split"] = ["data.validation"]
    else:
        imported.values["data.split.validation"] = 0.0


def mixture(imported: Import, value: Any) -> None:
    entries = value.get("datasets", []) if isinstance(value, Mapping) else value
    sources = []
    for entry in entries:
        path = str(entry.get("id") or entry.get("path"))
        subset = entry.get("config") or entry.get("name")
        source = Source(with_split(path, entry.get("split")), subset=None if subset == "default" else subset)
        source.weight = float(entry.get("weight") or 1.0)
        sources.append(source)
        if entry.get("fraction") is not None:
            imported.drop(
                f"{path}: fraction is not carried; data.mixture.NAME.weight sets how often its rows are drawn",
                DIFFERENT,
            )
        if entry.get("data_files") or entry.get("data_dir"):
            imported.drop(f"{path}: data_files and data_dir are not carried; give the files as path", DIFFERENT)
    put_sources(imported, sources)
    _set_task(imported)
    size = value.get("test_split_size") if isinstance(value, Mapping) else imported.get("test_split_size")
    if size is not None:
        common.share_held_out(imported, size)
    else:
        imported.values["data.split.validation"] = 0.0


def dataset_arguments(imported: Import, value: Any) -> None:
    """Carry `skip_prepare_dataset`, which TRL's scripts for vision-language models set; drop anything else."""
    if set(dict(value)) == {"skip_prepare_dataset"}:
        imported.drop("dstune prepares rows together with their images", MEANINGLESS)
        imported.assume("TRL trains the vision tower too; dstune trains it with model.train_vision=true")
    else:
        imported.drop(LATER)


def use_peft(imported: Import, value: Any) -> None:
    if value:
        common.method_of_lora(
            imported,
            rank="lora_r",
            targets=imported.get("lora_target_modules", "all-linear"),
            save="lora_modules_to_save",
            switches={"use_rslora": "method.rslora", "use_dora": "method.dora"},
            four_bits=bool(imported.get("load_in_4bit")),
        )
        if imported.get("lora_target_modules"):
            imported.carried["lora_target_modules"] = ["method.target_modules"]
        else:
            imported.assume("adapters on all linear layers (method.target_modules=[all-linear])")
        if not imported.get("lora_alpha"):
            imported.values["method.alpha"] = 32.0
        if imported.get("lora_dropout") is None:
            imported.values["method.dropout"] = 0.05
    else:
        imported.choose("method", "full")


def lora_setting(imported: Import, value: Any) -> None:
    if not imported.get("use_peft"):
        imported.drop("use_peft is off", MEANINGLESS)


def assistant_only(imported: Import, value: Any) -> None:
    if imported.get("dataset_text_field") or (
        imported.current in imported.defaults and "completion_only_loss" in imported.raw
    ):
        return
    imported.put("task.train_on_prompt", not value)
    if imported.current in imported.defaults:
        imported.assume(
            "by default TRL also trains on the prompts of conversations (task.train_on_prompt=true); for rows with a prompt and a "
            "completion it trains on the completion only: give task.train_on_prompt=false for them"
        )


def packing_strategy(imported: Import, value: Any) -> None:
    if value in ("bfd", "ffd"):
        imported.note("data.packing")
    else:
        imported.drop("dstune packs complete rows, the longest first", DIFFERENT)


def eos_token(imported: Import, value: Any) -> None:
    imported.drop("each turn ends with the chat template's own end token, which is trained", MEANINGLESS)


TABLE: dict[str, Rule] = {
    **HUGGING_FACE,
    "model_name_or_path": same("model.path"),
    "model_revision": common.revision,
    "trust_remote_code": own_code,
    "attn_implementation": common.attention,
    "dtype": common.dtype,
    "torch_dtype": common.dtype,
    "model_init_kwargs": missing("set model.config_overrides"),
    "use_peft": use_peft,
    **dict.fromkeys(
        (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_modules_to_save",
            "use_rslora",
            "use_dora",
        ),
        lora_setting,
    ),
    "lora_task_type": own_way("dstune infers it from the task"),
    "load_in_4bit": common.four_bits,
    "load_in_8bit": common.quantized,
    "bnb_4bit_quant_type": missing("it only matters with load_in_4bit"),
    "use_bnb_nested_quant": missing("it only matters with load_in_4bit"),
    "chat_template": common.chat_template,
    "chat_template_path": common.chat_template,
    "eos_token": eos_token,
    "pad_token": own_way("padding never counts in the loss, whatever token it is"),
    "dataset_name": dataset_name,
    "dataset_mixture": mixture,
    "datasets": mixture,
    "dataset_config": with_others,
    "dataset_train_split": with_others,
    "dataset_test_split": with_others,
    "dataset_text_field": with_others,
    "dataset_streaming": missing("data.streaming=true reads one source in blocks"),
    "dataset_num_proc": same("data.workers"),
    "dataset_kwargs": dataset_arguments,
    "test_split_size": with_others,
    "max_length": same("data.max_length"),
    "max_seq_length": same("data.max_length"),
    "truncation_mode": own_way("the start of a long row is kept"),
    "shuffle_dataset": own_way("rows are shuffled each epoch"),
    "packing": lambda imported, value: imported.put("data.packing", bool(value)),
    "packing_strategy": packing_strategy,
    "eval_packing": own_way("evaluation counts every row once"),
    "padding_free": missing("set data.packing=true"),
    "pad_to_multiple_of": own_way("rows are padded to the longest of a micro-batch"),
    "completion_only_loss": lambda imported, value: imported.put("task.train_on_prompt", not value),
    "assistant_only_loss": assistant_only,
    "trainer": trainer_name,
    "loss_type": loss_type,
    "beta": beta,
    "label_smoothing": same("task.label_smoothing"),
    "desirable_weight": same("task.desirable_weight"),
    "undesirable_weight": same("task.undesirable_weight"),
    "precompute_ref_log_probs": reference_log_probs,
    "precompute_ref_batch_size": own_way("the reference model uses the micro-batch size of evaluations"),
    "disable_dropout": own_way("dropout stays as the model's config.json sets it"),
    "max_prompt_length": missing("data.max_length is the limit of a row"),
    "max_completion_length": completion_length,
    "per_device_train_batch_size": batch_size,
    "gradient_accumulation_steps": batch_size,
    **dict.fromkeys(policy.KEYS, grpo_only),
    **dict.fromkeys(
        (*policy.MISSING, "delta", "entropy_coef", "top_entropy_quantile", "off_policy_mask_threshold"), missing(LATER)
    ),
    "loss_weights": missing("a run has one loss"),
    "reference_free": missing("for a loss without a reference model, set task.loss=simpo or orpo"),
    "f_divergence_type": divergence_type,
    **dict.fromkeys(
        (
            *("center_rewards_coefficient", "discopop_tau", "f_alpha_divergence_coef", "ld_alpha", "rpo_alpha"),
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_weighting"),
        ),
        missing(LATER),
    ),
    "activation_offloading": missing("recompute activations instead: trainer.activation_checkpointing=true"),
    "config_file": common.deepspeed,
    "num_processes": own_way("it only tells this import the number of ranks"),
    "num_machines": own_way("every rank that an outer launcher starts becomes a worker"),
    "env": missing("set these variables in the shell that starts dstune"),
}
"""By TRL's key, the rule that carries or drops its value."""
