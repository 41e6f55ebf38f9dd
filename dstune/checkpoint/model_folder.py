"""Writes a checkpoint's weights as a folder that transformers or peft can load, one tensor at a time.

The model is built by the same two functions as for training, so names, head, labels and adapters are those of the run; but it is
built on the meta device, without memory. Trained weights come from the shards, all others from the base model's files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dstune.checkpoint import store
from dstune.checkpoint.adapters import ADAPTED, adapters_by_module, fill, merged, merged_parameter, replace_tensors
from dstune.checkpoint.contents import PROCESSOR_FILES
from dstune.checkpoint.shards import Weights
from dstune.checkpoint.surroundings import Surroundings
from dstune.checkpoint.weights import Source, saved_tensors, tied_names, write_safetensors
from dstune.config.convert import EnvironmentText
from dstune.config.schema import Attention, InitialWeights, ModelConfig, RunConfig
from dstune.config.stored_formats import bitsandbytes_bits, quantization_of
from dstune.core.errors import Problem, UserError
from dstune.data.chat.template import with_arguments
from dstune.data.stopping import stop_token_ids
from dstune.models import pooled
from dstune.models.base_weights import BaseFiles, BaseWeights, Loading
from dstune.models.load import (
    NewWeights,
    complete_generation,
    load_config,
    load_model,
    load_tokenizer,
    local_path,
    model_folder,
    new_weights,
)
from dstune.protocols import method_of, task_of
from dstune.protocols.method_options import MergesAdapter, ShiftsFrozenWeights
from dstune.protocols.task_options import ExportsFiles, RewritesTemplate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CLASSIFIER_CODE = "modeling_dstune"
"""The module that is exported along with a classifier that has dstune's own head."""


def write_model(
    config: RunConfig,
    checkpoint: Path,
    folder: Path,
    *,
    merge: bool,
    max_shard_size: int | str,
    with_dropped: bool = True,
) -> PretrainedConfig:
    """Write weights, configuration, generation settings, tokenizer and processor files of `checkpoint` to the empty `folder`.

    A run with an adapter writes the adapter. With `merge`, or if the base has random weights and so exists nowhere else, it writes
    a complete model. with_dropped: include in a complete model the tensors of the base's files that transformers does not load.

    Returns the model's configuration, which an adapter's folder does not contain.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.model)
    state = store.read_state(checkpoint)
    labels = tuple(state["labels"])
    task = task_of(config.task)
    if isinstance(task, RewritesTemplate) and tokenizer.chat_template:
        task.rewrite_template(tokenizer)
    _build_in(tokenizer, state.get("chat_template_kwargs") or {})
    trained = Weights(checkpoint)
    built = _build(config, tokenizer, labels, trained)
    expected = {name for name, parameter in built.module.named_parameters() if parameter.requires_grad}
    absent = expected - set(trained) if built.adapted else set()
    assert not absent, f"{checkpoint} has no weights for {sorted(absent)[:3]}"
    if not built.adapted:
        refuse_added(parameter_names(built.model), trained.parameters, config.method.name)

    stops = stop_token_ids(tokenizer)
    _set_generation(config.model, built.model, stops, tokenizer.pad_token_id)
    surroundings = None
    if config.model.weights is not InitialWeights.random:
        surroundings = Surroundings.of(config.model, built.model)
    if built.adapted and not merge and config.model.weights is not InitialWeights.random:
        _save_adapter(config, built, trained, folder, surroundings)
    else:
        refuse_rounded_base(config.model)
        weights = _Sources(config, tokenizer, labels, built, trained)
        if weights.untied:
            refuse_rows_beside(trained, config.method.name)
            _untie(built.model, weights.untied, config.method.name)
        sources: Mapping[str, Source] = weights.all()
        model, model_state = built.model, built.state
        if surroundings is not None:
            model, model_state = surroundings.model, surroundings.model.state_dict()
            sources = surroundings.sources(config.model, sources)
            model.generation_config = built.model.generation_config
            model.config.get_text_config().tie_word_embeddings = built.model.config.tie_word_embeddings
        dropped = dropped_sources(config.model, model, model_state) if with_dropped else {}
        # Training turned the cache of past keys and values off; generation needs it. Encoder-decoders made of two models lack the
        # setting.
        model.config.use_cache = getattr(load_config(config.model), "use_cache", True)
        _save_whole(model, built.dtype, sources, dropped, folder, max_shard_size)
    tokenizer.save_pretrained(folder)
    if config.model.weights is not InitialWeights.random:
        copy_processor_files(config.model, folder, has_template=bool(tokenizer.chat_template))
    architecture: PretrainedConfig = built.model.config
    if isinstance(task, ExportsFiles):
        task.write_export(config, architecture, folder)
    return architecture


def refuse_added(model: set[str], trained: Iterable[str], method: str) -> None:
    """Raise UserError if a method without an adapter trains parameters that the plain model does not have, since the export would
    lack them. model: names of all of the plain model's parameters."""
    if added := sorted(set(trained) - model):
        listed = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
        reason = f"it trains parameters that the exported model does not have: {listed}"
        fix = "keep the model's parameter names, or derive the method from dstune.methods._peft.Adapter"
        raise UserError(Problem("method", reason, fix, method))


