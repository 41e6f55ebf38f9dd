"""Rules for settings that the three tools share, most of them the arguments of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.chat_templates import NAMES, PROMPTS
from dstune.importing import fsdp
from dstune.importing.result import DIFFERENT, MEANINGLESS, Import
from dstune.importing.rules import Rule, missing, own_way, same

LATER = "this version does not have it"
LIGER = "model.fused_activations=true and model.fused_rotary=true compile such kernels; logits of prompt tokens are never computed"


# ---- model ----


def attention(imported: Import, value: Any) -> None:
    if value in ("sdpa", "eager", "flash_attention_2"):
        packed = value == "flash_attention_2" and bool(imported.get("sample_packing") or imported.get("packing"))
        if packed:
            imported.drop("packed rows are told apart with sdpa only, so model.attention stays auto", DIFFERENT)
        else:
            imported.put("model.attention", value)
    elif value not in ("auto", "fa2", "disabled"):
        imported.drop(f"dstune's attentions are sdpa, eager and flash_attention_2; {LATER}")


def dtype(imported: Import, value: Any) -> None:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(value))
    if short in ("bf16", "fp16") and not (imported.get("bf16") or imported.get("fp16")):
        imported.put("trainer.precision", short)
    elif short == "fp32" or value == "auto":
        imported.drop("weights are loaded in the precision of the run (trainer.precision)", MEANINGLESS)
    else:
        imported.note("trainer.precision")


def revision(imported: Import, value: Any) -> None:
    if value != "main":
        imported.put("model.revision", value)
    else:
        imported.note("model.revision")


def chat_template(imported: Import, value: Any) -> None:
    """Carry a packaged template or prompt by its name, or a file; the tokenizer's own is what dstune takes by itself."""
    text = str(value)
    name = {"mistral_v1": "mistral", "mistral_v2v3": "mistral", "mistral_v3_tekken": "mistral_tekken"}.get(text, text)
    if name in NAMES or text.endswith((".jinja", ".j2")):
        imported.put("model.chat_template", name)
    elif name in PROMPTS and imported.get("stage") != "pt":
        imported.put("model.prompt_template", name)
    elif name == "tokenizer_default":
        imported.note("model.chat_template")
    elif "{" in text:
        imported.drop("a template inside the file: save it as a Jinja file and give model.chat_template=FILE")
    else:
        packaged_names = ", ".join(NAMES)
        imported.drop(
            f"the tokenizer's own template is used; packaged ones are {packaged_names}, others model.chat_template=FILE"
        )


# ---- method ----


def method_of_lora(
    imported: Import,
    *,
    rank: str,
    targets: Any,
    save: str,
    switches: Mapping[str, str],
    four_bits: bool,
) -> None:
    """Convert the settings of LoRA. switches: keys of the other tool that have the meaning of one of ours."""
    imported.choose("method", "qlora" if four_bits else "lora")
    imported.put("method.rank", int(imported.get(rank, 16)))
    imported.put("method.alpha", float(imported.get("lora_alpha", 2 * int(imported.get(rank, 16)))))
    imported.put("method.dropout", float(imported.get("lora_dropout", 0.0)))
    for name, key in ((rank, "method.rank"), ("lora_alpha", "method.alpha"), ("lora_dropout", "method.dropout")):
        if name in imported.raw:
            imported.carried[name] = [key]
    modules = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else list(targets)
    imported.put("method.target_modules", ["all-linear"] if modules in (["all"], ["all-linear"]) else modules)
    if value := imported.get(save):
        modules = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        imported.values["method.modules_to_save"] = modules
        imported.carried[save] = ["method.modules_to_save"]
    for name, key in switches.items():
        if value := imported.get(name):
            imported.values[key] = value
            imported.carried[name] = [key]


def four_bits(imported: Import, value: Any) -> None:
    """Note a key that is evaluated together with the adapter."""
    adapters = imported.get("use_peft") or imported.get("adapter") or imported.get("finetuning_type") == "lora"
    if value and adapters:
        imported.note("method")
    elif value:
        imported.drop("weights in 4 bits are trained through adapters only")


