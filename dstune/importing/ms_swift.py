"""ms-swift: the arguments of `swift sft` and `swift rlhf`, in a shell script or a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.importing import common, images
from dstune.importing.common import HUGGING_FACE, HUGGING_FACE_DEFAULTS, LATER, LIGER
from dstune.importing.result import DIFFERENT, MEANINGLESS, Import
from dstune.importing.rules import Rule, missing, own_code, own_way, same, with_others
from dstune.importing.sources import Source, put_sources

COMMAND = "swift"
"""The key that holds a script's command (`swift sft`)."""
DEFAULTS: dict[str, Any] = {
    **HUGGING_FACE_DEFAULTS,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": None,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": True,
    "packing": False,
    "split_dataset_ratio": 0.0,
}
"""Defaults of ms-swift 3.9 that differ from those of dstune."""
ROWS = 16
"""Of a step, where nothing is said of accumulation."""
LOSSES = ("dpo", "kto", "orpo", "simpo")
"""Values of `rlhf_type` that are imported as preferences; `task.loss` has the same names."""
ZERO = re.compile(r"zero([0-3])(_offload)?")


def defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ms-swift does where the file is silent."""
    kind = raw.get("tuner_type") or raw.get("train_type")
    imported = dict(DEFAULTS) if kind else {**DEFAULTS, "tuner_type": "lora"}
    if kind == "full":
        imported |= {"learning_rate": 1e-5}
    else:
        imported |= {"learning_rate": 1e-4, "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05}
    if raw.get(COMMAND) == "rlhf":
        return {**imported, "rlhf_type": "dpo"}
    return imported if "rlhf_type" in raw else {**imported, COMMAND: "sft"}


def recognised(raw: Mapping[str, Any]) -> bool:
    own_keys = {COMMAND, "train_type", "tuner_type", "rlhf_type", "freeze_vit", "split_dataset_ratio", "torch_dtype"}
    return "model" in raw and bool(own_keys & set(raw))


def check(raw: Mapping[str, Any]) -> None:
    """Raises UserError for a kind of training that is not imported."""
    kind = raw.get("rlhf_type") or (raw.get(COMMAND) if raw.get(COMMAND) not in (None, "rlhf", "sft", "pt") else None)
    if kind and kind not in (*LOSSES, "rm"):
        fix = f"swift sft or pt, or rlhf_type {', '.join((*LOSSES, 'rm'))}"
        raise UserError(Problem("rlhf_type", f"{kind} is not supported", fix, str(kind)))


def command(imported: Import, value: Any) -> None:
    if value in ("sft", "pt"):
        imported.choose("task", "causal_lm" if value == "pt" else "chat")
    else:  # `rlhf_type` says the task
        imported.note("task")


def preference(imported: Import, value: Any) -> None:
    imported.choose("task", "reward" if value == "rm" else "preference")
    if value != "rm":
        imported.put("task.loss", value)
    if value == "simpo" and not imported.get("simpo_gamma"):
        imported.values["task.gamma"] = 1.0


def tuner(imported: Import, value: Any) -> None:
    if value == "full":
        imported.choose("method", "full")
        return
    is_quantized = imported.get("quant_method") == "bnb" and int(imported.get("quant_bits", 4)) == 4
    common.method_of_lora(
        imported,
        rank="lora_rank",
        targets=imported.get("target_modules", "all-linear"),
        save="modules_to_save",
        switches={"use_rslora": "method.rslora", "use_dora": "method.dora", "lorap_lr_ratio": "method.lr_ratio"},
        four_bits=is_quantized,
    )
    if imported.get("target_modules"):
        imported.carried["target_modules"] = ["method.target_modules"]
    if value != "lora":
        imported.drop(f"LoRA is used instead; {LATER}")


def quantized(imported: Import, value: Any) -> None:
    if value == "bnb":
        imported.note("method")
    elif imported.current == "quant_method" or int(value) != 4:
        imported.drop("weights are kept in 16 bits, or in 4 (method=qlora)")
    else:
        imported.note("method")


def batch_size(imported: Import, value: Any) -> None:
    rows = int(imported.get("per_device_train_batch_size", 1))
    if imported.get("gradient_accumulation_steps") is None:
        imported.raw["gradient_accumulation_steps"] = max(1, math.ceil(ROWS / rows / imported.ranks))
    common.global_batch(imported, "per_device_train_batch_size", "gradient_accumulation_steps")


def _source(imported: Import, written: str) -> Source:
    """Read a source, which is `ID:SUBSET#ROWS` or a path."""
    path, _, rows = written.partition("#")
    path, _, subset = path.partition(":")
    source = Source(path, max_rows=int(rows) if rows else None)
    if subset and subset not in ("default", "all"):
        source.subset = subset
    if not re.search(r"\.\w+$|^[./~]", path):
        imported.assume(
            f"{path} is read from the hub of Hugging Face, where ms-swift asks ModelScope unless use_hf is set"
        )
    return source


def dataset(imported: Import, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    put_sources(imported, [_source(imported, str(name)) for name in names])


def validation(imported: Import, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    source = _source(imported, str(names[0]))
    imported.put("data.validation", source.path)
    imported.values.pop("data.split.validation", None)
    if len(names) > 1:
        imported.drop("data.validation takes one source: the first", DIFFERENT)


def held_out(imported: Import, value: Any) -> None:
    if not imported.get("val_dataset"):
        common.share_held_out(imported, value)


def deepspeed(imported: Import, value: Any) -> None:
    if not (named := ZERO.fullmatch(str(value))):
        common.deepspeed(imported, value)
        return
    imported.choose("zero", f"stage{named[1]}")
    if named[2]:
        imported.put("zero.offload_optimizer", "cpu")
        if named[1] == "3":
            imported.put("zero.offload_param", "cpu")


def attention(imported: Import, value: Any) -> None:
    common.attention(imported, {"flash_attn": "flash_attention_2"}.get(str(value), str(value)))


def loss_scale(imported: Import, value: Any) -> None:
    if value == "default":
        imported.note("task.turns")
    elif value == "last_round":
        imported.put("task.turns", "last")
    elif value == "all":
        imported.put("task.train_on_prompt", True)
    else:
        imported.drop(f"every trained token counts the same; {LATER}")


def key_of_loss(losses: tuple[str, ...], key: str) -> Rule:
    """Return the rule of a key whose value is that of dstune's `key` if `rlhf_type` is one of `losses`."""

    def rule(imported: Import, value: Any) -> None:
        if imported.get("rlhf_type") in losses:
            imported.put(key, float(value))
        else:
            imported.drop(f"rlhf_type {' or '.join(losses)} alone uses it", MEANINGLESS)

    return rule


