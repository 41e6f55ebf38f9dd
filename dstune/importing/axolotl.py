"""axolotl's YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.importing import common, images, policy
from dstune.importing.common import HUGGING_FACE, LATER
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED, Import
from dstune.importing.rules import Rule, missing, own_code, own_way, same, with_others
from dstune.importing.sources import Source, put_sources, report_lost_settings, with_split

DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "weight_decay": 0.0,
    "sample_packing": False,
    "sequence_len": 512,
    "val_set_size": 0.0,
    "gradient_checkpointing": False,
    "group_by_length": False,
    "dataset_exact_deduplication": False,
    "seed": 42,
}
"""Defaults of axolotl that differ from those of dstune."""


LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
"""Values of `rl` that are imported; `task.loss` has the same names."""
POLICY = "grpo"
"""The value of `rl` with which the model answers prompts; its keys stand below `trl`."""
DEFAULTS_BY_LOSS: dict[str, dict[str, Any]] = {
    "orpo": {"orpo_alpha": 0.1},
    "simpo": {"rl_beta": 0.1, "simpo_gamma": 0.5},
    **{loss: {"rl_beta": 0.1} for loss in ("dpo", "ipo", "kto")},
}
"""Further such defaults by the value of `rl`."""
PAIR_COLUMNS = {
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
}
"""By the second part of a pair's type (`chatml.intel`): `data.columns`."""
JUDGED_COLUMNS = {"argilla": {"prompt": "instruction"}, "intel": {"prompt": "question"}, "ultra": {}}
"""The same for judged answers (`rl: kto`)."""


def defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of axolotl that matter for the kind of training in the file."""
    return {**DEFAULTS, **DEFAULTS_BY_LOSS.get(str(raw.get("rl")), {})}


def recognised(raw: Mapping[str, Any]) -> bool:
    return "base_model" in raw


def check(raw: Mapping[str, Any]) -> None:
    """Raise UserError for a kind of training that is not imported."""
    if (loss := raw.get("rl")) and loss not in (*LOSSES, POLICY):
        raise UserError(Problem("rl", f"{loss} is not supported", f"one of {', '.join((*LOSSES, POLICY))}", str(loss)))
    if raw.get("process_reward_model"):
        reason, fix = "scores for each step of an answer are not supported", "reward_model: true"
        raise UserError(Problem("process_reward_model", reason, fix, str(raw["process_reward_model"])))


def policy_settings(imported: Import, value: Any) -> None:
    """Read `trl`, with the names that TRL has."""
    if imported.get("rl") != POLICY:
        imported.drop("rl: grpo alone uses it", MEANINGLESS)
        return
    settings = {**policy.DEFAULTS, **{key: setting for key, setting in dict(value).items() if setting is not None}}

    def put(name: str, setting: tuple[str, Any]) -> None:
        imported.put(*setting)

    def drop(name: str, reason: str, kind: str = NOT_SUPPORTED) -> None:
        if name in value and kind != MEANINGLESS:
            imported.drop(f"trl.{name}: {reason}", kind)

    policy.put_policy(imported, settings, drop, put)
    for name in sorted(set(value) - {*policy.KEYS, *policy.DEFAULTS, *policy.OWN_WAY}):
        imported.drop(f"trl.{name}: {LATER}")


def batch_size(imported: Import, value: Any) -> None:
    if imported.get("rl") != POLICY:
        common.global_batch(imported, "micro_batch_size", "gradient_accumulation_steps")
        return
    rows, steps = int(imported.get("micro_batch_size", 1)), int(imported.get("gradient_accumulation_steps", 1))
    samples = (imported.get("trl") or {}).get("num_generations") or policy.DEFAULTS["num_generations"]
    policy.count_prompts(imported, rows, steps, int(samples))
    imported.note("trainer.global_batch_size")


def preference_loss(imported: Import, value: Any) -> None:
    if value == POLICY:
        if not imported.get("trl"):
            policy_settings(imported, {})
        return
    imported.choose("task", "preference")
    imported.put("task.loss", value)


def reward_model(imported: Import, value: Any) -> None:
    if value:
        imported.choose("task", "reward")


def key_of_loss(loss: str, key: str) -> Rule:
    """Return the rule of a value that becomes that of dstune's `key` if `rl` is `loss`, and is dropped otherwise."""

    def rule(imported: Import, value: Any) -> None:
        if imported.get("rl") == loss:
            imported.put(key, float(value))
        else:
            imported.drop(f"rl: {loss} alone uses it", MEANINGLESS)

    return rule


