"""Opens the two models that are compared: a complete model, a base with its adapter, or a GGUF file, each at full precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstune.checkpoint.gguf_header import metadata_digests
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError, files_of_others
from dstune.core.parsing import object_in
from dstune.core.stored_implementations import without_stored_implementations
from dstune.core.tokenizers import open_tokenizer
from dstune.data.named_templates import joined
from dstune.inference.resolve_model import adapter_settings, base_of, check_adapter, with_local_files
from dstune.models.base_weights import tensor_files
from dstune.models.corrections import correct_classes
from dstune.models.full_width import put_back_to_full_width, refuse_unread_scales
from dstune.models.load import load_config, model_folder
from dstune.models.peft_load import load_peft_adapter

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
"""Precision by the name that safetensors has for it."""
BITS_OF_GGUF = {
    0: "float32",
    1: "float16",
    30: "bfloat16",
    8: "8 bits",
    6: "5 bits",
    7: "5 bits",
    2: "4 bits",
    3: "4 bits",
}
"""Precision by the number of a type of GGUF; K types are looked up by their first digits."""
BITS_OF_K = {10: "2 bits", 11: "3 bits", 12: "4 bits", 13: "5 bits", 14: "6 bits"}


@dataclass
class Side:
    """A model that is compared."""

    name: str
    """As the user wrote it."""
    folder: Path
    """The folder with its tokenizer: an adapter's, if it has one."""
    tokenizer: Any
    module: Any
    """The complete model in fp32, adapters merged."""
    precision: str
    """Of the stored weights: `float32`, `bfloat16`, `float16`, `fp8`, `8 bits`, `4 bits`, ..."""
    base: str = ""
    """Of an adapter: its base model."""
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    """Of an adapter: the base's values of the weights that it changes."""
    missing: tuple[str, ...] = ()
    """Names of weights that its files lack."""
    misshapen: tuple[str, ...] = ()
    """Names of weights whose shape is not that of its configuration."""
    unread: tuple[str, ...] = ()
    """Names of tensors in its files that the model has no place for."""
    gguf: Path | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    @property
    def template(self) -> str:
        template = self.tokenizer.chat_template
        return joined(template) if isinstance(template, dict) else template or ""

    def stored(self, name: str) -> Tensor | None:
        """Return a tensor as its files hold it, whatever the configuration says; None if they do not hold it."""
        if self.gguf is not None:
            return None
        try:
            file = tensor_files(self.folder).get(name)
        except LookupError:
            return None
        if file is None:
            return None
        with safe_open(self.folder / file, framework="pt") as opened:
            return opened.get_tensor(name).float()


