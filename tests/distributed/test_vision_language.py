"""Rows of text on vision-language checkpoints, on two real ranks: what is trained, what is exported, and who can load that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dstune.checkpoint import export, store
from dstune.checkpoint.shards import Weights
from tests.support.tiny_vl import MTP, PROCESSOR_FILES, VOCABULARY
from tests.support.vl_shelf import CASES, Shelf, filled_shelf

LORA = [name for name in CASES if "-lora-" in name]
ADAPTERS = [*LORA, "gemma3-ia3-2", "gemma3-oft-2", "gemma3-vera-2", "gemma3-dora-3", "gemma3-tokens-3"]
OLD = [name for name in CASES if "-old-" in name]
WHOLE = [name for name in CASES if name not in (*ADAPTERS, *OLD)]

TOWER = re.compile(r"vision_tower|visual|multi_modal_projector|embed_vision")
"""Names of parts that text does not reach, in the names of their tensors."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return filled_shelf(tmp_path_factory.mktemp("vision"))


def load_whole(folder: Path) -> Any:
    """As anyone would load it; nothing may be missing."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def load_adapter(folder: Path, base: Path) -> Any:
    import peft
    from transformers import AutoTokenizer

    body, rows = load_whole(base), len(AutoTokenizer.from_pretrained(folder))
    if rows > body.get_input_embeddings().num_embeddings:
        body.resize_token_embeddings(rows, mean_resizing=False)
    return peft.PeftModel.from_pretrained(body, folder).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(9, 73).view(2, 32) % (VOCABULARY - 8)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def trained_names(shelf: Shelf, name: str) -> set[str]:
    return Weights(store.newest(shelf.run(name))).parameters


def untouched(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.dtype == after.dtype and torch.equal(before, after)


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WHOLE, *ADAPTERS])
def test_the_optimizer_and_adapters_have_nothing_of_the_tower(shelf: Shelf, name: str) -> None:
    names = trained_names(shelf, name)
    assert names and not [one for one in names if TOWER.search(one)]


@pytest.mark.parametrize("name", WHOLE)
def test_the_tower_keeps_every_bit_and_the_language_model_learns(shelf: Shelf, name: str) -> None:
    before, after = dict(load_whole(shelf.model(name)).named_parameters()), shelf.whole(name)
    assert before.keys() == after.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and not [key for key in changed if TOWER.search(key)]


@pytest.mark.parametrize("name", [*WHOLE, *ADAPTERS])
def test_the_start_names_what_stays_frozen(shelf: Shelf, name: str) -> None:
    model = json.loads((shelf.run(name) / "environment.json").read_text())["model"]
    base = load_whole(shelf.model(name))
    expected = {key: parameter.numel() for key, parameter in base.named_parameters() if TOWER.search(key)}
    assert sum(model["unreached"].values()) == sum(expected.values())
    assert all(any(key.startswith(f"{part}.") for part in model["unreached"]) for key in expected)


def test_every_stage_trains_the_same(shelf: Shelf) -> None:
    first, *others = [shelf.whole(f"gemma3-full-{stage}") for stage in range(4)]
    for other in others:
        assert all(torch.allclose(other[name], weight, atol=1e-5) for name, weight in first.items())


def test_a_run_of_an_earlier_version_keeps_its_groups(shelf: Shelf) -> None:
    assert [name for name in trained_names(shelf, "gemma3-old-2") if TOWER.search(name)]
    for name in ("qwen3_5-old-2", "qwen3_5-old-full-1"):
        assert not [key for key in trained_names(shelf, name) if "language_model" in key]
    for name in OLD:
        assert "unreached" not in json.loads((shelf.run(name) / "environment.json").read_text())["model"]


# -- what is exported --------------------------------------------------------------------------------------------------


def merged(shelf: Shelf, name: str, out: Path) -> Path:
    return export.export_checkpoint(shelf.run(name), store.newest(shelf.run(name)), out / "merged", merge=True)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_export_has_every_tensor_of_its_base(shelf: Shelf, name: str) -> None:
    base, exported = tensors(shelf.model(name)), tensors(shelf.run(name) / "export")
    assert exported.keys() == base.keys()
    names = trained_names(shelf, name)
    for key, before in base.items():
        if TOWER.search(key) or key in MTP:
            assert untouched(before, exported[key]), key
    assert sum(not untouched(base[key], exported[key]) for key in base) <= len(names)
    model = load_whole(shelf.run(name) / "export")
    found, whole = dict(model.named_parameters()), shelf.whole(name)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", [*LORA, "gemma3-ia3-2", "gemma3-dora-3", "gemma3-oft-2", "gemma3-vera-2"])
def test_a_merged_export_has_every_tensor_of_its_base(shelf: Shelf, name: str, tmp_path: Path) -> None:
    folder = merged(shelf, name, tmp_path)
    base, exported = tensors(shelf.model(name)), tensors(folder)
    assert exported.keys() == base.keys()
    for key, before in base.items():
        if TOWER.search(key) or key in MTP or "norm" in key or "embed" in key:
            assert untouched(before, exported[key]), key
    assert any(not untouched(base[key], exported[key]) for key in base)
    unmerged = load_adapter(shelf.run(name) / "export", shelf.model(name))
    torch.testing.assert_close(logits(load_whole(folder)), logits(unmerged), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_on_the_class_that_the_base_names(shelf: Shelf, name: str) -> None:
    folder, whole = shelf.run(name) / "export", shelf.whole(name)
    exported = load_adapter(folder, shelf.model(name))
    found = dict(exported.named_parameters())
    trained = trained_names(shelf, name)
    assert trained <= found.keys()
    assert all(torch.equal(found[key], whole[key]) for key in trained)
    with exported.disable_adapter():
        plain = logits(exported)
    assert not torch.equal(logits(exported), plain), "the adapter has no effect"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert not settings.get("exclude_modules")
    assert not [key for key in settings["target_modules"] if TOWER.search(key)]


SERVED = {
    "gemma3": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "mistral3": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "gemma4": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "qwen3_5": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "qwen3_vl": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
}
"""How vLLM 0.32 renames what follows `base_model.model.` in the keys of an adapter (`hf_to_vllm_mapper` of the class that serves
the architecture). Its language model is `language_model`, with `model` and `lm_head`; under any other name a tensor is ignored."""


@pytest.mark.parametrize("name", LORA)
def test_vllm_finds_a_module_for_every_key(shelf: Shelf, name: str) -> None:
    modules = {key for key, _ in load_whole(shelf.model(name)).model.language_model.named_modules()}
    for key in load_file(shelf.run(name) / "export" / "adapter_model.safetensors"):
        inside = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        assert inside, key
        served = inside[1]
        for before, after in SERVED[CASES[name][0]]:
            if served.startswith(before):
                served = after + served.removeprefix(before)
                break
        assert served.removeprefix("language_model.model.") in modules and served.startswith("language_model.model.")


@pytest.mark.parametrize("name", [*WHOLE, *ADAPTERS])
def test_an_export_has_the_files_of_the_processor(shelf: Shelf, name: str) -> None:
    folder = shelf.run(name) / "export"
    for file, content in PROCESSOR_FILES.items():
        assert json.loads((folder / file).read_text()) == content
    present = {file.name for file in folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= present


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_export_names_the_class_of_its_base(shelf: Shelf, name: str) -> None:
    base, own = (
        json.loads((folder / "config.json").read_text()) for folder in (shelf.model(name), shelf.run(name) / "export")
    )
    assert own["architectures"] == base["architectures"]
    assert own["model_type"] == base["model_type"]
    assert own["vision_config"] | {"dtype": None} == base["vision_config"] | {"dtype": None}
    assert own["text_config"].get("mtp_num_hidden_layers") == base["text_config"].get("mtp_num_hidden_layers")


@pytest.mark.parametrize("name", ["qwen3_5-old-2", "qwen3_5-old-full-1"])
def test_a_run_that_trained_the_language_model_alone_is_exported_as_the_whole(
    shelf: Shelf, name: str, tmp_path: Path
) -> None:
    """As runs of earlier versions did."""
    out, whole = shelf.run(name) / "export", shelf.whole(name)
    place = {key: key.replace("model.layers.", "model.language_model.layers.", 1) for key in trained_names(shelf, name)}
    if "full" in name:
        model, folder = load_whole(out), out
        found = {key.replace("model.language_model.", "model."): value for key, value in model.named_parameters()}
        assert all(torch.equal(found[key], whole[key]) for key in place)
    else:
        model, folder = load_adapter(out, shelf.model(name)), merged(shelf, name, tmp_path)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[after], whole[before]) for before, after in place.items())
        torch.testing.assert_close(logits(load_whole(folder)), logits(model), rtol=0, atol=1e-4)
    assert not torch.equal(logits(model), logits(load_whole(shelf.model(name))))
    base, exported = tensors(shelf.model(name)), tensors(folder)
    assert exported.keys() == base.keys()
    assert all(untouched(base[key], exported[key]) for key in base if TOWER.search(key) or key in MTP)
    assert any(not untouched(base[key], exported[key]) for key in base)
