"""Writes a complete model as one GGUF file for llama.cpp and its users, with tokenizer, chat template and end of turn.

The `gguf` package maps the names of tensors. This module makes the two changes that llama.cpp expects: rows of the query and key
projections of Llama and Mistral are in the order of Meta's rotary embedding, and Gemma's norms have 1 added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""Supported model types of transformers, and llama.cpp's names for them."""

BLOCK = 32
"""In all types with fewer than 16 bits, this many neighbouring elements of a row share a scale."""


def check_architecture(config: Any) -> None:
    """Raise UserError if a model with this configuration cannot be written as GGUF."""
    name = config.model_type
    if name not in ARCHITECTURES:
        fix = f"GGUF is written for {', '.join(ARCHITECTURES)}; others export without --gguf"
        raise UserError(Problem("--gguf", "this architecture is not written as GGUF", fix, name))
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        reason = f"rotary embeddings of the type {kind} are not written as GGUF"
        raise UserError(Problem("--gguf", reason, "export without --gguf", name))
    if ARCHITECTURES[name] == "llama" and getattr(config, "attention_bias", False):
        raise UserError(
            Problem("--gguf", "attention with biases is not written as GGUF", "export without --gguf", name)
        )


def write_gguf(folder: Path, file: Path, kind: str, name: str) -> None:
    """Write the complete model in `folder`, which is in Hugging Face's format, to `file`.

    kind: type of the matrices, one of `NUMPY_TYPES`; a matrix whose row length is not a multiple of 32 is f16 instead. Vectors are
    f32. name: of the model, in the metadata. Needs memory for the largest tensor twice. Raises UserError if GGUF does not support
    the architecture or the tokenizer.
    """
    import gguf
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    from dstune.models.base_weights import tensor_files

    config = AutoConfig.from_pretrained(folder)
    check_architecture(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.add_file_type(file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    opened = {place: safe_open(folder / place, framework="pt") for place in set(tensor_files(folder).values())}
    plan: list[tuple[str, str]] = []
    for tensor, place in tensor_files(folder).items():
        mapped = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, f"the gguf package has no name for {tensor}"
        shape = opened[place].get_slice(tensor).get_shape()
        stored = _stored(shape, kind)
        size = _bytes(gguf, shape, stored)
        writer.add_tensor_info(mapped, shape, _plain_type(stored), size, gguf.GGMLQuantizationType[stored])
        plan.append((tensor, stored))
    rope_factors = _rope_factors(config)
    if rope_factors is not None:
        writer.add_tensor_info("rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    places = tensor_files(folder)
    for tensor, stored in plan:
        array = _arranged(opened[places[tensor]].get_tensor(tensor).float().numpy(), tensor, config)
        writer.write_tensor_data(gguf.quantize(array, gguf.GGMLQuantizationType[stored]))
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    writer.close()


def file_type(kind: str) -> int:
    """Return llama.cpp's number for files whose matrices are mostly of the type `kind`."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])


def _stored(shape: list[int], kind: str) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if kind.startswith("q") and shape[-1] % BLOCK else kind.upper()


def _plain_type(stored: str) -> Any:
    import numpy as np

    return np.dtype(np.float16 if stored == "F16" else np.float32)


def _bytes(gguf: Any, shape: list[int], stored: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
    return int(math.prod(shape) // block * size)


def _arranged(weight: np.ndarray, name: str, config: Any) -> np.ndarray:
    """Return `weight` changed to what llama.cpp expects."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    if ARCHITECTURES[config.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        # The two halves of a head's rows become neighbours: [heads, 2, half, columns] -> [heads, half, 2, columns].
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _rope(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; if kinds of layers differ, those of layers with full attention."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def _rope_factors(config: Any) -> np.ndarray | None:
    """Return the divisors of the rotary embedding's frequencies in Llama 3, float32 [head size / 2]; None for other models."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, _head_size(config), 2, dtype=torch.float32) / _head_size(config)
    factors: np.ndarray = (_rope(config)["rope_theta"] ** -exponents / scaled).numpy()
    return factors


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    from dstune.checkpoint.gguf_vocabulary import read_vocabulary
    from dstune.data.named_templates import joined
    from dstune.data.stopping import stop_token_ids

    vocabulary = read_vocabulary(tokenizer, size)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for which, index in _special(tokenizer):
        getattr(writer, f"add_{which}_token_id")(index)
    other_ends = [index for index in stop_token_ids(tokenizer) if index != tokenizer.eos_token_id]
    if other_ends:
        writer.add_eot_token_id(other_ends[0])  # the token that ends a turn, if another one ends the text
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if template := tokenizer.chat_template:
        writer.add_chat_template(template if isinstance(template, str) else joined(template))


def _special(tokenizer: Any) -> Iterator[tuple[str, int]]:
    for which in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{which}_token_id")
        if index is not None:
            yield which, index