def open_side(name: str, path: Path, model: ModelConfig, where: str) -> Side:
    """Open a model. path: a folder or a `.gguf` file; may be absent for a hub id, which `model` names. where: the word of
    the command line that named it. Raises UserError."""
    gguf = _gguf_file(path, where)
    if gguf is not None:
        return _open_gguf(name, gguf, where)
    if (path / "adapter_config.json").is_file():
        return _open_adapter(name, path, model, where)
    local = with_local_files(model)
    folder = model_folder(local)
    module, loading = _load(local, folder, where)
    return Side(
        name,
        folder,
        _tokenizer(folder, model, where),
        module,
        stored_precision(folder),
        missing=tuple(sorted(loading["missing_keys"])),
        misshapen=tuple(sorted(key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"])),
        unread=tuple(sorted(loading["unexpected_keys"])),
    )


def _gguf_file(path: Path, where: str) -> Path | None:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(Problem(where, "is a file other than GGUF", "give the folder of a model", str(path)))
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or list(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(Problem(where, "holds several GGUF files", f"name one of them: {files[0]}", str(path)))
    return files[0]


def _open_gguf(name: str, file: Path, where: str) -> Side:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from dstune.checkpoint.gguf_header import matrix_types

    fix = (
        "a model of a family that transformers reads from GGUF (Llama, Qwen, Gemma, ...), or the folder it was made of"
    )
    with files_of_others(where, str(file), "the GGUF file", fix):
        metadata_digests(file)  # refuses counts that would never end
        types = matrix_types(file)
        architecture = without_stored_implementations(
            AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        )
        module, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=architecture,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
        tokenizer = open_tokenizer(file.parent, where=where, gguf_file=file.name, local_files_only=True)
    widths = [BITS_OF_GGUF.get(kind) or BITS_OF_K.get(kind, "2 bits") for kind in types]
    coarsest = min(widths, key=_coarseness, default="float32")
    missing = tuple(sorted(loading["missing_keys"]))
    return Side(name, file.parent, tokenizer, module.eval(), coarsest, missing=missing, gguf=file)


def _coarseness(precision: str) -> int:
    order = ("2 bits", "3 bits", "4 bits", "5 bits", "6 bits", "fp8", "8 bits", "bfloat16", "float16", "float32")
    return order.index(precision)


def coarser(first: str, second: str) -> str:
    """Return the precision of the two that holds fewer digits."""
    return min(first, second, key=_coarseness)


def _open_adapter(name: str, folder: Path, model: ModelConfig, where: str) -> Side:
    base = base_of(folder, model)
    settings = adapter_settings(folder)
    local = with_local_files(base)
    module, loading = _load(local, model_folder(local), where)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    check_adapter(folder, module, where)
    fix = "give the folder of an adapter that fits the base in its adapter_config.json"
    with files_of_others(where, str(folder), "the adapter", fix):
        adapted = load_peft_adapter(module, folder)
        if not hasattr(adapted, "merge_and_unload") or settings.get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING"):
            raise UserError(
                Problem(where, "is an adapter that cannot be merged", "serve it beside its base", str(folder))
            )
        merged = adapted.merge_and_unload()
    after = merged.state_dict()
    changed = {key: value for key, value in before.items() if key in after and not torch.equal(value, after[key])}
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Side(
        name,
        folder if has_tokenizer else model_folder(local),
        _tokenizer(folder if has_tokenizer else model_folder(local), base, where),
        merged.eval(),
        stored_precision(model_folder(local)),
        base=str(base.path),
        base_weights=changed,
        missing=tuple(sorted(loading["missing_keys"])),
    )


def _load(model: ModelConfig, folder: Path, where: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    architecture = without_stored_implementations(load_config(model))
    if architecture.is_encoder_decoder or not any(type(architecture) is key for key in _causal_classes()):
        reason = f"{architecture.model_type} is no language model that writes text from left to right"
        raise UserError(Problem(where, reason, "dstune evaluate RUN measures other models on rows", model.path))
    correct_classes(architecture)
    put_back_to_full_width(architecture, pretrained=True)
    fix = "give a model with config.json, tokenizer files and safetensors weights; pickled weights are not read"
    with files_of_others(where, model.path, "the model", fix):
        module, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=architecture,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
        )
    refuse_unread_scales(module, loading["unexpected_keys"], model.path)
    return module.eval(), loading


def _causal_classes() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping


def _tokenizer(folder: Path, model: ModelConfig, where: str) -> Any:
    return open_tokenizer(folder, where=where, trust_remote_code=model.trust_remote_code, local_files_only=True)


def stored_precision(folder: Path) -> str:
    """Return the coarsest precision of the matrices in `folder`."""
    quantization = object_in(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict) and quantization:
        text = str(quantization)
        if "float8" in text or quantization.get("quant_method") in ("fp8", "fbgemm_fp8") or "'type': 'float'" in text:
            return "fp8"
        if quantization.get("load_in_8bit") or quantization.get("bits") == 8 or "'num_bits': 8" in text:
            return "8 bits"
        return "4 bits"
    precisions = set()
    try:
        files = set(tensor_files(folder).values())
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    if len(part.get_shape()) > 1:
                        precisions.add(PLAIN.get(part.get_dtype(), "float32"))
    except (LookupError, OSError, SafetensorError):
        return "float32"
    return min(precisions, key=_coarseness, default="float32")
