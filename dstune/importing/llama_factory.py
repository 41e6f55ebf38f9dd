"""LLaMA-Factory's YAML, with the data sets that its dataset_info.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.importing import common, images
from dstune.importing.common import HUGGING_FACE, HUGGING_FACE_DEFAULTS, LATER, LIGER
from dstune.importing.result import DIFFERENT, MEANINGLESS, Import
from dstune.importing.rules import Rule, missing, own_code, own_way, same, with_others
from dstune.importing.sources import Source, put_sources, report_lost_settings, with_split

DEFAULTS: dict[str, Any] = {
    **HUGGING_FACE_DEFAULTS,
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "cutoff_len": 2048,
    "val_size": 0.0,
    "disable_gradient_checkpointing": False,
}
"""Defaults of LLaMA-Factory that differ from those of dstune."""


DEFAULTS_BY_STAGE: dict[str, dict[str, Any]] = {
    "dpo": {"pref_beta": 0.1, "pref_loss": "sigmoid"},
    "kto": {"pref_beta": 0.1},
}
"""Further such defaults by stage."""
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
"""`pref_loss`, and `task.loss` for it."""
TASKS = {"sft": "chat", "pt": "causal_lm", "dpo": "preference", "kto": "preference", "rm": "reward"}
"""By stage."""


def defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of LLaMA-Factory that matter for the kind of training in the file."""
    return {**DEFAULTS, **DEFAULTS_BY_STAGE.get(str(raw.get("stage")), {})}