def beta(imported: Import, value: Any) -> None:
    if imported.get("rl") not in (None, "orpo"):
        imported.put("task.beta", float(value))
    else:
        imported.drop("this loss does not use it", MEANINGLESS)


def _preference_source(imported: Import, entry: Mapping[str, Any]) -> Source | None:
    """Return the source of pairs or, with `rl: kto`, of judged answers."""
    path, kind = str(entry.get("path", "")), entry.get("type")
    source = Source(with_split(path, entry.get("split")), subset=entry.get("name"), revision=entry.get("revision"))
    if path in ("json", "csv", "parquet") and (files := entry.get("data_files")):
        source.path = str(files[0] if isinstance(files, list) else files)
    keys = {"path", "type", "split", "name", "revision", "data_files", "ds_type", "trust_remote_code"}
    if imported.get("rl") == POLICY:
        source.format = "prompt"
        if kind:
            imported.drop(
                f"{path}: rows are made by Python of your own ({kind}); write rows with a column prompt", DIFFERENT
            )
        return source
    template, _, layout = str(kind or "").partition(".")
    judged = imported.get("rl") == "kto"
    source.format = "feedback" if judged else "preference"
    by_layout = JUDGED_COLUMNS if judged else PAIR_COLUMNS
    if (
        not isinstance(kind, Mapping)
        and template == "chat_template"
        and layout in ("default", "argilla")
        and not judged
    ):
        keys |= {"field_messages", "field_chosen", "field_rejected", "message_property_mappings", "roles"}
        roles = {"chosen": "field_chosen", "rejected": "field_rejected"}
        if layout == "default":
            roles["prompt"] = "field_messages"
        source.columns = {role: str(entry[field]) for role, field in roles.items() if entry.get(field, role) != role}
        if entry.get("message_property_mappings", {"role": "role", "content": "content"}) != {
            "role": "role",
            "content": "content",
        }:
            keys.discard("message_property_mappings")
    elif not isinstance(kind, Mapping) and template in ("chatml", "llama3") and layout in by_layout:
        source.columns = by_layout[layout]
        imported.assume(f"rows are rendered by the model's chat template; axolotl writes them as {template}")
    elif kind == "bradley_terry.chat_template" or not kind:
        pass
    else:
        imported.drop(f"{path}: dstune has no rows of type {kind}")
        return None
    if ignored := sorted(set(entry) - keys):
        imported.drop(f"{path}: {', '.join(ignored)} of the entry", DIFFERENT)
    return source


def adapter(imported: Import, value: Any) -> None:
    if value not in ("lora", "qlora"):
        imported.drop(f"dstune's adapter is LoRA; {LATER}")
        return
    targets = imported.get("lora_target_modules") or "all-linear"
    if _names_language_model(targets):
        imported.drop(
            "a pattern: adapters are on all linear layers of the language model, and on no tower",
            DIFFERENT,
            key="lora_target_modules",
        )
        targets = "all-linear"
    if imported.get("lora_target_linear"):
        targets = "all-linear"
    for name in ("lora_target_modules", "lora_target_linear"):
        if imported.get(name):
            imported.carried[name] = ["method.target_modules"]
    common.method_of_lora(
        imported,
        rank="lora_r",
        targets=targets,
        save="lora_modules_to_save",
        switches={
            "peft_use_rslora": "method.rslora",
            "peft_use_dora": "method.dora",
            "loraplus_lr_ratio": "method.lr_ratio",
            "lora_model_dir": "method.adapter",
        },
        four_bits=value == "qlora" or bool(imported.get("load_in_4bit")),
    )


def _names_language_model(targets: Any) -> bool:
    """Tell whether the modules of adapters are a regular expression for those of a language model beside a tower."""
    return isinstance(targets, str) and "language_model" in targets and re.search(r"[\\\[(|*]", targets) is not None


