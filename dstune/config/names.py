"""Lists the names that a user may write (sections, choices, dotted keys) and finds the nearest valid one for a wrong name."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeGuard

from dstune.config.schema import CHOICES, RunConfig, tracking_class
from dstune.core.registry import on_change
from dstune.protocols import CALLBACKS, METRICS

OTHER_TOOLS = {
    "learning_rate": "optimizer.lr",
    "batch_size": "trainer.global_batch_size",
    "train_batch_size": "trainer.global_batch_size",
    "per_device_train_batch_size": "trainer.micro_batch_size",
    "auto_find_batch_size": "trainer.micro_batch_size",
    "per_device_eval_batch_size": "evaluate.micro_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "num_train_epochs": "trainer.epochs",
    "num_epochs": "trainer.epochs",
    "num_steps": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "max_grad_norm": "trainer.grad_clip",
    "gradient_clipping": "trainer.grad_clip",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "output_dir": "run.dir",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluate.every",
    "resume_from_checkpoint": "run.resume",
    "nproc_per_node": "launch.processes",
    "wandb_project": "tracking.project",
    "run_name": "run.name",
    "wd": "optimizer.weight_decay",
    "warmup": "schedule.warmup_ratio",
    "warmup_proportion": "schedule.warmup_ratio",
    "max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "val_set_size": "data.split.validation",
    "val_size": "data.split.validation",
    "validation_split": "data.split.validation",
    "validation_file": "data.validation",
    "eval_file": "data.validation",
    "eval_dataset": "data.validation",
    "valid_file": "data.validation",
    "test_file": "data.test",
    "train_data": "data.train",
    "train_dataset": "data.train",
    "datasets": "data.train",
    "dataset_path": "data.train",
    "data_path": "data.train",
    "max_samples": "data.max_rows",
    "max_train_samples": "data.max_rows",
    "dataloader_num_workers": "data.workers",
    "num_workers": "data.workers",
    "epoch": "trainer.epochs",
    "n_epochs": "trainer.epochs",
    "max_epochs": "trainer.epochs",
    "max_train_steps": "trainer.max_steps",
    "early_stopping_patience": "trainer.early_stopping.patience",
    "metric_for_best_model": "trainer.early_stopping.metric",
    "gradient_clip_val": "trainer.grad_clip",
    "clip_grad": "trainer.grad_clip",
    "use_gradient_checkpointing": "trainer.activation_checkpointing",
    "lora_dropout": "method.dropout",
    "lora_rank": "method.rank",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "r": "method.rank",
    "use_dora": "method.dora",
    "use_rslora": "method.rslora",
    "hub_model_revision": "model.revision",
    "model_revision": "model.revision",
    "out_dir": "run.dir",
    "save_dir": "run.dir",
    "save_every": "checkpoint.every",
    "eval_every": "evaluate.every",
    "eval_batch_size": "evaluate.micro_batch_size",
    "label_names": "task.labels",
    "num_nodes": "launch.nodes",
    "nnodes": "launch.nodes",
    "num_machines": "launch.nodes",
    "wandb_entity": "tracking.wandb.entity",
}
"""dstune's keys by the names that other fine-tuning tools use, which no string distance would find."""

OTHER_VALUES = {
    "openai": "messages",
    "chatml": "messages",
    "chat_template": "messages",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "full": "fp32",
    "flash": "flash_attention_2",
    "fa2": "flash_attention_2",
}
"""dstune's values by the names that other tools use."""


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of `valid`, or None if nothing is similar."""
    choices = list(valid)
    equal = [choice for choice in choices if choice.casefold() == name.casefold()]
    matches = equal or difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    return matches[0] if matches else None


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return the type hints of a class's fields by name. They are cached, because evaluating annotations is slow."""
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}


def has_field(cls: type, path: Sequence[str]) -> bool:
    """Return whether a class of a configuration has a field, or one inside of a section of it. path: the names on the way."""
    hint: Any = cls
    for name in path:
        hints = type_hints(hint) if isinstance(hint, type) and is_dataclass(hint) else {}
        if name not in hints:
            return typing.get_origin(hint) is dict  # its keys are the user's
        hint = hints[name]
    return True


def registered_values() -> dict[str, tuple[str, ...]]:
    """Return the registered names (including plugins') for keys that take such names although their type allows any text."""
    return {
        "trainer.early_stopping.metric": tuple(METRICS),
        "trainer.callbacks": tuple(name for name in CALLBACKS if not CALLBACKS[name].is_automatic()),
    }


ROOT_KEYS: dict[str, Any] = {"plugins": list[str]}
"""Keys outside of the sections, which are read before there is a schema."""
ROOT_EXAMPLES = {"plugins": "[./plugin.py]"}


@cache
def sections() -> tuple[str, ...]:
    """Return the top-level names of the configuration: `model`, `data`, ... in the order of the schema."""
    return tuple(field.name for field in fields(RunConfig))


