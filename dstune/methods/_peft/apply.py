"""Adds peft's adapters to a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.methods._peft.config import AdapterConfig, ModuleAdapterConfig
from dstune.methods._peft.files import HEADS, tensors_of
from dstune.models.load import NewWeights, new_weights
from dstune.models.peft_load import unloadable_weights
from dstune.models.unreached import is_within, unreached_parts
from dstune.planning.adapters import UNADAPTED
from dstune.protocols import task_of
from dstune.zero.parts import gathered


def refuse_tokens(name: str, model: PreTrainedModel) -> None:
    """Raises UserError if rows of added tokens have to be trained, which the method `name` cannot do."""
    rows = new_weights(model).rows
    if rows:
        reason = f"{len(rows)} added tokens have to be trained, which method={name} cannot"
        raise UserError(Problem("method", reason, "method=lora, or model.chat_template=null"))


def finish(method: AdapterConfig, adapted: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Copy the values of the adapter that training starts from, if there is one, into `adapted`; return `adapted`."""
    if method.adapter and model.device.type != "meta":  # an export, which takes all weights from the checkpoint
        load_adapter(adapted, Path(method.adapter))
    return adapted


def load_adapter(adapted: Any, folder: Path) -> None:
    """Give the adapter `default` of a PeftModel the weights in `folder`. Every rank must call it.

    Raises UserError if the two do not have the same tensors.
    """
    from dstune.models.peft_import import peft

    tensors = tensors_of(folder, "method.adapter")
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    # Modules that are trained whole may be partitioned already.
    with gathered(list(trainable.values()), modified_by_rank=0):
        expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if missing := sorted(expected ^ set(tensors)):
            reason = f"does not fit the model: {missing[0]} is only in {'it' if missing[0] in tensors else 'the model'}"
            fix = "model.path and model.chat_template as the adapter was trained, and its own target_modules"
            raise UserError(Problem("method.adapter", reason, fix, str(folder)))
        try:
            peft.set_peft_model_state_dict(adapted, tensors)
        except RuntimeError as error:
            reason = f"does not fit the model: {' '.join(str(error).split())[:200]}"
            raise UserError(Problem("method.adapter", reason, "model.path as it was trained", str(folder))) from error


def common_settings(method: ModuleAdapterConfig, model: PreTrainedModel, config: RunConfig) -> dict[str, Any]:
    """Return the arguments shared by peft's configurations of adapters on modules."""
    from dstune.models.peft_import import peft

    targets, whole, kind = _targets(method), _modules_to_save(method, new_weights(model)), task_type(config, model)
    if targets == "all-linear" and kind in (peft.TaskType.TOKEN_CLS, peft.TaskType.QUESTION_ANS):
        # peft leaves the head out of all-linear only for sequence classifiers. It would adapt this one, then fail to copy it.
        whole += [name for name, _ in model.named_children() if name in HEADS and name not in whole]
    parts = unreached_parts(model)
    if parts:
        _refuse_unreached(whole, model)
    unadapted = _unadapted(model) if targets == "all-linear" else set()
    if parts or unadapted:
        targets = _reached_targets(method, targets, whole, model, parts)
    if unadapted:
        targets -= unadapted
    return {"target_modules": targets, "modules_to_save": whole or None, "task_type": kind}


