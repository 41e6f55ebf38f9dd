"""Writes a complete model as one GGUF file for llama.cpp and its users, with tokenizer, chat template and end of turn.

The `gguf` package maps the names of tensors; `gguf_families` has what differs between architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint.gguf_families import CONVOLUTION, EXPERT, FAMILIES, check_architecture, metadata_of, text_name
from dstune.core.stored_implementations import without_stored_implementations

if TYPE_CHECKING:
    import numpy as np

ROUTER = "ffn_gate_inp.weight"
"""End of the names of routers, which are f32 in every file: a rounded router chooses other experts."""

BLOCK = 32
"""In all types with fewer than 16 bits, this many neighbouring elements of a row share a scale."""


@dataclass
class Stored:
    """A tensor of a GGUF file."""

    name: str
    parts: list[str]
    """Its tensors in transformers: itself, or the same matrix of each expert in turn."""
    shape: list[int]
    kind: str


def write_gguf(folder: Path, file: Path, kind: str, name: str) -> None:
    """Write the complete model in `folder`, which is in Hugging Face's format, to `file`.

    kind: type of the matrices, one of `NUMPY_TYPES`; a matrix whose row length is not a multiple of 32 is f16 instead. Vectors are
    f32. name: of the model, in the metadata. Needs memory for the largest tensor twice. Raises UserError if GGUF does not support
    the architecture or the tokenizer.
    """
    import gguf
    import numpy as np
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    from dstune.models.base_weights import tensor_files

    whole = without_stored_implementations(AutoConfig.from_pretrained(folder))
    check_architecture(whole)
    config = whole.get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_name(name)
    for key, value in metadata_of(config).items():
        getattr(writer, f"add_{key}")(value)
    _add_tokenizer(writer, tokenizer, config.vocab_size, family.vocabulary)
    writer.add_file_type(file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    places = tensor_files(folder)
    opened = {place: safe_open(folder / place, framework="pt") for place in set(places.values())}
    shapes = {tensor: opened[place].get_slice(tensor).get_shape() for tensor, place in places.items()}
    plan = stored_tensors(config, shapes, kind)
    for stored in plan:
        size = _bytes(gguf, stored.shape, stored.kind)
        kind_number = gguf.GGMLQuantizationType[stored.kind]
        writer.add_tensor_info(stored.name, stored.shape, _plain_type(stored.kind), size, kind_number)
    factors = family.rope_factors(config)
    for tensor, values in factors.items():
        writer.add_tensor_info(tensor, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored in plan:
        arrays = (
            family.arranged(opened[places[part]].get_tensor(part).float().numpy(), part, config)
            for part in stored.parts
        )
        encoded = [gguf.quantize(array, gguf.GGMLQuantizationType[stored.kind]) for array in arrays]
        writer.write_tensor_data(encoded[0] if len(encoded) == 1 else np.stack(encoded))
    for values in factors.values():
        writer.write_tensor_data(values)
    writer.close()


def stored_tensors(config: Any, shapes: dict[str, list[int]], kind: str) -> list[Stored]:
    """Return the tensors of the GGUF file of a model, without those of parts for images.

    config: of the text part. shapes: of the model's tensors in transformers, by name.
    """
    import gguf

    architecture = FAMILIES[config.model_type].architecture
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    parts: dict[str, list[str]] = {}
    for tensor in shapes:
        if name := text_name(tensor):
            parts.setdefault(EXPERT.sub("", name), []).append(tensor)
    tensors = []
    for tensor, of_experts in parts.items():
        name = names.get_name(
            tensor.replace(".dt_bias", ".dt_proj.bias").replace(".layer_scalar", ".layer_scalar.weight"),
            try_suffixes=(".weight", ".bias"),
        )
        assert name is not None, f"the gguf package has no name for {tensor}"
        shape = list(shapes[of_experts[0]])
        if tensor.endswith(CONVOLUTION):
            shape = [shape[0], shape[2]]
        if EXPERT.search(of_experts[0]):
            of_experts.sort(key=_expert)
            shape = [len(of_experts), *shape]
        is_exact = name.endswith(ROUTER) or tensor.endswith(CONVOLUTION)
        tensors.append(Stored(name, of_experts, shape, "F32" if is_exact else _type_of(shape, kind)))
    return tensors


def _expert(tensor: str) -> int:
    match = EXPERT.search(tensor)
    assert match is not None
    return int(match[1])


def read_weights(file: Path, config: Any, names: dict[str, list[int]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a model from its GGUF file, dequantized, float32.

    config: of the text part. names: names and shapes of the model's tensors in transformers; those for images are left out.
    """
    import gguf

    family = FAMILIES[config.model_type]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for stored in stored_tensors(config, names, "f32"):
        tensor = tensors[stored.name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(stored.shape)
        each = values if len(stored.parts) > 1 else values[None]
        for part, weight in zip(stored.parts, each, strict=True):
            yield part, family.restored(weight, part, config)


def file_type(kind: str) -> int:
    """Return llama.cpp's number for files whose matrices are mostly of the type `kind`."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])


def _type_of(shape: list[int], kind: str) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if kind.startswith("q") and shape[-1] % BLOCK else kind.upper()


def _plain_type(stored: str) -> Any:
    import numpy as np

    return np.dtype(np.float16 if stored == "F16" else np.float32)


def _bytes(gguf: Any, shape: list[int], stored: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
    return int(math.prod(shape) // block * size)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int, kind: str) -> None:
    from dstune.checkpoint.gguf_vocabulary import read_vocabulary
    from dstune.data.named_templates import joined
    from dstune.data.stopping import stop_token_ids

    vocabulary = read_vocabulary(tokenizer, size, kind)
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.pre:
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