def quantized(imported: Import, value: Any) -> None:
    if value:
        imported.drop("weights are kept in 16 bits, or in 4 (method=qlora)")


# ---- batches and length ----


def global_batch(imported: Import, micro: str, accumulation: str) -> None:
    """Compute the rows of a step: the tools multiply the rows of a rank by the number of ranks; dstune's number is the total."""
    rows, steps = int(imported.get(micro, 1)), int(imported.get(accumulation, 1))
    imported.values["trainer.micro_batch_size"] = "auto" if imported.get("auto_find_batch_size", False) else rows
    imported.values["trainer.global_batch_size"] = rows * steps * imported.ranks
    for name, key in ((micro, "trainer.micro_batch_size"), (accumulation, "trainer.global_batch_size")):
        if name in imported.raw:
            imported.carried[name] = [key]
    imported.assume(
        f"{imported.ranks} rank(s): trainer.global_batch_size = {rows} rows x {steps} micro-batches x {imported.ranks} "
        f"= {rows * steps * imported.ranks} (--ranks N for another number)"
    )


def find_batch(imported: Import, value: Any) -> None:
    if value:
        imported.put("trainer.micro_batch_size", "auto")


def epochs(imported: Import, value: Any) -> None:
    if int(imported.get("max_steps", -1)) > 0:
        imported.drop("max_steps is the length of the run", MEANINGLESS)
    elif float(value).is_integer():
        imported.put("trainer.epochs", int(value))
    else:
        imported.put("trainer.epochs", max(1, int(float(value))))
        rounded = "rounded down" if float(value) > 1 else "rounded up to one"
        imported.drop(f"a part of an epoch: {rounded}, trainer.max_steps gives any length", DIFFERENT)


def max_steps(imported: Import, value: Any) -> None:
    if int(value) > 0:
        imported.put("trainer.max_steps", int(value))
    else:
        imported.note("trainer.epochs")


# ---- optimizer and schedule ----

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw")
PAGED = ("adamw_torch_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw")
BY_NAME = {
    **{name: name for name in ("sgd", "muon")},
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("lion", "lion_32bit"), "lion"),
}


def optimizer(imported: Import, value: Any) -> None:
    name = str(value).lower()
    if name in ADAMW:
        imported.choose("optimizer", "adamw")
    elif name in BY_NAME:
        imported.choose("optimizer", BY_NAME[name])
    else:
        imported.choose("optimizer", "adamw")
        if name in PAGED:
            imported.drop("AdamW with states in fp32; zero.offload_optimizer=cpu keeps them in host memory", DIFFERENT)
        else:
            imported.drop(f"AdamW is used instead; {LATER}")


def beta(place: int) -> Rule:
    def rule(imported: Import, value: Any) -> None:
        betas = imported.values.get("optimizer.betas", [0.9, 0.999])
        betas[place] = float(value)
        imported.put("optimizer.betas", betas)

    return rule


SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "warmup_stable_decay",
}


def schedule(imported: Import, value: Any) -> None:
    name = SCHEDULES.get(str(value))
    if name is None:
        imported.choose("schedule", "cosine")
        imported.drop(f"cosine is used instead; {LATER}")
    else:
        imported.choose("schedule", name)


def schedule_arguments(imported: Import, value: Any) -> None:
    for name, part in dict(value).items():
        if name == "min_lr_rate":
            imported.put("schedule.min_lr_ratio", float(part))
        elif name == "min_lr" and imported.get("learning_rate"):
            imported.put("schedule.min_lr_ratio", float(part) / float(imported.get("learning_rate")))
        else:
            imported.drop(f"{name}: {LATER}")


def min_lr_ratio(imported: Import, value: Any) -> None:
    imported.put("schedule.min_lr_ratio", float(value))


def warmup(imported: Import, value: Any) -> None:
    """Convert the warm-up: `warmup_steps` takes precedence over `warmup_ratio`; a number below 1 is a ratio."""
    if imported.get("lr_scheduler_type", imported.get("lr_scheduler")) == "constant":
        imported.drop("a constant rate has no warm-up in that tool", MEANINGLESS)
    elif imported.current == "warmup_ratio" and imported.get("warmup_steps"):
        imported.drop("warmup_steps is given", MEANINGLESS)
    elif imported.current == "warmup_ratio" or 0 < float(value) < 1:
        imported.put("schedule.warmup_ratio", float(value))
    else:
        imported.put("schedule.warmup_steps", int(value))