def refuse_rounded_base(config: ModelConfig) -> None:
    """Raise UserError if bitsandbytes quantized the weights of the base, since a sum with an adapter has no place in them."""
    if config.weights is not InitialWeights.random and (bits := bitsandbytes_bits(load_config(config).to_dict())):
        reason = f"the weights of {config.path} are stored in {bits} bits by bitsandbytes, and no adapter can be merged into them"
        raise UserError(Problem("--merge", reason, "export the adapter, without --merge"))


def refuse_rows_beside(trained: Iterable[str], method: str) -> None:
    """Raise UserError if rows of new tokens were trained along with another adapter on the vocabulary."""
    if any("trainable_tokens_delta" in name for name in trained):
        reason = (
            "rows of new tokens were trained along with another adapter on the vocabulary, and a merge cannot keep both"
        )
        raise UserError(Problem("--merge", reason, "export the adapter, without --merge", method))


def parameter_names(model: Any) -> set[str]:
    """Return all names of all parameters. A tied weight has several, and at stage 0 a checkpoint contains it under each."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _build_in(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Make the arguments of training the defaults of the chat template."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = with_arguments(template, arguments)
    elif template:
        tokenizer.chat_template = {name: with_arguments(text, arguments) for name, text in template.items()}


@dataclass(frozen=True)
class _Built:
    """The model on the meta device."""

    module: Any
    """The module as in training, including adapters."""
    model: Any
    """The model of transformers; with adapters, the one inside of `module`."""
    names: Mapping[str, Tensor]
    """The tensors that the model saves without adapters, by name."""
    state: Mapping[str, Tensor]
    """The model's `state_dict` without adapters, which has tied weights under each of their names."""
    tied: Mapping[str, str]
    """Additional names of tied weights, each with the name under which the weight is saved."""
    dtype: torch.dtype
    """The dtype of the stored model, from its config.json."""

    @property
    def adapted(self) -> bool:
        return self.module is not self.model


def _build(config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], trained: Weights) -> _Built:
    architecture = load_config(config.model)
    dtype = architecture.dtype or torch.float32
    config = plain(config)
    with torch.device("meta"):
        on_meta = replace(config, model=replace(config.model, weights=InitialWeights.random))
        model = load_model(on_meta, tokenizer, labels, dtype)
        names, state, tied = saved_tensors(model), model.state_dict(), tied_names(model)
        method = method_of(config.method)
        if not method.adapter:
            return _Built(model, model, names, state, tied, dtype)
        # Only loading the base would tell which weights are new. The checkpoint stores them as complete modules, so it tells too.
        saved = (name.split(".modules_to_save.default.") for name in trained)
        parts = {f"{owner[0].removeprefix(ADAPTED)}.{owner[1]}" for owner in saved if len(owner) == 2}
        parts &= set(names)
        rows = new_weights(model).rows if any("trainable_tokens_delta" in name for name in trained) else ()
        model.dstune_new_weights = NewWeights(tuple(sorted(parts)), rows)
        return _Built(method.apply(model, config), model, names, state, tied, dtype)


