"""Recognizes what people type out of habit from other tools, or by a common slip, and says what to type instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from dstune.config import preset_names
from dstune.config.examples import complete
from dstune.config.names import nearest, sections
from dstune.config.words import packaged_choices
from dstune.core.errors import Problem
from dstune.protocols import METHODS as METHOD_ROOMS

SWITCHES = ("true", "1", "yes", "on")

HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
}
"""Paths of models that people call by a name without its owner."""

TASK_WORDS = {
    "sft": "task=chat",
    "instruct": "task=chat",
    "instruction": "task=chat",
    "conversation": "task=chat",
    "pretrain": "task=causal_lm",
    "pretraining": "task=causal_lm",
    "pt": "task=causal_lm",
    "lm": "task=causal_lm",
    "clm": "task=causal_lm",
    "text_generation": "task=causal_lm",
    "dpo": "task=preference",
    "ipo": "task=preference task.loss=ipo",
    "kto": "task=preference task.loss=kto",
    "orpo": "task=preference task.loss=orpo",
    "simpo": "task=preference task.loss=simpo",
    "gkd": "task=distillation",
    "kd": "task=distillation",
    "distill": "task=distillation",
    "rm": "task=reward",
    "reward_model": "task=reward",
    "text_classification": "task=classification",
    "sequence_classification": "task=classification",
    "sentiment": "task=classification",
    "ner": "task=token_classification",
    "tagging": "task=token_classification",
    "qa": "task=question_answering",
    "squad": "task=question_answering",
    "translation": "task=seq2seq",
    "summarization": "task=seq2seq",
    "text2text": "task=seq2seq",
    "embeddings": "task=embedding",
    "sentence_similarity": "task=embedding",
}
TRACKERS = {
    "wandb": "tracking.wandb.mode=online",
    "weights_and_biases": "tracking.wandb.mode=online",
    "tensorboard": "tracking.tensorboard=true",
    "mlflow": "tracking.mlflow.uri=ADDRESS",
    "trackio": "tracking.trackio=true",
    "none": "leave it out: without one, metrics go to the run directory only",
    "jsonl": "leave it out: metrics.jsonl is always written",
}
SCHEDULES = {
    "constant_with_warmup": "schedule=constant",
    "cosine_with_restarts": "schedule=cosine",
    "polynomial": "schedule=linear",
    "wsd": "schedule=warmup_stable_decay",
    "none": "schedule=constant",
}
METHODS = {
    "peft": "method=lora",
    "adapter": "method=lora",
    "adapters": "method=lora",
    "dora": "method=lora method.dora=true",
    "pissa": "method=lora method.init=pissa",
    "4bit": "method=qlora",
    "bnb": "method=qlora",
    "sft": "task=chat (a task, not a method)",
    "dpo": "task=preference (a task, not a method)",
    "finetune": "method=full",
    "none": "method=full",
}


def _switched(words: str, otherwise: str = "leave it out") -> Callable[[str], str]:
    """Return the answer for a switch: `words` if it is turned on or has no value, else `otherwise`."""
    return lambda value: words if value.lower() in SWITCHES or not value else otherwise


def _looked_up(table: dict[str, str], key: str) -> Callable[[str], str]:
    """Return the answer for a value that is looked up in `table`; a value that is not there becomes one of `key`."""
    return lambda value: table.get(_plain(value)) or f"{key}={value or 'NAME'}"


def _method(value: str) -> str:
    return METHODS.get(_plain(value)) or (f"method={value}" if value in packaged_choices()["method"] else "method=lora")


def _data(value: str) -> str:
    return f"data={value}" if value in packaged_choices()["data"] else f"data.train={value or 'FILE'}"


def _bits(value: str) -> str:
    return "method=qlora" if value in ("4", "nf4") else "method=qlora (4 bits; there is no training on 8)"


DEVICE = (
    "leave it out: GPUs are used where there are some; launch.processes=N takes N of them, and CUDA_VISIBLE_DEVICES= "
    "in front of the command hides them"
)
ROWS_OF_A_STEP = (
    "trainer.global_batch_size=ROWS, the rows of a step: devices x trainer.micro_batch_size x {value}; "
    "accumulation follows from it"
)

ANSWERS: dict[str, str | Callable[[str], str]] = {
    "model": lambda value: model_words(value or "OWNER/NAME"),
    "base_model": lambda value: model_words(value or "OWNER/NAME"),
    "model_id": lambda value: model_words(value or "OWNER/NAME"),
    "data": _data,
    "device": DEVICE,
    "device_map": DEVICE,
    "use_cpu": DEVICE,
    "no_cuda": DEVICE,
    "gpus": "launch.processes={value}",
    "num_gpus": "launch.processes={value}",
    "n_gpus": "launch.processes={value}",
    "devices": "launch.processes={value}",
    "launch.gpus": "launch.processes={value}",
    "wandb": _switched("tracking.wandb.mode=online", "tracking.wandb.mode=disabled"),
    "tracking.wandb": _switched("tracking.wandb.mode=online", "tracking.wandb.mode=disabled"),
    "report_to": _looked_up(TRACKERS, "tracking"),
    "logger": _looked_up(TRACKERS, "tracking"),
    "bf16": _switched("trainer.precision=bf16", "trainer.precision=fp32"),
    "fp16": _switched("trainer.precision=fp16", "trainer.precision=fp32"),
    "logging_steps": "leave it out: every step is a line of metrics.jsonl",
    "log_every": "leave it out: every step is a line of metrics.jsonl",
    "do_train": "leave it out: `dstune train` trains",
    "do_eval": "leave it out: held-out rows are evaluated; evaluate.every=STEPS says how often",
    "eval_strategy": "evaluate.every=STEPS (0: at the start and the end)",
    "evaluation_strategy": "evaluate.every=STEPS (0: at the start and the end)",
    "save_strategy": "checkpoint.every=STEPS",
    "load_best_model_at_end": _switched("run.export=best"),
    "push_to_hub": "`dstune export RUN --push OWNER/NAME` after the training",
    "hf_token": "export HF_TOKEN=... in the environment, or `hf auth login`",
    "token": "export HF_TOKEN=... in the environment, or `hf auth login`",
    "gradient_accumulation_steps": ROWS_OF_A_STEP,
    "accumulate_grad_batches": ROWS_OF_A_STEP,
    "load_in_4bit": _switched("method=qlora"),
    "load_in_8bit": _bits,
    "quantization_bit": _bits,
    "use_lora": _switched("method=lora", "method=full"),
    "use_peft": _switched("method=lora", "method=full"),
    "lora": _switched("method=lora", "method=full"),
    "finetuning_type": _method,
    "adapter": _method,
    "peft_type": _method,
    "lr_scheduler_type": _looked_up(SCHEDULES, "schedule"),
    "lr_scheduler": _looked_up(SCHEDULES, "schedule"),
    "optim": lambda value: "optimizer=sgd" if value == "sgd" else "optimizer=adamw",
    "optimizer.type": lambda value: "optimizer=sgd" if value.lower() == "sgd" else "optimizer=adamw",
    "adam_beta1": "'optimizer.betas=[{value},0.999]'",
    "adam_beta2": "'optimizer.betas=[0.9,{value}]'",
    "deepspeed": "zero=file zero.path={value}",
    "ds_config": "zero=file zero.path={value}",
    "fsdp": "zero=stage3",
    "fsdp_config": "zero=stage3",
    "stage": lambda value: f"zero=stage{value}" if value.isdigit() else TASK_WORDS.get(_plain(value), "task=NAME"),
    "dataset_text_field": "data.columns.text={value}",
    "text_column": "data.columns.text={value}",
    "label_column": "data.columns.label={value}",
    "chat_template": "model.chat_template={value}",
    "template": "model.chat_template={value}",
    "compute_dtype": "trainer.precision={value}",
    "dtype": "trainer.precision={value}",
    "torch_dtype": "trainer.precision={value}",
    "mixed_precision": "trainer.precision={value}",
    "flash_attn": "model.attention=flash_attention_2",
    "flash_attention": "model.attention=flash_attention_2",
    "attn_implementation": "model.attention={value}",
}
"""What to type instead of a key that does not exist, by that key. `{value}` stands for the value that was typed."""


def answer(key: str, value: str = "") -> str | None:
    """Return what to type instead of `key=value`, if that is a habit from other tools or a common slip; else None."""
    plain = key.lower().replace("-", "_")
    section, _, name = plain.rpartition(".")
    # Other tools keep everything in `trainer`. A name in another section of dstune is a slip within that section.
    template = ANSWERS.get(plain) or (None if section in sections() and section != "trainer" else ANSWERS.get(name))
    if template is None:
        return None
    return template.format(value=value or "VALUE") if isinstance(template, str) else template(value)


def _choice_words(group: str, value: str) -> str | None:
    """Return what to type instead of `group=value`, a choice that does not exist; None if the value is not a known habit."""
    plain = _plain(value)
    if group == "model":
        if Path(value).is_dir() or value.startswith(("sample:", ".", "~", "/")):
            return None
        has_owner = "/" in value and preset_names.without_address(value) == value
        return None if has_owner else model_words(value)
    if group == "tracking":
        return TRACKERS.get(plain)
    if group == "method" and plain in METHODS:
        return METHODS[plain]
    if group == "schedule":
        return SCHEDULES.get(plain)
    if group == "launch" and plain in ("torchrun", "deepspeed", "accelerate"):
        return "launch=local, which starts a rank for each GPU; launch=hostfile starts them on several machines"
    if group == "task":
        prepared = f"experiment={value}" if value in packaged_choices()["experiment"] else None
        words = TASK_WORDS.get(plain)
        return f"{words}, or {prepared}, a prepared one" if words and prepared else words or prepared
    elsewhere = next((other for other, names in packaged_choices().items() if other != group and value in names), None)
    return f"did you mean {complete(f'{elsewhere}={value}')}?" if elsewhere else None


def unknown_choice(group: str, choice: str, options: Sequence[str]) -> Problem:
    """Return the problem with a choice that a group does not have."""
    if words := _choice_words(group, choice):
        return Problem(group, f"there is no such {group}", as_fix(words), choice)
    similar = nearest(choice, options) or next((option for option in options if option.endswith(choice)), None)
    fix = f"did you mean {complete(f'{group}={similar}')}?" if similar else f"one of {', '.join(options)}"
    key = {"data": "data.train", "model": "model.path"}.get(group)
    if key and re.search(r"[/.~]|^sample:", choice) and not (similar and "/" not in choice):
        fix = f"{group}= takes a name; rows and models of yours go into {key}={choice}"
    reason = METHOD_ROOMS.refused.get(choice) if group == "method" else None
    return Problem(group, f"is not offered: {reason}" if reason else f"there is no such {group}", fix, choice)


def model_words(name: str) -> str:
    """Return what to type for a model that the user calls `name`: `model=PRESET` if it has a preset, else `model.path=...`."""
    if name in packaged_choices()["model"]:
        return f"model={name}"
    if Path(name).is_dir():
        return f"model.path={name}"
    if preset := preset_names.preset_meant(name):
        return f"model={preset.name} ({preset.path}); another model of the hub is model.path=OWNER/NAME"
    name = preset_names.without_address(name)
    if "/" in name:
        return f"model.path={name}"
    if name.lower() in HUB_NAMES:
        return f"model.path={HUB_NAMES[name.lower()]}"
    candidates = preset_names.candidates(name)
    if not candidates and (similar := preset_names.nearest_preset(name)):
        candidates = [similar]
    elsewhere = "another model of the hub is model.path=OWNER/NAME"
    if len(candidates) == 1:
        return f"did you mean model={candidates[0].name} ({candidates[0].path})? Another model of the hub is model.path=OWNER/NAME"
    if candidates:
        listed = ", ".join(f"model={preset.name} ({preset.path})" for preset in candidates)
        return f"this may be {listed}; {elsewhere}"
    if relatives := preset_names.family(name) or preset_names.nearest_family(name):
        return f"presets of this family: {', '.join(f'model={preset.name}' for preset in relatives)}; {elsewhere}"
    return f"model.path=OWNER/{name} for a model of the hub, model.path=./FOLDER for a folder; `dstune models` lists prepared ones"


def with_preset_names(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> list[str]:
    """Return `overrides` with the name of the preset instead of another spelling in `model=...`: `qwen3-4b`, the model's name on
    the hub with or without its owner, or Ollama's `qwen3:4b`.

    A name that could mean several presets, or that is the user's own choice, stays unchanged.
    """
    searched = [path for text in overrides if text.startswith("hydra.searchpath=") for path in _FOLDERS.findall(text)]
    return [_with_preset_name(text, [*config_dirs, *searched]) for text in overrides]


_FOLDERS = re.compile(r"file://([^,\]'\"]+)")
"""Folders in a value of `hydra.searchpath`."""


def _with_preset_name(text: str, config_dirs: Sequence[str | Path]) -> str:
    key, equals, value = text.partition("=")
    if key != "model" or not equals or value in packaged_choices()["model"]:
        return text
    if any((Path(folder) / "model" / f"{value}.yaml").is_file() for folder in config_dirs):
        return text
    preset = preset_names.preset_meant(value)
    return f"model={preset.name}" if preset else text


def as_fix(words: str) -> str:
    """Return an answer as the fix of a problem: `write KEY=VALUE` with what a choice in it needs, or a sentence as it is."""
    settings = re.match(r"(?:'?[a-z_.]+=\S+(?: |$))*", words)
    if not settings or not settings[0]:
        return words
    first = shlex.split(settings[0]) if settings[0].count("'") % 2 == 0 else []
    if any("." not in setting.partition("=")[0] for setting in first):
        return f"write {complete(*first)} {words[settings.end() :]}".rstrip()
    return f"write {words}"


def _plain(value: str) -> str:
    return re.sub(r"[-\s]+", "_", value.strip().lower())
