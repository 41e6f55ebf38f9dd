"""What a served folder has to hold beside the language model, and under which names an adapter's tensors are loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dstune.checkpoint.contents import KEY, describe_contents, missing_contents
from dstune.core.errors import UserError
from dstune.serve import adapters
from dstune.serve.engines.base import Limits
from dstune.serve.parity import prove
from tests.serve.test_parity import AnswersAsGiven
from tests.support.serving import stub_source, write_reference
from tests.support.tiny_vl import save


def write(folder: Path, config: Mapping[str, Any], names: list[str], *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(4, 4) for name in names}, folder / "model.safetensors")
    for name in files:
        (folder / name).write_text("{}")
    return folder


WHOLE = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {"model_type": "qwen3_5_text"},
    "vision_config": {"model_type": "qwen3_5_vision"},
}
TEXT = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
LAYER = "model.language_model.layers.0.mlp.up_proj.weight"
ALL = [LAYER, "model.visual.patch_embed.proj.weight", "mtp.fc.weight"]
PROCESSOR = ("processor_config.json", "preprocessor_config.json")


def test_an_export_is_held_against_what_was_exported(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", WHOLE, ALL, *PROCESSOR)
    record = {KEY: describe_contents(folder)}
    assert missing_contents(folder, record, None) == ""
    (folder / PROCESSOR[0]).unlink()
    assert PROCESSOR[0] in missing_contents(folder, record, None)
    write(folder, WHOLE, ALL[:2], *PROCESSOR)
    assert missing_contents(folder, record, None) != ""


def test_other_folders_are_judged_by_what_they_are(tmp_path: Path) -> None:
    assert missing_contents(write(tmp_path / "whole", WHOLE, ALL, *PROCESSOR), {}, None) == ""
    assert missing_contents(write(tmp_path / "no-processor", WHOLE, ALL), {}, None) != ""
    assert missing_contents(write(tmp_path / "no-tower", WHOLE, [LAYER], *PROCESSOR), {}, None) != ""
    assert missing_contents(write(tmp_path / "text", TEXT, ["model.layers.0.mlp.up_proj.weight"]), {}, None) == ""


def test_a_folder_is_held_against_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base", WHOLE, ALL, *PROCESSOR)
    inside = [LAYER.replace("model.language_model.", "language_model.model."), *ALL[1:]]
    for name, config, names, whole in (
        ("same", WHOLE, ALL, True),
        ("exchanged", WHOLE, inside, True),
        ("no-mtp", WHOLE, ALL[:2], False),
        ("text", TEXT, ["model.layers.0.mlp.up_proj.weight"], False),
        ("classifier", WHOLE | {"architectures": ["Other"]}, ALL[:2], True),
    ):
        folder = write(tmp_path / name, config, names, *PROCESSOR)
        assert (missing_contents(folder, {}, base) == "") is whole, name
    quantized = WHOLE | {"quantization_config": {"quant_method": "fp8"}}
    scaled = write(tmp_path / "scaled", quantized, [*ALL, f"{LAYER}_scale_inv"], *PROCESSOR)
    assert missing_contents(tmp_path / "same", {}, scaled) == ""  # its weights were dequantized
    bare = write(tmp_path / "bare", {"architectures": ["GPT2LMHeadModel"]}, ["h.0.attn.weight", "wte.weight"])
    prefixed = ["transformer.h.0.attn.weight", "transformer.wte.weight"]
    assert (
        missing_contents(write(tmp_path / "prefixed", {"architectures": ["GPT2LMHeadModel"]}, prefixed), {}, bare) == ""
    )


@pytest.mark.parametrize("whole", [True, False])
def test_an_export_that_lacks_something_is_never_proven(tmp_path: Path, whole: bool) -> None:
    folder = write(tmp_path, WHOLE, ALL, *PROCESSOR)
    record = {KEY: describe_contents(folder)}
    (folder / "dstune.json").write_text(json.dumps(record))
    row = {"messages": [], "prompt_ids": [1, 2], "target_ids": [3], "logprobs": [-1.0]}
    if not whole:
        write(folder, WHOLE, ALL[:2], *PROCESSOR)
    write_reference(folder, [row])
    engine = AnswersAsGiven(stub_source("m", folder=folder), "m", folder, folder, Limits(), found={"m": [-1.0]})
    engine.dtype = "float32"
    found = asyncio.run(prove(engine, "m", stub_source("m", folder=folder), None))
    assert found.status == ("proven" if whole else "unproven")


def write_adapter(folder: Path, module: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    factors = {"A": torch.zeros(2, 32), "B": torch.zeros(64, 2)}
    tensors = {f"base_model.model.{module}.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "mistral3"])
def test_only_names_of_the_whole_model_are_loaded(tmp_path: Path, kind: str) -> None:
    base = stub_source("base", folder=save(kind, tmp_path / "base"))
    for module, loaded in (
        ("model.language_model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", False),
        ("model.language_model.layers.7.mlp.up_proj", False),
    ):
        folder = write_adapter(tmp_path / module.replace(".", "-"), module)
        source = stub_source("m", folder=folder, adapter=True, base=str(tmp_path / "base"))
        if loaded:
            adapters.check(source, base, one_template=False)
        else:
            with pytest.raises(UserError):
                adapters.check(source, base, one_template=False)