def plain(config: RunConfig) -> RunConfig:
    """Return `config` with eager attention and without activation checkpointing. Every model has eager attention, also without a
    GPU, and its weights are the same as with any other kind."""
    return replace(
        config,
        model=replace(config.model, attention=Attention.eager),
        trainer=replace(config.trainer, activation_checkpointing=False),
    )


class _Sources:
    """Finds the source of each tensor of the complete model: the shards, the base model's files, or a sum of both."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        labels: tuple[str, ...],
        built: _Built,
        trained: Weights,
    ):
        self._built, self._trained = built, trained
        method = method_of(config.method)
        self._merging = method if isinstance(method, MergesAdapter) else None
        self._adapters = adapters_by_module(trained, () if self._merging is None else self._merging.tensor_marks)
        self._trained_on: Mapping[str, Callable[[Tensor], Tensor]] = {}
        if isinstance(method, ShiftsFrozenWeights):
            self._trained_on = method.trained_on(built.model, trained)
        apart = {owner for name, owner in built.tied.items() if self._has_own(name) or self._has_own(owner)}
        self.untied = {name: owner for name, owner in built.tied.items() if built.adapted and owner in apart}
        """Names of tied weights that have separate adapters, so that each becomes a separate tensor in the merged model."""
        whole = {name: self._trained_name(name) for name in (*built.names, *self.untied)}
        frozen = {self._saved(name) for name, key in whole.items() if not key}
        missing = {name: built.names[name].shape for name in built.names if name in frozen}
        self._whole = {name: key for name, key in whole.items() if key}
        self._base = self._base_weights(plain(config), tokenizer, labels, missing)

    def all(self) -> dict[str, Source]:
        dtype, names = self._built.dtype, self._built.names
        tensors = {**names, **{name: names[owner] for name, owner in self.untied.items()}}
        return {
            name: Source(
                tensor.shape,
                self._stored_dtype(name) or (dtype if tensor.is_floating_point() else tensor.dtype),
                partial(self._read, name),
            )
            for name, tensor in tensors.items()
        }

    def _stored_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of the tensor in the base's file if the run did not change the tensor; else None."""
        saved = self._saved(name)
        if self._changes(name) or not isinstance(self._base, _Base):
            return None
        return self._base.stored_dtype(saved)

    def _changes(self, name: str) -> bool:
        """Return whether the exported tensor `name` differs from the base's."""
        if name in self._whole or name in self.untied:
            return True
        owner, _, leaf = name.rpartition(".")
        rows = f"{ADAPTED}{owner}.token_adapter.trainable_tokens_delta.default"
        adapted = owner in self._adapters or owner in self._trained_on or rows in self._trained
        return self._built.adapted and (adapted or self._around(owner, leaf) is not None)

    def _saved(self, name: str) -> str:
        """Return the name under which the base model saves the tensor `name`."""
        return self._built.tied.get(name, name)

    def _has_own(self, name: str) -> bool:
        """Return whether the run trained `name` itself, and not only rows of new tokens, which peft trains under all names of a
        tied weight."""
        owner = name.rpartition(".")[0]
        return bool(self._trained_name(name)) or owner in self._adapters or owner in self._trained_on

    def _trained_name(self, name: str) -> str:
        """Return the name under which the run trained the complete tensor `name`; empty if it did not."""
        if not self._built.adapted:
            return name if name in self._trained else ""
        parts = name.split(".")
        for cut in range(1, len(parts)):
            key = ".".join([ADAPTED + ".".join(parts[:cut]), "modules_to_save.default", *parts[cut:]])
            if key in self._trained:
                return key
        return ""

    def _read(self, name: str) -> Tensor:
        if name in self._whole:
            return self._trained[self._whole[name]]
        weight = self._base[self._saved(name)]
        if name in self.untied:
            weight = weight.clone()  # safetensors writes no memory twice
        owner, _, leaf = name.rpartition(".")
        if not self._built.adapted:
            return weight
        if (place := self._around(owner, leaf)) is not None:
            return merged_parameter(self._filled(place), weight)
        if leaf not in ("weight", "bias"):
            return weight
        prefix = f"{ADAPTED}{owner}."
        rows = f"{prefix}token_adapter.trainable_tokens_delta.default"
        if rows in self._trained:
            module = self._built.model.get_submodule(owner)
            index = torch.tensor(module.token_adapter.token_indices["default"])
            return weight.index_copy(0, index, self._trained[rows].to(weight.dtype))
        if leaf == "weight" and owner in self._trained_on:
            weight = self._trained_on[owner](weight)
        if owner not in self._adapters:
            return weight
        layer = self._filled(owner)
        if leaf == "weight":
            return merged(layer, weight)
        return weight if self._merging is None else self._merging.merged_bias(layer, weight)

    def _filled(self, place: str) -> Any:
        """Return the adapted module at `place`, with all tensors of its adapter loaded into memory."""
        layer = self._built.model.get_submodule(place)
        fill(layer, f"{ADAPTED}{place}.", self._adapters[place], self._trained)
        if self._merging is not None:
            self._merging.fill(layer, self._trained)
        return layer

    def _around(self, owner: str, leaf: str) -> str | None:
        """Return the place of the adapter of the parameter `owner.leaf`; None if that parameter has no separate adapter. peft nests
        one wrapper in another if a module has several such parameters."""
        place = owner
        while place in self._adapters:
            layer = self._built.model.get_submodule(place)
            if getattr(layer, "parameter_name", None) == leaf:
                return place
            place = f"{place}.base_layer"
        return None

    def _base_weights(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        labels: tuple[str, ...],
        missing: Mapping[str, torch.Size],
    ) -> Mapping[str, Tensor]:
        if not missing:
            return {}
        if config.model.weights is InitialWeights.random:
            drawn: dict[str, Tensor] = load_model(config, tokenizer, labels, torch.float32).state_dict()
            return drawn
        files = _in_files(config.model, self._built, missing)
        loaded: dict[str, Tensor] = {}
        # Only transformers can load tensors that it joins from several or dequantizes, or an enlarged vocabulary.
        if missing.keys() - files.keys():
            loaded = load_model(config, tokenizer, labels, self._built.dtype).state_dict()
        return _Base(files, loaded)