# ---- precision and memory ----


def precision(imported: Import, value: Any) -> None:
    if value is True or value in ("true", "full"):
        imported.put("trainer.precision", imported.current)
    else:
        imported.note("trainer.precision")


def checkpointing(imported: Import, value: Any) -> None:
    if not value and imported.values.get("trainer.activation_checkpointing"):  # by FSDP's key, which excludes this one
        imported.note("trainer.activation_checkpointing")
        return
    imported.put("trainer.activation_checkpointing", bool(value))
    if isinstance(value, str) and value not in ("true", "True"):
        imported.drop("activations are computed again on the device", DIFFERENT)


def deepspeed(imported: Import, value: Any) -> None:
    if isinstance(value, dict):
        imported.drop("a configuration inside the file")
        imported.refuse(
            "its ZeRO stage and offload are not carried", "save it as JSON, and give zero=file zero.path=FILE"
        )
        return
    imported.choose("zero", "file")
    imported.put("zero.path", str(value))


# ---- saving, evaluation, tracking ----


def steps_between(key: str, strategy: str) -> Rule:
    """Return a number of optimizer steps or, below 1, a share of the run, unless the key `strategy` says otherwise."""

    def rule(imported: Import, value: Any) -> None:
        if imported.get(strategy) not in (None, "steps"):
            imported.drop(f"{strategy}={imported.get(strategy)} decides", MEANINGLESS)
        elif isinstance(value, (int, float)) and value >= 0:
            imported.put(key, int(value) if value >= 1 or not value else f"{100 * value:g}%")
        else:
            imported.drop(f"give {key}: optimizer steps, passes over the rows or a share of the run")

    return rule


def strategy(key: str) -> Rule:
    """Return `no`, `steps` or `epoch`; `best` saves are those of `run.export=best`."""

    def rule(imported: Import, value: Any) -> None:
        words: dict[str, int | str] = {"no": 0, "epoch": "1 epoch"}
        word = "no" if value is False else str(value)
        if word in words:
            imported.put(key, words[word])
        else:
            imported.note(key)

    return rule


def times_an_epoch(key: str) -> Rule:
    def rule(imported: Import, value: Any) -> None:
        imported.put(key, f"{1 / float(value):g} epoch" if value else 0)

    return rule


def share_held_out(imported: Import, value: Any) -> None:
    if 0 <= float(value) < 1:
        imported.put("data.split.validation", float(value))
    else:
        imported.put("data.split.validation", 0.05)
        imported.drop(
            "a number of rows: 5% are held out instead (data.split.validation), evaluate.max_rows caps them", DIFFERENT
        )


def best_at_the_end(imported: Import, value: Any) -> None:
    if value:
        imported.put("run.export", "best")