def recognised(raw: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in raw and bool({"finetuning_type", "stage", "cutoff_len", "template"} & set(raw))


def check(raw: Mapping[str, Any]) -> None:
    """Raise UserError for a kind of training that is not imported."""
    stage = raw.get("stage") or "sft"
    if stage not in TASKS:
        fix = f"a configuration with stage: {', '.join(TASKS)}"
        raise UserError(Problem("stage", f"{stage} is not supported", fix, str(stage)))
    loss = raw.get("pref_loss") or "sigmoid"
    if stage == "dpo" and loss not in LOSSES:
        fix = f"one of {', '.join(LOSSES)}"
        raise UserError(Problem("pref_loss", "this loss is not supported", fix, str(loss)))


def stage(imported: Import, value: Any) -> None:
    imported.choose("task", TASKS[value])
    if value in ("dpo", "kto", "rm"):
        if value == "kto":
            imported.put("task.loss", "kto")
        imported.put("data.packing", False)
    elif not isinstance(imported.raw.get("packing"), bool):
        imported.put("data.packing", value == "pt" or bool(imported.get("neat_packing")))


def preference_loss(imported: Import, value: Any) -> None:
    if imported.get("stage") == "dpo":
        imported.put("task.loss", LOSSES[value])
        if value == "simpo":
            imported.put("task.gamma", float(imported.get("simpo_gamma", 0.5)))
    else:
        imported.drop("only stage: dpo has pairs", MEANINGLESS)


def key_of_loss(loss: str, key: str) -> Rule:
    """Return the rule of a value that becomes that of dstune's `key` if `loss` (of `task.loss`) is trained, and is dropped
    otherwise."""

    def rule(imported: Import, value: Any) -> None:
        trained = "kto" if imported.get("stage") == "kto" else LOSSES.get(str(imported.get("pref_loss")))
        if imported.get("stage") in ("dpo", "kto") and trained == loss:
            imported.put(key, float(value))
        else:
            imported.drop(f"task.loss={loss} alone uses it", MEANINGLESS)

    return rule


def finetuning(imported: Import, value: Any) -> None:
    if value == "full":
        imported.choose("method", "full")
        for name in ("lora_rank", "lora_target", "lora_alpha", "lora_dropout"):
            imported.drop("finetuning_type is full", "meaningless here", key=name) if name in imported.raw else None
    elif value == "lora":
        common.method_of_lora(
            imported,
            rank="lora_rank",
            targets=imported.get("lora_target", "all"),
            save="additional_target",
            switches={"use_rslora": "method.rslora", "use_dora": "method.dora", "loraplus_lr_ratio": "method.lr_ratio"},
            four_bits=imported.get("quantization_bit") == 4,
        )
        if imported.get("pissa_init"):
            imported.values["method.init"] = "pissa"
            imported.carried["pissa_init"] = ["method.init"]
            if imported.get("pissa_iter", 16) != -1:
                imported.values["method.init_iterations"] = int(imported.get("pissa_iter", 16))
                imported.carried["pissa_iter"] = ["method.init_iterations"]
        imported.carried["lora_target"] = ["method.target_modules"]
    else:
        imported.choose("method", "lora")
        imported.drop(f"LoRA is used instead; {LATER}")


def _described(imported: Import) -> dict[str, Any]:
    """Read dataset_info.json of `dataset_dir`, looked for from here and from the folders above the file."""
    folder = Path(str(imported.get("dataset_dir", "data")))
    file_folder = Path(imported.raw.get("_file", ".")).absolute().parent
    for base in (Path(), *[file_folder, *file_folder.parents][:4]):
        file = base / folder / "dataset_info.json"
        try:
            exists = file.is_file()
        except OSError:  # a name that is too long for a file
            exists = False
        if exists:
            try:
                content = parse_json(read_file(file))
            except (OSError, ValueError) as error:
                raise UserError(Problem(str(file), f"this is no JSON: {error}")) from None
            if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
                raise UserError(Problem(str(file), "a description of data sets is an object of objects")) from None
            return {"_folder": str(base / folder), **content}
    return {}


def _source(imported: Import, name: str, info: Mapping[str, Any]) -> Source | None:
    described = info.get(name)
    if described is None:
        imported.drop(f"{name}: no dataset_info.json describes it; give data.train", DIFFERENT)
        return None
    place = described.get("hf_hub_url") or described.get("file_name")
    ranking = imported.get("stage") in ("dpo", "rm")
    if place is None or bool(described.get("ranking")) != ranking:
        imported.drop(f"{name}: rows of this kind or from this hub; {LATER}", DIFFERENT)
        return None
    path = str(place) if described.get("hf_hub_url") else str(Path(info["_folder"]) / place)
    source = Source(with_split(path, described.get("split")), subset=described.get("subset"))
    columns, tags = dict(described.get("columns") or {}), dict(described.get("tags") or {})
    is_sharegpt = described.get("formatting", "alpaca") == "sharegpt"
    if imported.get("stage") in ("dpo", "rm", "kto"):
        source.format, source.columns = _preference_columns(columns, is_sharegpt=is_sharegpt, is_ranking=ranking)
    elif is_sharegpt:
        role = "messages" if tags.get("role_tag") == "role" else "conversations"
        source.format = role
        if (column := columns.get("messages", "conversations")) != role:
            source.columns[role] = column
        for beside in ("tools", "system"):
            if columns.get(beside, beside) != beside:
                source.columns[beside] = columns[beside]
    elif imported.get("stage") == "pt":
        source.format = "text"
        if (column := columns.get("prompt", "text")) != "text":
            source.columns["text"] = column
    else:
        source.format = "alpaca"
        roles = {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        }
        source.columns = {
            ours: columns[foreign_name]
            for foreign_name, ours in roles.items()
            if foreign_name in columns and columns[foreign_name] != ours
        }
    unread = {"videos", "audios", *(["images"] if imported.get("stage") == "rm" else [])}
    media = sorted(unread & set(columns))
    if "images" in columns and columns["images"] not in ("images", "image"):
        source.columns["images"] = columns["images"]
    if media:
        imported.drop(f"{name}: {', '.join(media)}; {LATER}", DIFFERENT)
        return None
    if folder := described.get("folder"):
        imported.drop(f"{name}: its folder ({folder}); files of the whole data set are read", DIFFERENT)
    source.max_rows = imported.get("max_samples") or described.get("num_samples")
    return source


def _preference_columns(
    columns: Mapping[str, str], *, is_sharegpt: bool, is_ranking: bool
) -> tuple[str, dict[str, str]]:
    """Return `data.format` and `data.columns` for pairs (`is_ranking`) or judged answers."""
    if is_sharegpt:
        prompt = columns.get("messages", "conversations")
        roles = {"prompt" if is_ranking else "messages": prompt}
    else:
        roles = {"prompt": columns.get("prompt", "instruction"), "input": columns.get("query", "input")}
        roles["history"] = columns.get("history", "history")
    if is_ranking:
        roles |= {"chosen": columns.get("chosen", "chosen"), "rejected": columns.get("rejected", "rejected")}
    else:
        roles["label"] = columns.get("kto_tag", "kto_tag")
        if not is_sharegpt:
            roles["completion"] = columns.get("response", "output")
    roles |= {role: columns[role] for role in ("system", "tools") if role in columns}
    judged = "feedback_messages" if is_sharegpt else "feedback"
    return "preference" if is_ranking else judged, {
        ours: foreign_name for ours, foreign_name in roles.items() if ours != foreign_name
    }


def _names(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def dataset(imported: Import, value: Any) -> None:
    names = _names(value)
    info = _described(imported)
    sources = [source for name in names if (source := _source(imported, name, info))]
    put_sources(imported, sources)
    if imported.get("max_samples") and sources:
        imported.carried["max_samples"] = ["data.max_rows" if len(sources) == 1 else "data.mixture"]


def eval_dataset(imported: Import, value: Any) -> None:
    names = _names(value)
    info = _described(imported)
    source = _source(imported, names[0], info)
    if source:
        imported.put("data.validation", source.path)
        if source.max_rows:
            imported.put("evaluate.max_rows", source.max_rows)
        temporary = Import(imported.raw, imported.ranks)  # problems of the training sources are reported with them
        training = [_source(temporary, name, info) for name in _names(imported.get("dataset", []))]
        report_lost_settings(imported, source, [other for other in training if other])
    if len(names) > 1:
        imported.drop("data.validation takes one source: the first", DIFFERENT)


def attention(imported: Import, value: Any) -> None:
    common.attention(imported, {"fa2": "flash_attention_2", "disabled": "eager"}.get(str(value), str(value)))


def quantization(imported: Import, value: Any) -> None:
    if value == 4:
        common.four_bits(imported, value)
    else:
        common.quantized(imported, value)


TABLE: dict[str, Rule] = {
    **HUGGING_FACE,
    "model_name_or_path": same("model.path"),
    "model_revision": common.revision,
    "trust_remote_code": own_code,
    "adapter_name_or_path": missing("begin from a merged model with model.path"),
    "flash_attn": attention,
    "rope_scaling": missing("set model.config_overrides"),
    "use_fast_tokenizer": own_way("tokenizers are fast ones"),
    "resize_vocab": missing("the vocabulary stays as it is"),
    "train_from_scratch": lambda found, value: found.put("model.weights", "random" if value else "pretrained"),
    "enable_liger_kernel": missing(LIGER),
    "use_unsloth": missing(LATER),
    "use_unsloth_gc": missing("activations can be computed again: trainer.activation_checkpointing=true"),
    "upcast_layernorm": missing(LATER),
    "stage": stage,
    "pref_loss": preference_loss,
    "pref_beta": same("task.beta"),
    "simpo_gamma": key_of_loss("simpo", "task.gamma"),
    "dpo_label_smoothing": key_of_loss("dpo", "task.label_smoothing"),
    "kto_chosen_weight": key_of_loss("kto", "task.desirable_weight"),
    "kto_rejected_weight": key_of_loss("kto", "task.undesirable_weight"),
    "pref_ftx": missing("a run has one loss"),
    "pref_bco_weight": missing("a run has one loss"),
    "ld_alpha": missing(LATER),
    "ref_model": same("task.reference_model"),
    "ref_model_adapters": missing("give a merged model as task.reference_model"),
    "ref_model_quantization_bit": missing("the reference is kept in the precision of the run"),
    "finetuning_type": finetuning,
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora"), with_others
    ),
    **dict.fromkeys(("use_dora", "loraplus_lr_ratio", "pissa_init", "pissa_iter"), with_others),
    "pissa_convert": own_way("an export is a plain adapter on the weights as they were"),
    "freeze_trainable_layers": missing(LATER),
    "use_galore": missing(LATER),
    "use_badam": missing(LATER),
    "use_apollo": missing(LATER),
    "use_muon": missing(LATER),
    "use_adam_mini": missing(LATER),
    "pure_bf16": missing("weights are updated in fp32"),
    "quantization_bit": quantization,
    "quantization_method": missing("it belongs to quantization_bit"),
    "double_quantization": missing("it belongs to quantization_bit"),
    "template": common.chat_template,
    "default_system": missing("put the system message into the rows"),
    "enable_thinking": missing("rows are rendered as they are"),
    "dataset": dataset,
    "eval_dataset": eval_dataset,
    "dataset_dir": with_others,
    "media_dir": same("data.image_folder"),
    **images.parts_that_learn("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
    "train_mm_proj_only": missing(images.PROJECTOR),
    "visual_inputs": images.SEEN,
    **dict.fromkeys(
        ("image_max_pixels", "image_min_pixels", "image_resolution", "image_do_pan_and_scan", "crop_to_patches"),
        images.SIZES,
    ),
    **dict.fromkeys(
        (
            *("video_max_pixels", "video_min_pixels", "video_resolution", "video_fps", "video_maxlen"),
            *("use_audio_in_video", "audio_sampling_rate"),
        ),
        images.VIDEO,
    ),
    "cutoff_len": same("data.max_length"),
    "max_samples": with_others,
    "train_on_prompt": lambda found, value: found.put("task.train_on_prompt", bool(value)),
    "mask_history": lambda found, value: found.put("task.turns", "last" if value else "auto"),
    "packing": lambda found, value: found.put("data.packing", bool(value)),
    "neat_packing": lambda found, value: found.note("data.packing"),
    "streaming": missing("data.streaming=true reads one source in blocks"),
    "buffer_size": missing("data.stream_rows is the size of a block"),
    "mix_strategy": missing("data.mixture.NAME.weight says how often rows come"),
    "interleave_probs": missing("data.mixture.NAME.weight says how often rows come"),
    "overwrite_cache": own_way("tokenized rows are cached by their content"),
    "tokenized_path": own_way("tokenized rows are cached by their content"),
    "preprocessing_num_workers": same("data.workers"),
    "preprocessing_batch_size": own_way("rows are tokenized in batches of dstune's own"),
    "val_size": common.share_held_out,
    "disable_gradient_checkpointing": lambda found, value: found.put("trainer.activation_checkpointing", not value),
    "early_stopping_steps": same("trainer.early_stopping.patience"),
    "disable_shuffling": missing("rows are shuffled each epoch"),
    "plot_loss": own_way("metrics.jsonl holds the loss of every step"),
    "compute_accuracy": own_way("token_accuracy is always evaluated"),
    "include_effective_tokens_per_second": own_way("tokens_per_second is in metrics.jsonl"),
    "use_swanlab": missing(LATER),
    "ray_num_workers": missing("ranks are started by dstune or by an outer launch"),
    "predict_with_generate": missing("`dstune generate` answers prompts of a file"),
}
"""LLaMA-Factory's key: what it becomes."""