class _Base(Mapping[str, Tensor]):
    """The weights of the base: read from its files, or if transformers makes them of several tensors, from the loaded model."""

    def __init__(self, files: Mapping[str, Tensor], loaded: Mapping[str, Tensor]):
        self._files, self._loaded = files, loaded

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name] if name in self._files else self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._files), **dict.fromkeys(self._loaded)})

    def __len__(self) -> int:
        return len(self._files.keys() | self._loaded.keys())

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of the tensor in the files; None if the files do not contain it in this form."""
        return self._files.dtype(name) if isinstance(self._files, BaseWeights) and name in self._files else None


def _in_files(config: ModelConfig, built: _Built, shapes: Mapping[str, torch.Size]) -> Mapping[str, Tensor]:
    """Return the tensors with these names and shapes that the base's files contain in the same form: not quantized, for example."""
    try:
        keys = Loading.of(built.model, built.state, BaseFiles(config)).keys
        weights = BaseWeights(config, built.model.base_model_prefix, shapes, keys, partial=True)
    except LookupError:  # no file of a usual name
        return {}
    # Numbers of one byte are codes that have no value without their scales.
    codes = {name for name in weights if built.names[name].is_floating_point() and weights.dtype(name).itemsize == 1}
    unquantized = {name: shape for name, shape in shapes.items() if name not in codes}
    return BaseWeights(config, built.model.base_model_prefix, unquantized, keys, partial=True) if codes else weights


