"""Loads tokenizer and model from a folder, a cached hub snapshot or a packaged sample. Nothing here contacts a hub."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dstune import samples
from dstune.chat_templates import control_tokens, prompt_path, template_path
from dstune.config.architectures import (
    PROCESSOR_SETTINGS,
    VisionFiles,
    encoder_decoder_problem,
    encoder_problem,
    is_encoder,
    mark_encoder_decoder,
    mark_stops,
    mark_vision,
    noisy_encoder_decoder_problem,
    packed_encoder_decoder_problem,
    size_problems,
)
from dstune.config.registered import fetched_path
from dstune.config.requirements import requirement_problem
from dstune.config.rope import extended_rope, not_rotary, rope_problems
from dstune.config.schema import Attention, InitialWeights, ModelConfig, RunConfig, UnreachedParts
from dstune.core.errors import DstuneError, Problem, UserError, files_of_others
from dstune.core.parsing import object_in, read_file
from dstune.core.stored_implementations import without_stored_implementations
from dstune.core.tokenizers import open_tokenizer
from dstune.models.base_weights import tensor_files
from dstune.models.corrections import correct_classes, forget_longest_row
from dstune.models.full_width import put_back_to_full_width, refuse_unread_scales
from dstune.models.mapped import Mapped, take_buffers
from dstune.models.partitioned_loading import corrected_partitioned_loading, import_parts
from dstune.models.pooled import PooledForSequenceClassification
from dstune.models.recompute import checkpointing_options
from dstune.models.tiles import tile_feed_forward
from dstune.models.unreached import freeze_unreached, text_config_of, whole_class
from dstune.protocols import method_of, task_of
from dstune.protocols.method_options import QuantizesWeights, ReplacesHead
from dstune.protocols.task_options import ChangesLoadedModel
from dstune.zero import accelerator
from dstune.zero.parts import all_ranks_hold, full_shape, gathered, keep_parts, partitioning, whole_loading


def local_path(path: str) -> str:
    """Return what transformers can load: the folder of a sample or a registered version, or the path itself (a folder or an id
    in the hub's cache)."""
    return str(samples.resolve(path, fetch=False)) if samples.is_sample(path) else fetched_path(path)


def model_folder(config: ModelConfig) -> Path:
    """Return the folder with the files of a model that is on this machine."""
    path = Path(local_path(config.path))
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    cached_file = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    assert isinstance(cached_file, str), f"{config.path} is not in the hub's cache, though it was loaded"
    return Path(cached_file).parent


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with `model.chat_template` applied, its control tokens added, and a padding token.

    Raises UserError if the files are missing or the template cannot be read.
    """
    with _errors_name_model_path(config):
        tokenizer = open_tokenizer(local_path(config.path), where="model.path", **_local_loading_options(config))
        architecture = _architecture(config)
        if architecture.is_encoder_decoder:
            mark_encoder_decoder(tokenizer)
        mark_stops(tokenizer, _stops(config, architecture))
        if vision := vision_files(config, architecture):
            mark_vision(tokenizer, vision)
    if config.prompt_template:
        tokenizer.chat_template = prompt_path(config.prompt_template).read_text(encoding="utf-8")
    if config.chat_template:
        try:
            tokenizer.chat_template = read_file(template_path(config.chat_template)).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                Problem("model.chat_template", "is not UTF-8", "a Jinja file", config.chat_template)
            ) from None
        except OSError as error:
            raise UserError(
                Problem(
                    "model.chat_template",
                    value=config.chat_template,
                    reason=f"cannot be read: {error.strerror}",
                    fix="give the path of a Jinja file",
                )
            ) from error
    single = {token.content for token in tokenizer.added_tokens_decoder.values()}
    absent = [token for token in _control_tokens(config) if token not in single]
    if absent:
        tokenizer.add_special_tokens({"additional_special_tokens": absent}, replace_extra_special_tokens=False)
    return with_padding(tokenizer)


def vision_files(config: ModelConfig, architecture: PretrainedConfig) -> VisionFiles | None:
    """Return what the image processor needs to turn images into the model's inputs; None for a model without a vision tower."""
    vision = getattr(architecture, "vision_config", None)
    if text_config_of(architecture) is None or vision is None:
        return None
    folder = model_folder(config)
    return VisionFiles(
        local_path(config.path),
        config.revision,
        config.trust_remote_code,
        architecture.model_type,
        "\n".join((folder / name).read_text("utf-8") for name in PROCESSOR_SETTINGS if (folder / name).is_file()),
        getattr(vision, "spatial_merge_size", 1),
    )


def _stops(config: ModelConfig, architecture: PretrainedConfig) -> list[int]:
    """Return the tokens at which `generate` and servers stop by default: from the model's generation settings, or else from its
    architecture."""
    try:
        settings: Any = GenerationConfig.from_pretrained(
            local_path(config.path), revision=config.revision or "main", local_files_only=True
        )
    except OSError:
        settings = architecture.get_text_config(decoder=True)
    ends = getattr(settings, "eos_token_id", None)
    return [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer; if it has no padding token, set one."""
    if tokenizer.pad_token_id is None:
        # Targets are chosen by position, never by comparing with the padding token, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _architecture(config: ModelConfig) -> PretrainedConfig:
    """Read the model's `config.json` as transformers does. Raises UserError if it cannot be read, has sizes of no model, or is of a
    model that cannot be built or trained here."""
    path = local_path(config.path)
    values = object_in(Path(path) / "config.json")
    problems = size_problems(values, value=config.path)
    if (requirement := requirement_problem(values, config.path)) is not None:
        problems.append(requirement)
    if problems:
        raise UserError(problems)
    with files_of_others("model.path", config.path, "its config.json", "give a hub id or a folder with a config.json"):
        return without_stored_implementations(AutoConfig.from_pretrained(path, **_local_loading_options(config)))


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Load the model's architecture with `model.config_overrides` and `model.rope` applied.

    Raises UserError for a value that the architecture does not have.
    """
    with _errors_name_model_path(config):
        architecture = _architecture(config)
    unknown = [key for key in config.config_overrides if not hasattr(architecture, key)]
    if unknown:
        raise UserError(
            Problem(
                f"model.config_overrides.{key}",
                reason=f"{type(architecture).__name__} has no such value",
                fix="see the keys of the model's config.json",
            )
            for key in unknown
        )
    with files_of_others("model.config_overrides", str(config.config_overrides), "the model", "see its config.json"):
        architecture.update(config.config_overrides)
    _extend_positions(architecture, config)
    return architecture


def _extend_positions(architecture: PretrainedConfig, config: ModelConfig) -> None:
    """Apply `model.rope`. Raises UserError if the architecture's rotary embeddings cannot be extended."""
    if config.rope.type is None:
        return
    text = architecture.get_text_config()
    if problems := list(rope_problems(text.to_dict(), config.rope)):
        raise UserError(problems)
    settings, positions = extended_rope(config.rope, text.max_position_embeddings)
    if getattr(text, "head_dim", 0) is None:  # of Mixtral: transformers' formula of yarn multiplies it
        text.head_dim = text.hidden_size // text.num_attention_heads
    text.rope_parameters = {**text.rope_parameters, **settings}
    text.max_position_embeddings = positions


def _refuse_unextended(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raise UserError if no module of `model` computes the positions that `model.rope` asks for: some architectures have its
    settings without rotary embeddings (Zamba 2)."""
    if config.rope.type is None:
        return
    if not any(getattr(module, "rope_type", None) == config.rope.type.value for module in model.modules()):
        raise UserError(not_rotary(str(model.config.get_text_config().model_type), config.rope))


def _control_tokens(config: ModelConfig) -> tuple[str, ...]:
    """Return the tokens that `model.chat_template` prints around turns, as far as they are known, and `model.add_tokens`."""
    return (*control_tokens(config.chat_template), *config.add_tokens)


@dataclass(frozen=True)
class NewWeights:
    """Weights of a model that are not pretrained. They have to be trained, whatever the method freezes."""

    parameters: tuple[str, ...] = ()
    """Names of parameters that are new as a whole: a classification head, a pooler."""
    rows: tuple[int, ...] = ()
    """Rows of the vocabulary: those of added tokens and of the chat template's control tokens.

    Base models have rows for control tokens that no text has trained. Those of Gemma 3 are nearly equal (cosine 0.95), so the
    model cannot tell a frozen end of turn from the other unused tokens: after 12 steps of LoRA no answer ended.
    """


def new_weights(model: PreTrainedModel) -> NewWeights:
    """Return what `load_model` added to the model; without parameters if all weights are new (`model.weights=random`)."""
    weights = getattr(model, "dstune_new_weights", NewWeights())
    assert isinstance(weights, NewWeights)
    return weights


def trained_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...]) -> PretrainedConfig:
    """Return the architecture of a run's model, with the changes that the task and the method make. Raises UserError if they do not
    support an encoder-decoder. See `load_model`."""
    architecture, task = load_config(config.model), task_of(config.task)
    if architecture.is_encoder_decoder:
        if not task.encoder_decoder:
            raise UserError(encoder_decoder_problem(config.model, architecture.model_type))
        if config.data.packing:
            raise UserError(packed_encoder_decoder_problem(architecture.model_type))
        if alpha := config.model.neftune_alpha:
            raise UserError(noisy_encoder_decoder_problem(architecture.model_type, alpha))
        refused = method_of(config.method).encoder_decoder_problem(architecture.model_type)
        if refused is not None:
            raise UserError(refused)
        _complete_decoder(architecture, tokenizer)
    elif task.generates and is_encoder(architecture.to_dict()):
        reason = f"{architecture.model_type} is an encoder, whose positions read the tokens after them"
        raise UserError(encoder_problem(config.model, reason))
    architecture.use_cache = False
    task.architecture(architecture, labels, tokenizer)
    method = method_of(config.method)
    if isinstance(method, ReplacesHead) and (head := method.own_head) is not None:
        architecture.dstune_head = head
    return architecture


def load_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], dtype: torch.dtype
) -> PreTrainedModel:
    """Load the model of a run. Inside `zero.parts.partitioned_loading`, each rank holds only its part of the weights.

    labels: names of the classes, empty for language models. New weights (a classification head, random initial weights)
    depend only on `trainer.seed` and their name, so they are the same at every ZeRO stage and number of ranks.
    """
    architecture, task = trained_config(config, tokenizer, labels), task_of(config.task)
    model_class = task.model_class(architecture)
    if config.model.unreached_parts is UnreachedParts.frozen:
        model_class = whole_class(model_class, architecture)
    if partitioning():
        import_parts(architecture)
    correct_classes(architecture)
    put_back_to_full_width(architecture, pretrained=config.model.weights is InitialWeights.pretrained)
    options = {"attn_implementation": _attention(config), "dtype": dtype}
    with _errors_name_model_path(config.model):
        if config.model.weights is InitialWeights.random:
            model = _new_model(model_class, architecture, config.model.trust_remote_code, options)
            new = [name for name, _ in model.named_parameters()]
        else:
            model, loading = _pretrained(config, model_class, architecture, options)
            refuse_unread_scales(model, loading["unexpected_keys"], config.model.path)
            _refuse_erased_padding(config, model)
            mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
            new = sorted({*loading["missing_keys"], *mismatched})
    _refuse_unextended(model, config.model)
    forget_longest_row(model)
    if isinstance(task, ChangesLoadedModel):
        new = task.after_load(model, new)
    freeze_unreached(model, config.model)
    if isinstance(method := method_of(config.method), QuantizesWeights):
        method.after_load(model)
    if architecture.is_encoder_decoder:
        complete_generation(model.generation_config, architecture)
    _check_new_weights(config, model, new)
    initialize_weights(model, new, config.trainer.seed)
    pretrained_rows = _add_token_embeddings(config, model, tokenizer)
    parameters = () if config.model.weights is InitialWeights.random else tuple(new)
    control = tokenizer.convert_tokens_to_ids(list(_control_tokens(config.model)))
    trained_rows = sorted({*range(pretrained_rows, len(tokenizer)), *control})
    model.dstune_new_weights = NewWeights(parameters, tuple(trained_rows))
    if config.trainer.mlp_tiles > 1:
        tile_feed_forward(model, config.trainer.mlp_tiles)
    if config.trainer.activation_checkpointing:
        # transformers 6 has only the first name, early 5.x only the second.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(checkpointing_options(config.trainer.activation_checkpointing))
    return model


def _pretrained(
    config: RunConfig, model_class: Any, architecture: PretrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the pretrained model and transformers' loading information.

    At stage 3 transformers would let rank 0 read all files and send every weight twice. If the files allow it, each rank reads
    its part from the files instead, and never holds any other weights (`benchmarks/loading.py`).
    """

    method = method_of(config.method)
    method_options = method.load_options(config, options["dtype"]) if isinstance(method, QuantizesWeights) else {}

    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
            local_path(config.model.path),
            config=architecture,
            use_safetensors=True,
            output_loading_info=True,
            # A classifier may be tuned to a different number of labels; then its head is new.
            ignore_mismatched_sizes=task_of(config.task).has_head,
            **options,
            **method_options,
            **_local_loading_options(config.model),
        )
        return loaded

    if not partitioning() or method_options:
        return load(**options)
    mapped = Mapped.of(config.model, architecture)
    if not all_ranks_hold(None if mapped is None else mapped.contents):
        with corrected_partitioned_loading():
            return load(**options)
    assert mapped is not None
    with whole_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.trainer.seed)  # weights that the files lack are drawn the same on all ranks
        # In the files' own type: a conversion would create all weights in memory.
        model, loading = load(**options | {"dtype": mapped.dtype})
        if mapped.dtype is not options["dtype"]:
            take_buffers(model, options["dtype"])
    keep_parts(model)
    return model, loading


def _refuse_erased_padding(config: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError if loading erases an embedding row of the padding token that training needs.

    transformers may set this row to zero although the files hold other values (Youtu in transformers 5.24). If the vocabulary
    projection shares the weight, training changes the row, and loading an export would erase it again: its logits would differ
    from those in training. A row that is not shared stays zero both in training and after loading, which does no harm.
    """
    embedding: Any = _input_embeddings(config.model, model)
    index, weight = getattr(embedding, "padding_idx", None), embedding.weight
    if index is None or weight.device.type == "meta" or not weight.is_floating_point():
        return
    projection = model.get_output_embeddings()
    if projection is None or projection.weight is not weight or method_of(config.method).adapter:
        return
    with gathered([weight]):
        is_erased = weight.ndim == 2 and not weight[index].any()
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), "")
    folder = model_folder(config.model)
    try:
        file = tensor_files(folder).get(name) if is_erased else None
    except LookupError:  # the files are not safetensors
        return
    if file is None:
        return
    with safe_open(folder / file, framework="pt") as stream:
        if stream.get_slice(name)[index].any():
            reason = (
                f"transformers sets the embedding of its padding token to zero when it loads a {type(model).__name__}, "
                "which projects to logits by the same weights"
            )
            fix = "method=lora, another model, or a transformers that keeps it"
            raise UserError(Problem("model.path", reason, fix, config.model.path))


def _input_embeddings(config: ModelConfig, model: PreTrainedModel) -> Any:
    """Return the input embeddings of a model. Raises UserError if the model has no table of them."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None  # for example Canine, which hashes characters
    if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        reason = f"{type(model).__name__} has no table of token embeddings, which tokens are added to and counted by"
        raise UserError(Problem("model.path", reason, "another model (`dstune models`)", config.path))
    return embedding


def _add_token_embeddings(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add embeddings for the tokens that `tokenizer` has and `model` lacks; return how many embeddings the model had.

    Raises UserError if the model's embeddings cannot grow.
    """
    embedding = _input_embeddings(config.model, model)
    rows = full_shape(embedding.weight)[0]
    if len(tokenizer) <= rows:
        return rows
    if not isinstance(embedding, nn.Embedding):
        reason = f"the tokenizer has {len(tokenizer)} tokens, the {type(embedding).__name__} of {type(model).__name__} has {rows}"
        raise UserError(Problem("model.path", f"{reason} and cannot grow", "another model", config.model.path))
    # New rows are drawn around the mean of the old ones; otherwise the logit of a new token dwarfs all others.
    on_meta = model.device.type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.trainer.seed)  # the same rows on all ranks
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not on_meta)
    return rows


def initialize_weights(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Give the named parameters the model's own initial distribution, seeded by (seed, module name)."""
    chosen_names = set(names)
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        owned = [p for name, p in module.named_parameters(recurse=False) if prefix + name in chosen_names]
        if not owned:
            continue
        with gathered(owned, modified_by_rank=0), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed * 2**32 + crc32(module_name.encode()))
            _reset(_owner(model, module_name), module, owned)


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the innermost transformers model that contains the module `name`. As in transformers, that model initializes the
    module, since it has the right configuration: that of the complete Qwen 3.5 MoE lacks a key that its text model's has."""
    owner = module = model
    for part in filter(None, name.split(".")):
        module = getattr(module, part)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


def _reset(model: PreTrainedModel, module: nn.Module, owned: list[nn.Parameter]) -> None:
    """Initialize the weights `owned` of `module`, always on the CPU, since a GPU's generator draws other numbers."""
    in_place = [parameter.data for parameter in owned]
    for parameter in owned:
        if parameter.device.type != "cpu":
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
        parameter.data.zero_() if parameter.dim() == 1 else parameter.data.normal_(0.0, 0.02)
        # transformers marks parameters that it has initialized, and skips them.
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model._init_weights(module)
    for parameter, data in zip(owned, in_place, strict=True):
        if data.device.type != "cpu":
            data.copy_(parameter.data)
            parameter.data = data


def _new_model(model_class: Any, architecture: PretrainedConfig, trust: bool, options: dict[str, Any]) -> Any:
    if model_class is PooledForSequenceClassification:
        return model_class._from_config(architecture, **options)
    return model_class.from_config(architecture, trust_remote_code=trust, **options)


_DECODER_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


def _complete_decoder(architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the start, end and padding tokens of a decoder if the architecture has none, as after joining two encoders."""
    first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    for key, token in zip(_DECODER_TOKENS, (first, last, tokenizer.pad_token_id), strict=True):
        if getattr(architecture, key, None) is None:
            setattr(architecture, key, token)


def complete_generation(generation: GenerationConfig, architecture: PretrainedConfig) -> None:
    """Copy an encoder-decoder's start, end and padding tokens from its architecture into generation settings that lack them."""
    for key in _DECODER_TOKENS:
        if getattr(generation, key, None) is None:
            setattr(generation, key, getattr(architecture, key, None))


def _attention(config: RunConfig) -> str | None:
    """Return the attention to request from transformers. None means sdpa if the architecture has it, else its own (BLOOM, Mamba).

    Raises UserError for flash attention if it is not installed or there is no GPU.
    """
    requested = config.model.attention
    if requested is Attention.auto:  # rows of language models get a kernel later (`packed_attention`)
        return None
    installed = importlib.util.find_spec("flash_attn") is not None
    if requested is Attention.flash_attention_2 and not (installed and accelerator.present()):
        reason = "the package flash-attn is not installed here" if accelerator.present() else "this machine has no GPU"
        fix = "model.attention=auto, which takes the best kernel that is available"
        raise UserError(Problem("model.attention", reason, fix, requested.value))
    return requested.value


def _local_loading_options(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments for every `from_pretrained` of this model, which never use the network."""
    revision = {} if config.revision is None else {"revision": config.revision}
    return {"trust_remote_code": config.trust_remote_code, "local_files_only": True, **revision}


def _check_new_weights(config: RunConfig, model: PreTrainedModel, new: list[str]) -> None:
    """Raise UserError if the pretrained weights lack more than the task's head and a pooler."""
    if config.model.weights is InitialWeights.random:
        return
    body = f"{model.base_model_prefix}."
    absent = [name for name in new if name.startswith(body) and ".pooler." not in name]
    if not task_of(config.task).has_head:
        absent = new
    if absent:
        raise UserError(
            Problem(
                "model.path",
                value=config.model.path,
                reason=f"has no weights for {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}"
                f" of {type(model).__name__}, which task={config.task.name} needs",
                fix="choose a model of that kind, another task, or model.weights=random",
            )
        )


class _errors_name_model_path:
    """Turns transformers' errors about missing or unsuitable files into a UserError that names `model.path`. Errors of collectives
    pass unchanged: the loss of a rank is not the fault of the files, and the run can be started again."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        kinds = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
        if error is not None and (isinstance(error, kinds) or _of_a_library(error)) and not _of_a_collective(error):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                Problem(
                    "model.path",
                    value=self.config.path,
                    reason=f"cannot be loaded: {' '.join(lines[:2])}",
                    fix="give a hub id or a folder with config.json, tokenizer files and safetensors weights",
                )
            ) from error


def _modules_raised_in(error: BaseException) -> list[str]:
    """Return the modules whose code was running when `error` was raised, outermost first."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _of_a_collective(error: BaseException) -> bool:
    """Return whether `error` was raised inside a collective of ranks."""
    return any(name.startswith("torch.distributed.") for name in _modules_raised_in(error))


def _of_a_library(error: BaseException) -> bool:
    """Return whether code outside dstune raised `error`. Malformed files make libraries raise errors of any type."""
    return (
        isinstance(error, Exception)
        and not isinstance(error, DstuneError)
        and not _modules_raised_in(error)[-1].startswith("dstune")
    )