def processor(imported: Import, value: Any) -> None:
    """Train what axolotl does not freeze of the tower: rows hold images."""
    is_apart = bool(imported.get("adapter")) and _names_language_model(imported.get("lora_target_modules"))
    is_frozen = is_apart or bool(imported.get("freeze_mm_modules"))
    imported.put("model.train_vision", not is_frozen)
    if not is_frozen:
        imported.assume(
            "axolotl trains the tower that sees, and its projector, unless freeze_mm_modules or a pattern in lora_target_modules "
            "leaves them out (model.train_vision=true)"
        )


def frozen_tower(imported: Import, value: Any) -> None:
    imported.put("model.train_vision", False) if value else imported.note("model.train_vision")


def _source(imported: Import, entry: Mapping[str, Any]) -> tuple[Source, str] | None:
    """Return the source and the task that its type is for."""
    if imported.get("rl") or imported.get("reward_model"):
        compared = _preference_source(imported, entry)
        task = "reinforcement" if imported.get("rl") == POLICY else "preference" if imported.get("rl") else "reward"
        return (compared, task) if compared else None
    kind = str(entry.get("type") or "chat_template").split(":", 1)[0].split(".", 1)[0]
    path = str(entry.get("path", ""))
    if isinstance(entry.get("type"), Mapping):
        imported.drop(f"{path}: a type of its own; map the columns with data.columns")
        return None
    source = Source(with_split(path, entry.get("split")), subset=entry.get("name"), revision=entry.get("revision"))
    files = entry.get("data_files")
    if path in ("json", "csv", "parquet", "text") and files:
        source.path = str(files[0] if isinstance(files, list) else files)
        files = files[1:] if isinstance(files, list) else None
    mapped = dict(entry.get("message_property_mappings") or {})
    if kind == "completion":
        source.format, task = "text", "causal_lm"
        if entry.get("field", "text") != "text":
            source.columns = {"text": str(entry["field"])}
    elif kind == "pretrain":
        source.format, task = "text", "causal_lm"
        if entry.get("text_column", "text") != "text":
            source.columns = {"text": str(entry["text_column"])}
    elif kind == "alpaca":
        source.format, task = "alpaca", "chat"
        if any(other.get("type") != "alpaca" for other in imported.get("datasets", [])):
            imported.assume(
                "Alpaca rows are written in the model's chat template; axolotl writes them as plain text, as "
                "model.prompt_template=alpaca does"
            )
    elif kind == "sharegpt" or (kind == "chat_template" and mapped.get("role") == "from"):
        source.format, task = "conversations", "chat"
        if (column := entry.get("field_messages", "conversations")) != "conversations":
            source.columns = {"conversations": str(column)}
    elif kind == "chat_template":
        source.format, task = "messages", "chat"
        if (column := entry.get("field_messages", "messages")) != "messages":
            source.columns = {"messages": str(column)}
    else:
        imported.drop(f"{path}: dstune has no rows of type {entry.get('type')}")
        return None
    keys = {"path", "type", "split", "name", "revision", "data_files", "ds_type", "field", "text_column"}
    keys |= {"field_messages", "message_property_mappings", "conversation", "chat_template", "trust_remote_code"}
    unread_keys = sorted(set(entry) - keys)
    if kind == "chat_template" and mapped and mapped.get("role") not in (None, "role", "from"):
        unread_keys.append("message_property_mappings")
    if files:
        unread_keys.append("data_files")
    if unread_keys:
        imported.drop(f"{path}: {', '.join(unread_keys)} of the entry", DIFFERENT)
    return source, task


def datasets(imported: Import, value: Any) -> None:
    pairs = [pair for entry in value if (pair := _source(imported, entry))]
    tasks = {task for _, task in pairs}
    task = next(
        (task for task in ("reward", "preference", "reinforcement", "chat") if task in tasks),
        "causal_lm" if tasks else "chat",
    )
    others = [source.path for source, kind in pairs if kind != task]
    if others:
        imported.drop(f"{', '.join(others)}: plain text beside conversations; one run has one task", DIFFERENT)
    if pairs or not (imported.get("rl") or imported.get("reward_model")):
        imported.choose("task", task)
    put_sources(imported, [source for source, kind in pairs if kind == task])
    if pairs and all(entry.get("type") == "alpaca" for entry in value):
        imported.put("model.prompt_template", "alpaca")