def dropped_sources(config: ModelConfig, model: Any, state: Mapping[str, Tensor]) -> dict[str, Source]:
    """Return the tensors of the base's files that transformers does not load into `model`, by their keys in the files.

    Empty unless the base has the same class as the model: what a classifier drops of a language model is that model's head. Empty
    too if the base is quantized: its scales do not belong to the weights of the export, and its other heads need theirs.
    state: the `state_dict` of `model` without adapters.
    """
    if config.weights is InitialWeights.random:
        return {}
    architecture = load_config(config)
    if type(model).__name__ not in (architecture.architectures or ()) or quantization_of(architecture.to_dict()):
        return {}
    try:
        files = BaseFiles(config)
    except LookupError:
        return {}
    dropped = Loading.of(model, state, files).dropped
    return {key: Source(files.shape(key), files.dtype(key), partial(files.__getitem__, key)) for key in dropped}


PROCESSOR_TEMPLATE = "chat_template.json"
"""The template of a processor in older folders. It would take precedence over the template that the run trained with."""


def copy_processor_files(config: ModelConfig, folder: Path, *, has_template: bool) -> None:
    """Copy the files of the base's processor to `folder`. has_template: the tokenizer has a chat template."""
    base = model_folder(config)
    for name in (*PROCESSOR_FILES, *(() if has_template else (PROCESSOR_TEMPLATE,))):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _untie(model: Any, names: Mapping[str, str], method: str) -> None:
    """Untie `names` in the configuration of `model`, which is on the meta device, so that each is saved as a separate tensor.

    Raises UserError if the architecture ties them whatever the configuration says.
    """
    settings = model.config.get_text_config(decoder=True)
    model.config.tie_word_embeddings = settings.tie_word_embeddings = False
    with torch.device("meta"):
        still = tied_names(type(model)(deepcopy(model.config)))
    if both := sorted(names.keys() & still.keys()):
        tied = f"{both[0]} and {names[both[0]]} are one tensor in {type(model).__name__}"
        reason = f"{tied}, but the adapter changes each of them differently"
        raise UserError(Problem("--merge", reason, "export the adapter, without --merge", method))


def _save_adapter(
    config: RunConfig, built: _Built, trained: Weights, folder: Path, surroundings: Surroundings | None
) -> None:
    """Save the adapter in fp32, since adapters are small and peft computes them in fp32."""
    method = method_of(config.method)
    plain = method.plain_adapter(built.module, trained) if isinstance(method, ShiftsFrozenWeights) else {}
    if method.in_front:  # save the output of the prompt encoder, not the encoder
        tokens = built.module.prompt_tokens
        tokens["default"] = torch.arange(len(tokens["default"]))
        fill(built.module, "", [name for name in trained if name.startswith("prompt_encoder.")], trained)
    settings = built.module.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base_name(config.model), base_revision(config.model)
    if surroundings is not None:
        surroundings.rename_settings(settings, built.module)
    # Set explicitly, since peft would otherwise ask the hub. (Trained rows of added tokens are part of the adapter.)
    built.module.save_pretrained(folder, state_dict=dict(trained), save_embedding_layers=False)
    if plain:  # peft saves only the trained modules, but the finished adapter may be on others too
        replace_tensors(folder / "adapter_model.safetensors", plain)
    if surroundings is not None:
        surroundings.rename_adapter(folder / "adapter_model.safetensors")
    if built.model.can_generate():
        built.model.generation_config.save_pretrained(folder)


