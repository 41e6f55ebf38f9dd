"""The parsers of model folders, adapters and references, as `fuzz.py` calls them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fuzz_common import configuration
from benchmarks.fuzz_inputs import MODULES


def model_folder(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import task_of_head
    from dstune.config.architectures import row_limit
    from dstune.config.schema import ModelConfig
    from dstune.launch.preflight import description_problems
    from dstune.planning.architecture import architecture
    from dstune.planning.source import config_json

    (folder / "config.json").write_bytes(content)
    description_problems(folder, ModelConfig(path=str(folder)), configuration())
    task_of_head(folder)
    values = config_json(ModelConfig(path=str(folder)))
    row_limit(values)
    architecture(values)


def opened_model(files: dict[str, bytes], folder: Path) -> None:
    """Open tokenizer and architecture as transformers reads them."""
    from dstune.config.schema import ModelConfig
    from dstune.core.errors import DstuneError
    from dstune.models.load import load_config, load_tokenizer

    for name, content in files.items():
        (folder / name).write_bytes(content)
    for read in (load_config, load_tokenizer):
        try:
            tokenizer = read(ModelConfig(path=str(folder)))
        except DstuneError:
            continue
        if read is load_tokenizer:
            tokenizer(["a b <s>", "abc " * 20], return_offsets_mapping=True)


def adapter(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.serving import vllm_problems
    from dstune.core.confinement.here import check_patterns
    from dstune.inference.resolve_model import adapter_settings, base_of
    from dstune.methods.lora.config import LoraConfig
    from dstune.protocols import method_of

    (folder / "adapter_config.json").write_bytes(content)
    settings = adapter_settings(folder)
    check_patterns(settings, MODULES, "method.adapter")
    vllm_problems(folder)
    try:
        method_of(LoraConfig(adapter=str(folder))).resolve()
    finally:
        base_of(folder, configuration().model)


def record(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import recorded_overrides

    (folder / "dstune.json").write_bytes(content)
    recorded_overrides(folder, [])


def weights(content: bytes, folder: Path) -> None:
    """Read the header of a safetensors file, and the index of several."""
    from dstune.core.errors import DstuneError
    from dstune.methods._peft.files import tensors_of
    from dstune.models.base_weights import tensor_files

    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(content)
    for read in (lambda: tensors_of(folder, "method.adapter"), lambda: tensor_files(folder)):
        try:
            read()
        except (DstuneError, LookupError):
            continue


def reference(content: bytes, folder: Path) -> None:
    """Read the reference of an export, and ask an engine that answers."""
    import asyncio
    from types import SimpleNamespace

    from dstune.serve import parity

    async def prompt_ids(name: str, row: Any) -> list[int]:
        return [1, 2]

    async def logprobs(name: str, prompt: list[int], targets: list[int]) -> list[float]:
        return [-0.5 for _ in targets]

    async def answers(rows: list[Any]) -> dict[str, Any]:
        return {"ids": [[1, 2] for _ in rows], "answers": [{"vector": [0.5]} for _ in rows]}

    (folder / "reference.json").write_bytes(content)
    engine: Any = SimpleNamespace(
        dtype="float32", unseen_settings="", prompt_ids=prompt_ids, logprobs=logprobs, answers=answers
    )
    for generates in (True, False):
        source: Any = SimpleNamespace(folder=folder, reference=None, generates=generates, adapter=False)
        try:
            asyncio.run(parity.prove(engine, "m", source, None))
        except parity.Refused:
            continue


def served_adapter(files: dict[str, bytes], folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from dstune.serve import adapters, source

    base, adapter = folder / "base", folder / "own"
    base.mkdir(), adapter.mkdir()
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    for name, content in files.items():
        (adapter / name).write_bytes(content)
    adapters.check(source.resolve("m", str(adapter)), source.resolve("b", str(base)), one_template=True)


@cache
def safetensors_bytes() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a.lora_A.weight": np.zeros((2, 3), np.float32)}, {"format": "pt"})