def pretraining(imported: Import, value: Any) -> None:
    datasets(
        imported,
        [
            {"type": "pretrain", **entry} if isinstance(entry, dict) else {"path": entry, "type": "pretrain"}
            for entry in (value if isinstance(value, list) else [value])
        ],
    )
    if "data.train" in imported.values and int(imported.get("max_steps", -1)) > 0:
        imported.put("data.streaming", True)


def validation(imported: Import, value: Any) -> None:
    pair = _source(imported, value[0])
    if pair:
        imported.put("data.validation", pair[0].path)
        temporary = Import(imported.raw, imported.ranks)  # problems of the training sources are reported with them
        training = [_source(temporary, entry) for entry in imported.get("datasets", [])]
        report_lost_settings(imported, pair[0], [other[0] for other in training if other])
    if len(value) > 1:
        imported.drop("data.validation takes one source: the first", DIFFERENT)


def chat_template(imported: Import, value: Any) -> None:
    types = [entry.get("type") for entry in imported.get("datasets", [])]
    if types and all(kind == "alpaca" for kind in types):
        imported.drop("Alpaca rows are written as model.prompt_template=alpaca, whatever the template", MEANINGLESS)
    else:
        common.chat_template(imported, value)


def precision(imported: Import, value: Any) -> None:
    if value == "auto":
        imported.put("trainer.precision", "auto")
    else:
        common.precision(imported, value)


def wandb_project(imported: Import, value: Any) -> None:
    imported.put("tracking.project", str(value))
    imported.put("tracking.wandb.mode", imported.get("wandb_mode", "online"))


def special_tokens(imported: Import, value: Any) -> None:
    other_tokens = sorted(set(dict(value)) - {"pad_token"})
    if other_tokens:
        imported.drop(f"{', '.join(other_tokens)}: the tokenizer's own special tokens stay")
    else:
        imported.drop("padding never counts in the loss, whatever token it is", MEANINGLESS)


def tiled_mlp(imported: Import, value: Any) -> None:
    if value:
        imported.put("trainer.mlp_tiles", imported.get("tiled_mlp_num_shards") or TILES)


TILES = 8
"""Used if the file gives no number: axolotl derives one from the lengths of rows."""


def number_of_tiles(imported: Import, value: Any) -> None:
    if imported.get("tiled_mlp"):
        imported.note("trainer.mlp_tiles")


def flag_of_attention(name: str) -> Rule:
    def rule(imported: Import, value: Any) -> None:
        if value:
            common.attention(imported, name)

    return rule