def report_to(imported: Import, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if name == "wandb":
            imported.put("tracking.wandb.mode", "online")
        elif name == "tensorboard":
            imported.put("tracking.tensorboard", True)
        elif name == "trackio":
            imported.put("tracking.trackio", True)
        elif name in ("none", "all"):
            imported.note("tracking.wandb.mode")
        else:
            imported.drop(f"{name}: give tracking.mlflow.uri" if name == "mlflow" else f"{name}: {LATER}")


def output_dir(imported: Import, value: Any) -> None:
    imported.put("run.dir", str(value))
    if not imported.get("run_name") and not imported.get("wandb_name"):
        imported.put("run.name", Path(str(value)).name or "run")


def resume(imported: Import, value: Any) -> None:
    if value not in (False, True, "true", "false"):
        imported.drop("a checkpoint of another tool; load its weights with model.path", MEANINGLESS)
    elif value:
        imported.note("run.resume")


HUGGING_FACE: dict[str, Rule] = {
    "trainer": own_way("the keys say what is trained"),
    "learning_rate": lambda found, value: found.put("optimizer.lr", float(value)),
    "weight_decay": lambda found, value: found.put("optimizer.weight_decay", float(value)),
    "adam_beta1": beta(0),
    "adam_beta2": beta(1),
    "adam_epsilon": lambda found, value: found.put("optimizer.eps", float(value)),
    "max_grad_norm": lambda found, value: found.put("trainer.grad_clip", float(value)),
    "optim": optimizer,
    "lr_scheduler_type": schedule,
    "lr_scheduler_kwargs": schedule_arguments,
    "warmup_ratio": warmup,
    "warmup_steps": warmup,
    "num_train_epochs": epochs,
    "max_steps": max_steps,
    "per_device_train_batch_size": lambda found, _: global_batch(
        found, "per_device_train_batch_size", "gradient_accumulation_steps"
    ),
    "gradient_accumulation_steps": lambda found, _: global_batch(
        found, "per_device_train_batch_size", "gradient_accumulation_steps"
    ),
    "auto_find_batch_size": find_batch,
    "per_device_eval_batch_size": same("evaluate.micro_batch_size"),
    "group_by_length": lambda found, value: found.put("trainer.length_grouping", bool(value)),
    "bf16": precision,
    "fp16": precision,
    "tf32": lambda found, value: found.put("trainer.tf32", bool(value)),
    "gradient_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": own_way("activations are computed again without re-entering autograd"),
    "deepspeed": deepspeed,
    **fsdp.TABLE,
    "seed": same("trainer.seed"),
    "data_seed": missing("the order of rows follows trainer.seed"),
    "save_steps": steps_between("checkpoint.every", "save_strategy"),
    "save_strategy": strategy("checkpoint.every"),
    "save_total_limit": lambda found, value: found.put("checkpoint.keep", max(1, int(value))),
    "save_only_model": missing("checkpoints are whole, so that a run can be continued"),
    "load_best_model_at_end": best_at_the_end,
    "metric_for_best_model": missing("set trainer.early_stopping.metric"),
    "greater_is_better": own_way("known from the metric"),
    "eval_steps": steps_between("evaluate.every", "eval_strategy"),
    "eval_strategy": strategy("evaluate.every"),
    "do_train": own_way("`dstune train` trains"),
    "do_eval": own_way("evaluated where there are validation rows"),
    "do_predict": own_way("`dstune evaluate` and `dstune generate` do it"),
    "report_to": report_to,
    "run_name": same("run.name"),
    "output_dir": output_dir,
    "overwrite_output_dir": own_way("a run directory is continued; another run.dir begins anew"),
    "resume_from_checkpoint": resume,
    "logging_steps": own_way("every step is in metrics.jsonl"),
    "logging_strategy": own_way("every step is in metrics.jsonl"),
    "logging_first_step": own_way("every step is in metrics.jsonl"),
    "logging_dir": own_way("metrics.jsonl is in the run directory"),
    "log_level": own_way("logs/ has a file of every rank"),
    "remove_unused_columns": own_way("columns are chosen by data.format and data.columns"),
    "dataloader_num_workers": own_way("rows are tokenized before training, by data.workers"),
    "dataloader_drop_last": missing("every row is trained"),
    "dataloader_pin_memory": own_way("done on GPUs"),
    "ddp_timeout": own_way("ranks of a dead one are ended by launch.grace_seconds"),
    "ddp_find_unused_parameters": own_way("ZeRO reduces what has gradients"),
    "average_tokens_across_devices": own_way("the loss is always the mean over the whole global batch"),
    "push_to_hub": missing("after the training: `dstune export RUN --push OWNER/NAME`"),
    "hub_model_id": own_way("`dstune export RUN --push OWNER/NAME` after the training"),
    "hub_strategy": own_way("`dstune export RUN --push OWNER/NAME` after the training"),
    "neftune_noise_alpha": lambda found, value: found.put("model.neftune_alpha", float(value)),
    "torch_compile": missing(LATER),
    "use_liger_kernel": missing(LIGER),
    "include_num_input_tokens_seen": own_way("tokens are in metrics.jsonl"),
}
"""Arguments of the Hugging Face Trainer, which TRL and LLaMA-Factory accept unchanged."""

HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "group_by_length": False,
    "seed": 42,
}
"""Defaults of the Hugging Face Trainer that differ from those of dstune."""