def _save_whole(
    model: Any,
    dtype: torch.dtype,
    sources: Mapping[str, Source],
    dropped: Mapping[str, Source],
    folder: Path,
    max_shard_size: int | str,
) -> None:
    """Save a complete model. sources: of the model's tensors, by their names in the model. dropped: of tensors that transformers
    does not load, by their names in the files."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    if getattr(model.config, "dstune_head", None):
        # Plain transformers finds the class by `auto_map`, dstune by `dstune_head`.
        model.config.auto_map = {"AutoModelForSequenceClassification": f"{CLASSIFIER_CODE}.{type(model).__name__}"}
        shutil.copyfile(pooled.__file__, folder / f"{CLASSIFIER_CODE}.py")
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_safetensors(folder, {**_as_stored(model, sources), **dropped}, max_shard_size)


def _as_stored(model: Any, sources: Mapping[str, Source]) -> Mapping[str, Source]:
    """Return `sources` under the names and in the form in which transformers saves this architecture."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty(source.shape, device="meta") for name, source in sources.items()}
    name_of = {id(mark): name for name, mark in marks.items()}
    reverted = revert_weight_conversion(model, dict(marks))
    if all(id(mark) in name_of for mark in reverted.values()):
        return {key: sources[name_of[id(mark)]] for key, mark in reverted.items()}
    # Some architectures (mixtures of experts) are stored in another form than they compute in; converting needs all tensors.
    state = revert_weight_conversion(model, {name: source.read().to(source.dtype) for name, source in sources.items()})
    return {key: Source(tensor.shape, tensor.dtype, partial(state.__getitem__, key)) for key, tensor in state.items()}


def _set_generation(config: ModelConfig, model: Any, stops: list[int], pad_token_id: int | None) -> None:
    """Give the model the generation settings of its base, and add `stops` to the tokens that end an answer."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        generation = GenerationConfig.from_pretrained(
            local_path(config.path), revision=config.revision or "main", local_files_only=True
        )
    except OSError:
        generation = model.generation_config
    if model.config.is_encoder_decoder:
        complete_generation(generation, model.config)
    eos_before = generation.eos_token_id
    ends = sorted(
        {*stops, *(eos_before if isinstance(eos_before, list) else [] if eos_before is None else [eos_before])}
    )
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.pad_token_id = pad_token_id
    model.generation_config, left_out = _valid_settings(generation)
    if left_out:
        log.warning("the export leaves out generation settings that have no effect: %s", ", ".join(left_out))


def _valid_settings(generation: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return `generation` without the settings that transformers refuses to save, and the names of these settings.

    For example, some published models set a temperature but do not sample. Sampling stays off then, so that the export answers like
    its base.
    """
    from transformers import GenerationConfig

    valid, left_out = GenerationConfig(), []
    with suppress(TypeError, ValueError):
        generation.validate(strict=True)
        return generation, []
    # Set first, since they decide which of the other settings are valid.
    modes = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
    settings = {name: value for name, value in vars(generation).items() if not name.startswith("_")}
    for name in sorted(settings, key=lambda name: name not in modes):
        candidate = copy(valid)
        setattr(candidate, name, settings[name])
        try:
            candidate.validate(strict=True)
        except (TypeError, ValueError):
            left_out.append(name)
        else:
            valid = candidate
    return valid, left_out


def base_name(config: ModelConfig) -> str:
    """Return a name under which others can find the base model: the absolute path of a folder, a hub id (also for a folder in the
    hub's cache), or a reference to an environment variable, which `generate` resolves again."""
    if isinstance(config.path, EnvironmentText):
        return config.path.reference
    local = local_path(config.path)
    if (snapshot := _snapshot(Path(local))) is not None:
        return snapshot[0]
    return str(Path(local).resolve()) if Path(local).exists() else local


def base_revision(config: ModelConfig) -> str | None:
    """Return the commit of the base model: `model.revision`, or that of a folder in the hub's cache."""
    if config.revision is not None or isinstance(config.path, EnvironmentText):
        return config.revision
    snapshot = _snapshot(Path(local_path(config.path)))
    return None if snapshot is None else snapshot[1]


def _snapshot(folder: Path) -> tuple[str, str] | None:
    """Return the hub id and the commit of a folder in the hub's cache, whose path differs on other machines; None for other
    folders."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    if not folder.is_dir() or cache not in folder.absolute().parents:
        return None
    parts = folder.absolute().relative_to(cache).parts
    if len(parts) != 3 or not parts[0].startswith("models--") or parts[1] != "snapshots":
        return None
    return parts[0].removeprefix("models--").replace("--", "/", 1), parts[2]