TABLE: dict[str, Rule] = {
    **HUGGING_FACE,
    "base_model": same("model.path"),
    "base_model_config": own_way("the architecture is the model's own"),
    "revision_of_model": common.revision,
    "model_type": own_way("known from the model's config.json"),
    "tokenizer_type": own_way("known from the model's tokenizer files"),
    "tokenizer_config": missing("the tokenizer is the model's own"),
    "is_llama_derived_model": own_way("known from the model's config.json"),
    "is_mistral_derived_model": own_way("known from the model's config.json"),
    "trust_remote_code": own_code,
    "processor_type": processor,
    "is_multimodal": images.SEEN,
    "freeze_mm_modules": frozen_tower,
    "image_size": images.SIZES,
    "image_resize_algorithm": images.SIZES,
    "unmask_image_tokens": missing("tokens of images are never trained"),
    "skip_prepare_dataset": own_way("tokenized rows are cached by their content, and images are read for each batch"),
    "attn_implementation": common.attention,
    "flash_attention": flag_of_attention("flash_attention_2"),
    "sdp_attention": flag_of_attention("sdpa"),
    "eager_attention": flag_of_attention("eager"),
    "xformers_attention": missing(LATER),
    "flex_attention": missing(LATER),
    "chat_template": chat_template,
    "chat_template_jinja": chat_template,
    "rl": preference_loss,
    "reward_model": reward_model,
    "rl_beta": beta,
    "dpo_beta": beta,
    "orpo_alpha": key_of_loss("orpo", "task.beta"),
    "simpo_gamma": key_of_loss("simpo", "task.gamma"),
    "dpo_label_smoothing": key_of_loss("dpo", "task.label_smoothing"),
    "kto_desirable_weight": key_of_loss("kto", "task.desirable_weight"),
    "kto_undesirable_weight": key_of_loss("kto", "task.undesirable_weight"),
    "precompute_ref_log_probs": lambda found, value: found.put("task.reference", "cached" if value else "auto"),
    "cpo_alpha": missing("simpo has no supervised term"),
    "rpo_alpha": missing(LATER),
    "dpo_use_weighting": missing(LATER),
    "center_rewards_coefficient": missing(LATER),
    "special_tokens": special_tokens,
    "tokens": missing("the vocabulary stays as it is"),
    "datasets": datasets,
    "pretraining_dataset": pretraining,
    "test_datasets": validation,
    "dataset_prepared_path": own_way("tokenized rows are cached by their content"),
    "dataset_processes": same("data.workers"),
    "dataset_num_proc": same("data.workers"),
    "dataset_exact_deduplication": lambda found, value: found.put(
        "data.clean.duplicates", "exact" if value else "keep"
    ),
    "shuffle_merged_datasets": own_way("rows are shuffled each epoch"),
    "push_dataset_to_hub": missing("dstune uploads nothing"),
    "val_set_size": common.share_held_out,
    "sequence_len": same("data.max_length"),
    "min_sample_len": missing("data.clean.min_characters leaves out short rows"),
    "sample_packing": lambda found, value: found.put("data.packing", bool(value)),
    "eval_sample_packing": own_way("evaluation counts every row once"),
    "pad_to_sequence_len": own_way("rows are padded to the longest of a micro-batch"),
    "train_on_inputs": lambda found, value: found.put("task.train_on_prompt", bool(value)),
    "adapter": adapter,
    **dict.fromkeys(
        (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_linear",
            "lora_modules_to_save",
            "peft_use_rslora",
            "peft_use_dora",
            "loraplus_lr_ratio",
            "lora_model_dir",
        ),
        with_others,
    ),
    "lora_fan_in_fan_out": missing(LATER),
    "load_in_4bit": common.four_bits,
    "load_in_8bit": common.quantized,
    "gptq": common.quantized,
    "unfrozen_parameters": missing(LATER),
    "micro_batch_size": batch_size,
    "gradient_accumulation_steps": batch_size,
    "trl": policy_settings,
    "auto_find_batch_size": common.find_batch,
    "eval_batch_size": same("evaluate.micro_batch_size"),
    "num_epochs": common.epochs,
    "optimizer": common.optimizer,
    "lr_scheduler": common.schedule,
    "cosine_min_lr_ratio": common.min_lr_ratio,
    "bf16": precision,
    "bfloat16": missing("bf16 and fp16 keep fp32 weights in the optimizer"),
    "float16": missing("bf16 and fp16 keep fp32 weights in the optimizer"),
    "saves_per_epoch": common.times_an_epoch("checkpoint.every"),
    "evals_per_epoch": common.times_an_epoch("evaluate.every"),
    "save_first_step": missing("set checkpoint.every"),
    "early_stopping_patience": same("trainer.early_stopping.patience"),
    "loss_watchdog_threshold": missing("non-finite losses stop a run (trainer.max_nonfinite_steps), high ones do not"),
    "loss_watchdog_patience": missing("non-finite losses stop a run (trainer.max_nonfinite_steps), high ones do not"),
    "wandb_project": wandb_project,
    "wandb_entity": same("tracking.wandb.entity"),
    "wandb_name": same("run.name"),
    "wandb_mode": with_others,
    "wandb_run_id": own_way("a continued run continues its W&B run"),
    "wandb_watch": missing(LATER),
    "wandb_log_model": missing("dstune uploads nothing"),
    "use_tensorboard": same("tracking.tensorboard"),
    "auto_resume_from_checkpoints": own_way("a run directory is always continued"),
    "plugins": missing(LATER),
    "tiled_mlp": tiled_mlp,
    "tiled_mlp_num_shards": number_of_tiles,
    "context_parallel_size": missing(
        "add parallel=ulysses parallel.size=N by hand, where N divides the model's attention heads"
    ),
    "activation_offloading": missing("activations can be computed again: trainer.activation_checkpointing=true"),
    "debug": own_way("logs/ has a file of every rank"),
    "strict": own_way("unknown keys are always refused"),
}
"""axolotl's key: what it becomes."""