def _unadapted(model: PreTrainedModel) -> set[str]:
    """Return the linear layers that `all-linear` leaves without an adapter.

    Those of the model's type, and those whose names end like a head without being one: the `pre_classifier` of DistilBERT. peft
    trains them whole with the head, and fails to copy them if they also get an adapter.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    like_heads = {name for name in linear if name.endswith(tuple(HEADS)) and not HEADS & {*name.split(".")}}
    return like_heads | {name for name in linear if name.endswith(UNADAPTED.get(model.config.model_type, ()))}


def _reached_targets(
    method: ModuleAdapterConfig, targets: Any, whole: list[str], model: PreTrainedModel, parts: tuple[str, ...]
) -> Any:
    """Return the full names of the modules that get an adapter, without those in `parts`: a tower's modules have endings such as
    `q_proj` too. None if peft chooses.

    Raises UserError if no module remains.
    """
    if targets is None:
        return None
    head = model.get_output_embeddings()
    reached = {name: module for name, module in model.named_modules() if not is_within(name, parts)}
    if targets == "all-linear":
        kept_whole = {*HEADS, *whole}
        names = {name for name, module in reached.items() if isinstance(module, (nn.Linear, Conv1D))}
        names = {name for name in names if reached[name] is not head and not kept_whole & set(name.split("."))}
    else:
        names = {name for name in reached if any(f".{name}".endswith(f".{ending}") for ending in targets)}
    if not names:
        reason = f"rows of text reach no such module: {', '.join(parts)} stay as they are"
        raise UserError(Problem("method.target_modules", reason, "[all-linear]", str(method.target_modules)))
    return names


def _refuse_unreached(whole: list[str], model: PreTrainedModel) -> None:
    """Raises UserError if a module is to be trained whole that rows never reach."""
    parts = unreached_parts(model)
    for name, _ in model.named_modules():
        if is_within(name, parts) and (
            ending := next((module_name for module_name in whole if f".{name}".endswith(f".{module_name}")), "")
        ):
            reason = f"{name} would not learn: rows of text never reach it"
            raise UserError(Problem("method.modules_to_save", reason, "leave it out", ending))


def adapt(
    model: PreTrainedModel,
    settings: Any,
    refused: Callable[[str], Problem],
    whole: list[nn.Parameter],
    config: RunConfig,
) -> Any:
    """Return the model with peft's adapters on its modules.

    Raises UserError if it has no such modules, or if peft could not load one of the adapters again.

    refused: makes a problem from peft's error message. whole: parameters that must not be partitioned while peft copies them.
    """
    from dstune.models.peft_import import peft

    try:
        with gathered(whole), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of what peft calls
            adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(refused(first_line(error))) from error
    _refuse_unloadable(adapted)
    if config.trainer.activation_checkpointing:
        # A frozen embedding's output has no gradient, and checkpointing would not differentiate a block whose input has none.
        model.enable_input_require_grads()
    return adapted


def _refuse_unloadable(adapted: Any) -> None:
    """Raises UserError if peft could not load the adapter again: a server would answer with parts of it."""
    weights = unloadable_weights(adapted)
    if not weights:
        return
    lost = sorted({name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in weights})
    every = {name.removeprefix("base_model.model.") for name in adapted.base_model.targeted_module_names}
    endings = {name.rpartition(".")[2] for name in every} - {name.rpartition(".")[2] for name in lost}
    reason = (
        f"peft cannot load adapters of {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''} again: it renames them"
    )
    fix = f"method.target_modules=[{','.join(sorted(endings))}]" if endings else "method=full"
    raise UserError(Problem("method.target_modules", reason, fix, adapted.config.model_type))


def task_type(config: RunConfig, model: PreTrainedModel) -> Any:
    """Return peft's name of the task, which decides which head is trained with the adapter and which class wraps the model."""
    from dstune.models.peft_import import peft

    if name := task_of(config.task).peft_type:
        return peft.TaskType[name]
    return peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM


def _targets(method: ModuleAdapterConfig) -> Any:
    if not method.target_modules:  # peft chooses
        return None
    return "all-linear" if method.target_modules == ["all-linear"] else method.target_modules


def _modules_to_save(method: ModuleAdapterConfig, new: NewWeights) -> list[str]:
    """Return the modules to train whole: the requested ones, and those whose weights are new (a pooler, a head).

    An adapter's folder holds no other weights of the model, so a new weight that stays frozen would differ at every load.
    """
    owners = {name.rpartition(".")[0] for name in new.parameters}
    # peft adds the task's head by itself.
    owners = {owner for owner in owners if not HEADS & set(owner.split("."))}
    return [*method.modules_to_save, *sorted(owners - set(method.modules_to_save))]
