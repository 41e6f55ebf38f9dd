"""Checks from files, before an engine loads an adapter, that the adapter belongs to the served base model.

Without this check vLLM silently accepted an adapter of another model and answered with the base's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dstune.checkpoint.contents import layouts_of, tensor_shapes
from dstune.checkpoint.record import public_name
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.planning.source import cached_snapshot
from dstune.serve.source import Source

LANGUAGE_MODEL = "model.language_model."
"""Prefix of the language model's tensors in multi-part classes of transformers."""
_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight$")


def check(adapter: Source, base: Source, *, one_template: bool) -> None:
    """Check that `adapter` can run on the engine of `base`. Raises UserError with every problem. one_template: the engine uses the
    base's chat template for all adapters."""
    problems = [
        Problem(adapter.name, reason, fix, value) for reason, fix, value in _problems(adapter, base, one_template)
    ]
    if problems:
        raise UserError(problems)


def _problems(adapter: Source, base: Source, one_template: bool) -> Iterator[tuple[str, str, str]]:
    assert adapter.folder is not None
    if not (adapter.folder / "adapter_model.safetensors").is_file():
        yield "holds no adapter_model.safetensors", "dstune export RUN", str(adapter.folder)
        return
    if _same_base(adapter, base) is False:
        yield (
            f"was trained on {public_name(adapter.base)}, the engine serves {public_name(base.path)}",
            "",
            adapter.base,
        )
    if adapter.base_revision and base.base_revision and adapter.base_revision != base.base_revision:
        reason = f"was trained on revision {adapter.base_revision}, the engine serves {base.base_revision}"
        yield reason, "", ""
    # For a base given by its hub id, these are the files that an engine would load.
    base_folder = base.folder or cached_snapshot(ModelConfig(path=base.path, revision=base.base_revision))
    if base_folder is not None:
        yield from _wrong_shapes(adapter.folder, base_folder)
    if one_template:
        yield from _other_template(adapter, base)


def _same_base(adapter: Source, base: Source) -> bool | None:
    """Return whether an adapter and a model have the same base; None if the names alone cannot tell."""
    if adapter.base in (base.path, base.base, str(base.folder)):
        return True
    folder = Path(adapter.base)
    if base.folder is not None and folder.is_dir():
        return folder.resolve() == base.folder or _config(folder) == _config(base.folder)
    return None if folder.is_absolute() else False


def _config(folder: Path) -> bytes:
    try:
        return (folder / "config.json").read_bytes()
    except OSError:
        return str(folder).encode()


def _other_template(adapter: Source, base: Source) -> Iterator[tuple[str, str, str]]:
    fix = "an engine of its own, or merged: dstune export RUN --merge"
    if adapter.template is not None and base.template is not None and adapter.template != base.template:
        yield "has another chat template than the base, which this engine uses for all adapters", fix, ""
    adapter_digest, base_digest = adapter.digest("tokenizer.json"), base.digest("tokenizer.json")
    if adapter_digest and base_digest and _added(adapter) - _added(base):
        yield f"adds tokens that the base lacks: {', '.join(sorted(_added(adapter) - _added(base))[:5])}", fix, ""


def _added(source: Source) -> set[str]:
    folder = source.prompted_as or source.folder
    assert folder is not None
    settings = object_in(folder / "tokenizer.json")
    tokens = settings.get("added_tokens")
    return {
        str(token.get("content")) for token in (tokens if isinstance(tokens, list) else []) if isinstance(token, dict)
    }


def _wrong_shapes(adapter: Path, base: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the modules that the base lacks or has in another shape."""
    shapes = {name: shape for file in sorted(base.glob("*.safetensors")) for name, shape in tensor_shapes(file).items()}
    settings = object_in(adapter / "adapter_config.json")
    if not shapes or settings.get("peft_type") != "LORA" or settings.get("target_parameters"):
        return
    ends = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    factors: dict[str, dict[str, list[int]]] = {}
    unloadable = []
    for name, shape in tensor_shapes(adapter / "adapter_model.safetensors").items():
        match = _FACTOR.match(name)
        if match is not None:
            factors.setdefault(match[1], {})[match[2]] = shape
        elif "lora_" in name and "embedding" not in name and "magnitude" not in name:
            unloadable.append(name)
    if unloadable:
        yield (
            f"{len(unloadable)} tensors have names that peft does not load, first {unloadable[0]}",
            "dstune export RUN",
            "",
        )
    if not factors:
        yield "holds no low-rank matrices under the names that peft loads", "dstune export RUN", ""
    absent = [name for name in factors if _weight_of(name, ends) is None]
    inside = [name for name in absent if _weight_of(f"{LANGUAGE_MODEL}{name.removeprefix('model.')}", ends) is not None]
    if inside:
        reason = (
            f"its tensors have the names of a language model alone, first {inside[0]}: servers load a model of which it is a part, "
            "and ignore them"
        )
        yield reason, "dstune export RUN, which writes the names of the whole model", ""
    elif absent:
        yield (
            f"the base lacks {len(absent)} modules that it changes, first {absent[0]}",
            "give the adapter's own base",
            "",
        )
    for name, pair in factors.items():
        weight = _weight_of(name, ends)
        if weight is None or set(pair) != {"A", "B"} or len(weight) != 2:
            continue
        lora_b, lora_a = pair["B"], pair["A"]
        if len(lora_b) != 2 or len(lora_a) != 2 or [lora_b[0], lora_a[1]] != list(weight):
            adapter_shape = f"[{', '.join(map(str, [*lora_b[:1], *lora_a[1:]]))}]"
            reason = f"{name} has the shape {list(weight)} in the base, the adapter is for {adapter_shape}"
            yield reason, "give the adapter's own base", ""
            return


def _weight_of(name: str, ends: Mapping[str, list[int]]) -> list[int] | None:
    """Return the shape of a module's weight. Some bases omit the model's outermost name, swap two names, or name the language model
    differently beside a vision tower (`visual.`, Qwen2-VL and 2.5-VL)."""
    candidates = [*layouts_of(name)[:2], name.partition(".")[2]]
    if name.startswith(LANGUAGE_MODEL) and any(end.startswith("visual.") for end in ends):
        candidates.append(f"model.{name.removeprefix(LANGUAGE_MODEL)}")
    for candidate in candidates:
        if candidate in ends:
            return ends[candidate]
    return None