TABLE: dict[str, Rule] = {
    **HUGGING_FACE,
    COMMAND: command,
    "num_processes": own_way("it gives the number of ranks to this import"),
    "model": same("model.path"),
    "model_revision": common.revision,
    "model_type": own_way("known from the model's config.json"),
    "use_hf": own_way("models and rows are those of the hub of Hugging Face"),
    "trust_remote_code": own_code,
    "torch_dtype": common.dtype,
    "attn_impl": attention,
    "template": common.chat_template,
    "system": missing("put the system message into the rows"),
    "agent_template": own_way("tools are printed by the model's chat template"),
    "rlhf_type": preference,
    "beta": key_of_loss(LOSSES, "task.beta"),
    "simpo_gamma": key_of_loss(("simpo",), "task.gamma"),
    "desirable_weight": key_of_loss(("kto",), "task.desirable_weight"),
    "undesirable_weight": key_of_loss(("kto",), "task.undesirable_weight"),
    "label_smoothing": key_of_loss(("dpo",), "task.label_smoothing"),
    "rpo_alpha": missing("a run has one loss"),
    "cpo_alpha": missing("simpo has no supervised term"),
    "ref_model": same("task.reference_model"),
    "tuner_type": tuner,
    "train_type": tuner,
    "tuner_backend": own_way("adapters are those of peft"),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"), with_others),
    **dict.fromkeys(("use_rslora", "use_dora", "lorap_lr_ratio"), with_others),
    "target_regex": missing("method.target_modules takes names of modules"),
    "quant_method": quantized,
    "quant_bits": quantized,
    **images.parts_that_learn("freeze_vit", "freeze_aligner", "freeze_llm"),
    **dict.fromkeys(("vit_lr", "aligner_lr"), images.vision_rate("freeze_vit")),
    "vit_gradient_checkpointing": missing("trainer.activation_checkpointing is of the whole model"),
    **dict.fromkeys(("max_pixels", "MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "SIZE_FACTOR"), images.SIZES),
    **dict.fromkeys(("VIDEO_MAX_PIXELS", "FPS_MAX_FRAMES", "FPS", "NFRAMES"), images.VIDEO),
    "dataset": dataset,
    "val_dataset": validation,
    "split_dataset_ratio": held_out,
    "columns": missing("give data.columns: {role: column}"),
    "dataset_num_proc": same("data.workers"),
    "dataset_shuffle": own_way("rows are shuffled each epoch"),
    "load_from_cache_file": own_way("tokenized rows are cached by their content"),
    "streaming": missing("data.streaming=true reads one source in blocks"),
    "lazy_tokenize": own_way("rows are tokenized once; images are read for each batch"),
    "max_length": same("data.max_length"),
    "truncation_strategy": missing(
        "the start of a long row is kept; a row that would be cut inside an image counts as bad"
    ),
    "packing": lambda imported, value: imported.put("data.packing", bool(value)),
    "padding_free": missing("set data.packing=true"),
    "loss_scale": loss_scale,
    "per_device_train_batch_size": batch_size,
    "gradient_accumulation_steps": batch_size,
    "deepspeed": deepspeed,
    "use_liger_kernel": missing(LIGER),
    "add_version": own_way("a run directory is always continued"),
    "create_checkpoint_symlink": own_way("run.export says which checkpoint is exported"),
    "model_author": missing("put it into the rows"),
    "model_name": missing("put it into the rows"),
}
"""ms-swift's key: what it becomes."""