def classes_of(section: str) -> Mapping[str, type]:
    """Return the possible classes of a section by choice; for a section without choices, one class under an empty name."""
    made_classes = {"tracking": tracking_class}  # its fields are those of the registered trackers
    return CHOICES.get(section) or {
        "": made_classes[section]() if section in made_classes else type_hints(RunConfig)[section]
    }


def default_classes() -> dict[str, type]:
    """Return the class of each section when nothing was chosen: the first of its choices."""
    return {section: next(iter(classes_of(section).values())) for section in sections()}


def is_section(hint: Any) -> TypeGuard[type]:
    """Return whether a type hint is a class with keys of its own."""
    return isinstance(hint, type) and is_dataclass(hint)


def entry_class(hint: Any) -> type | None:
    """Return the class of the entries of a mapping of sections by name (`data.mixture`), None for every other type."""
    cls = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return cls if is_section(cls) else None


def entry_leaves(key: str, mapping: str, cls: type) -> dict[str, Any]:
    """Return the dotted keys with type hints of the entry of `mapping` that contains `key`, such as `data.mixture.chat`."""
    name = key.removeprefix(f"{mapping}.").split(".", 1)[0]
    return leaves(cls, f"{mapping}.{name}")


def leaves(cls: type, prefix: str) -> dict[str, Any]:
    """Return dotted keys of `cls` below `prefix` with their type hints, nested classes expanded."""
    hint_by_key: dict[str, Any] = {}
    for name, hint in type_hints(cls).items():
        key = f"{prefix}.{name}"
        hint_by_key.update(leaves(hint, key) if is_section(hint) else {key: hint})
    return hint_by_key


def keys_of(classes: Mapping[str, type]) -> dict[str, Any]:
    """Return every dotted key of a configuration whose sections have these classes, with its type hint."""
    return ROOT_KEYS | {key: hint for section, cls in classes.items() for key, hint in leaves(cls, section).items()}


def keys_below(section: str) -> dict[str, Any]:
    """Return every dotted key that some class of the section has, with its type hint."""
    return {key: hint for cls in classes_of(section).values() for key, hint in leaves(cls, section).items()}


@cache
def all_keys() -> dict[str, Any]:
    """Return every dotted key that some choice of classes has."""
    return ROOT_KEYS | {key: hint for section in sections() for key, hint in keys_below(section).items()}


on_change(all_keys.cache_clear)


def default_of(key: str) -> Any:
    """Return the default of a dotted key of `all_keys`, in the first choice that has it."""
    if key in ROOT_KEYS:
        return []
    section, *path = key.split(".")
    for cls in classes_of(section).values():
        value = cls()
        for name in path:
            value = getattr(value, name, MISSING)
        if value is not MISSING:
            return value
    raise KeyError(key)


def field_of(key: str) -> Field[Any] | None:
    """Return the field of a dotted key of `all_keys`, in the first choice that has it; None for a key outside of the sections."""
    if key in ROOT_KEYS:
        return None
    *parents, last = key.split(".")
    owner: Any = next(cls for cls in classes_of(parents[0]).values() if key in leaves(cls, parents[0]))
    for name in parents[1:]:
        owner = type_hints(owner)[name]
    return next(field for field in fields(owner) if field.name == last)


def names_choice(key: str) -> bool:
    """Return whether the key is the `name` by which a section's class is known (`method.name`): chosen, not set."""
    section, _, name = key.partition(".")
    return section in CHOICES and name == "name"


def choices_with(key: str) -> list[str]:
    """Return the choices (`method=lora`) whose class has `key`; empty for keys of sections without choices."""
    section = key.split(".", 1)[0]
    return [f"{section}={choice}" for choice, cls in CHOICES.get(section, {}).items() if key in leaves(cls, section)]


def suggest_key(key: str, valid: Iterable[str]) -> str | None:
    """Return the valid key that `key` was probably meant to be: by another tool's name, by its last part, or by similarity."""
    valid = list(valid)
    last = key.rsplit(".", 1)[-1]
    plain = key.lower().replace("-", "_")
    if (own_name := OTHER_TOOLS.get(plain, OTHER_TOOLS.get(last.lower()))) in valid:
        return own_name
    same_last = [candidate for candidate in valid if candidate.rsplit(".", 1)[-1] == last]
    if same_last:
        return nearest(key, same_last, cutoff=0.0)
    # Last parts are compared, as a shared `trainer.` would make any two of its keys similar. Keys of another section are not
    # suggested: launch.nodes is not tracking.notes.
    section = key.rpartition(".")[0]
    if section in sections() or key in sections():
        candidates = [name for name in valid if section and name.startswith(f"{section}.")]
    else:
        candidates = valid
    by_last = {name.rsplit(".", 1)[-1]: name for name in candidates}
    if similar := nearest(last, by_last, 0.6 if candidates is not valid else 0.76):
        return by_last[similar]
    return nearest(plain, valid, cutoff=0.8) if candidates is valid else None
