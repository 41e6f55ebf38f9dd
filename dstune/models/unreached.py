"""Finds and freezes parts of a model that rows of text never reach: towers for images and sound, and their projectors.

Such a part gets no gradient. In the optimizer it would only decay, and an adapter on it would never learn. So it stays frozen,
outside of adapters and optimizer groups (`model.unreached_parts`).

Unreached are, within the body, all modules that are neither in a module built from `text_config` nor contain one.
`verify_unreached` checks this with a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dstune.config.schema import ModelConfig, UnreachedParts
from dstune.core.errors import Problem, UserError
from dstune.zero.parts import full_count

KEY = "model.unreached_parts"


def text_config_of(architecture: PretrainedConfig) -> PretrainedConfig | None:
    """Return the configuration of the language model in a model with further parts; None for other models."""
    parts = {key: part for key in architecture.sub_configs if (part := getattr(architecture, key, None)) is not None}
    return parts.get("text_config") if len(parts) > 1 else None


def whole_class(chosen: Any, architecture: PretrainedConfig) -> Any:
    """Return the class to load a model with. chosen: the task's class, the same for all architectures.

    `AutoModelForCausalLM` loads only the language model of some vision-language checkpoints (Qwen 3.5) and refuses others
    (Mistral 3). Servers load the class that the checkpoint names, and adapters carry the names of its modules.
    """
    if chosen is not AutoModelForCausalLM or text_config_of(architecture) is None:
        return chosen
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if type(architecture) in AutoModelForMultimodalLM._model_mapping else chosen


def class_of_adapters(chosen: Any, architecture: PretrainedConfig, names: Iterable[str]) -> Any:
    """Return the class to load a model with for an adapter; see `whole_class`. names: of the modules that the adapter changes.

    Adapters of earlier versions have the module names of the language model's class.
    """
    whole = whole_class(chosen, architecture)
    if whole is chosen:
        return chosen
    with torch.device("meta"):
        modules = {name for name, _ in whole.from_config(architecture).named_modules()}
    return whole if all(name in modules for name in names) else chosen


def find_unreached(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the outermost modules, and of parameters outside of them, that no row of text reaches."""
    text = text_config_of(model.config)
    if text is None:
        return ()
    language = [name for name, module in model.named_modules() if _is_built_from(module, text)]
    body = next(name for name, module in model.named_modules() if module is model.base_model)
    if not language or body in language:
        return ()
    return tuple(_beside(model.base_model, body, language, model.get_output_embeddings()))


def _is_built_from(module: nn.Module, config: PretrainedConfig) -> bool:
    # transformers copies the configuration of a part, so only its class can be compared.
    return isinstance(module, PreTrainedModel) and type(module.config) is type(config)


def _beside(module: nn.Module, name: str, language: list[str], head: nn.Module | None) -> Iterator[str]:
    """Yield the names in `module`, which contains a language model, that are not on the path to it."""
    prefix = f"{name}." if name else ""
    yield from (prefix + leaf for leaf, _ in module.named_parameters(recurse=False))
    for leaf, child in module.named_children():
        at = prefix + leaf
        if at in language or child is head:
            continue
        if any(inside.startswith(f"{at}.") for inside in language):
            yield from _beside(child, at, language, head)
        elif next(child.parameters(), None) is not None:
            yield at


def freeze_unreached(model: PreTrainedModel, config: ModelConfig) -> None:
    """Freeze the parts that no row of text reaches, and remember them for `unreached_parts`; with `model.train_vision` all but the
    vision tower."""
    if config.unreached_parts is not UnreachedParts.frozen:
        return
    parts = find_unreached(model)
    if config.train_vision:
        model.dstune_vision_parts = tuple(part for part in parts if "audio" not in part)
        parts = tuple(part for part in parts if "audio" in part)
    model.dstune_unreached = parts
    keep_frozen(model)


def vision_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the vision tower and projector that `model.train_vision` trains; empty without it."""
    names: tuple[str, ...] = getattr(model, "dstune_vision_parts", ())
    return names


def unreached_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules and parameters that `freeze_unreached` froze."""
    names: tuple[str, ...] = getattr(model, "dstune_unreached", ())
    return names


def keep_frozen(model: PreTrainedModel) -> None:
    """Freeze the parts again, after a method may have changed them."""
    for _, parameter in unreached_parameters(model):
        parameter.requires_grad_(False)


def unreached_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of the frozen parts, without those that are shared with a reached part."""
    names = unreached_parts(model)
    if not names:
        return []
    inside, outside = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_within(name, names):
            inside.append((name, parameter))
        else:
            outside.add(id(parameter))
    return [(name, parameter) for name, parameter in inside if id(parameter) not in outside]


def is_within(name: str, parts: tuple[str, ...]) -> bool:
    """Return whether `name` is one of `parts`, or inside of one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def count_by_part(model: PreTrainedModel, count: Callable[[nn.Parameter], int] = full_count) -> dict[str, int]:
    """Return the number of parameters of each frozen part."""
    counts = dict.fromkeys(unreached_parts(model), 0)
    for name, parameter in unreached_parameters(model):
        counts[next(part for part in counts if is_within(name, (part,)))] += count(parameter)
    return counts


def verify_unreached(model: PreTrainedModel, forward: Callable[..., Any], device: torch.device) -> None:
    """Check that the frozen parts do not affect text: with their outputs replaced by NaN, the model's output has no NaN.

    That a part runs proves nothing: some models run a projector on every row and select afterwards (Gemma 3n). Every rank must
    call this. Raises UserError if a frozen part changes the output.
    """
    modules = [(part, module) for part in unreached_parts(model) if (module := _module(model, part)) is not None]
    if not modules:
        return
    called: list[str] = []

    def poison(part: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            called.append(part)
            return _with_nan(output)

        return hook

    # Inner modules too: a wrapper may call them without calling the outermost one.
    handles = [inner.register_forward_hook(poison(part)) for part, module in modules for inner in module.modules()]
    try:
        with torch.no_grad():
            output = forward(input_ids=torch.arange(8, device=device)[None])
    finally:
        for handle in handles:
            handle.remove()
    values = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if called and not all(bool(value.isfinite().all()) for value in values):
        reason = f"text reaches {called[0]} of {type(model).__name__}, which would stay frozen"
        raise UserError(Problem(KEY, reason, f"{KEY}=trained", UnreachedParts.frozen.value))


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter
        return None


def _with_nan(output: Any) -> Any:
    """Return `output` with all numbers replaced by NaN."""
    if isinstance(output, torch.Tensor):
        return torch.full_like(output, float("nan")) if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        return type(output)(map(_with_nan, output)) if type(output) in (tuple, list) else output
    if isinstance(output, dict):
        for key, value in output.items():
            output[key] = _with_nan(value)
    return output
