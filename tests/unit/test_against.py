"""`dstune evaluate MODEL --against EXPECTED`: broken models are named by what is wrong with them, right ones pass."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstune.core.errors import UserError
from dstune.evaluation.command import main
from tests.support.gguf_models import MODELS, save_model

LORA = ["q_proj", "v_proj", "down_proj"]


def load(folder: Path, **options: Any):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit(folder: Path, file: str, **values: Any) -> Path:
    """Write values into a JSON file of a model; None removes a key."""
    path = folder / file
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Save a trained-looking adapter of `base`."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(load(base), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if ".modules_to_save." in name:
            weight.data += torch.randn_like(weight) * 0.1
    adapted.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / file, folder)
    return folder


def merged(base: Path, adapter: Path, folder: Path, *, onto: Any = None, scale: float = 1.0, dtype: Any = None) -> Path:
    """Merge as peft does. onto: changes the base first; scale: of the adapter's change."""
    import peft

    model = load(base)
    if onto is not None:
        onto(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    complete = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        for name, value in complete.state_dict().items():
            if scale != 1.0 and name in before:
                value.copy_(before[name] + scale * (value - before[name]))
    complete.to(dtype or torch.float32).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (base / file).is_file():
            shutil.copy(base / file, folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("against")
    for name in MODELS:
        save_model(root / name, name)
    save_model(root / "begins", "llama", begins=True)
    save_adapter(root / "llama", root / "adapter")
    return root


def compare(capsys, model: Path, expected: Path, *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([str(model), "--against", str(expected), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def four_bits(model: Any) -> None:
    from bitsandbytes import functional

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            codes, state = functional.quantize_4bit(module.weight.data.contiguous(), quant_type="nf4", blocksize=64)
            module.weight.data = functional.dequantize_4bit(codes, state).float()


def eight_bits(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            scale = module.weight.data.abs().amax(-1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale


def another(model: Any) -> None:
    torch.manual_seed(7)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.05


def keep_half_of_the_base(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    for name in weights:
        if ".layers.1." in name:
            weights[name] = base[name]


def swap(weights: dict[str, torch.Tensor], first: str, second: str) -> None:
    for name in list(weights):
        if first in name:
            other = name.replace(first, second)
            weights[name], weights[other] = weights[other], weights[name]


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def with_bos_twice(folder: Path) -> Path:
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    return folder


def break_model(name: str, root: Path, folder: Path) -> tuple[Path, Path]:
    """Write a broken model; return it and what it should be."""
    llama, adapter = root / "llama", root / "adapter"
    copy = lambda source="llama": copied(root / source, folder)  # noqa: E731
    merges: dict[str, Callable[[], Any]] = {
        "wrong_base": lambda: merged(llama, adapter, folder, onto=another),
        "merge_quantized": lambda: merged(llama, adapter, folder, onto=four_bits),
        "merge_quantized 8 bits": lambda: merged(llama, adapter, folder, onto=eight_bits),
        "adapter_not_merged": lambda: copy(),
        "adapter_not_merged bf16": lambda: merged(llama, adapter, folder, scale=0.0, dtype=torch.bfloat16),
        "adapter_scale": lambda: merged(llama, adapter, folder, scale=2.0),
        "adapter_partly_merged": lambda: edit_weights(
            merged(llama, adapter, folder), lambda w: keep_half_of_the_base(w, load_file(llama / "model.safetensors"))
        ),
        "weights another adapter": lambda: merged(llama, save_adapter(llama, folder.parent / "other", seed=5), folder),
    }
    if name in merges:
        merges[name]()
        return folder, adapter
    if name == "wrong_base adapter":  # the same adapter, whose configuration names another base
        base = copied(llama, folder.parent / "base")
        model = load(base)
        another(model)
        model.save_pretrained(base)
        return edit(copied(adapter, folder), "adapter_config.json", base_model_name_or_path=str(base)), adapter
    files: dict[str, Callable[[], Any]] = {
        "head_missing": lambda: edit_weights(copy(), lambda w: w.pop("lm_head.weight")),
        "head_retied": lambda: edit(
            edit_weights(copy(), lambda w: w.pop("lm_head.weight")), "config.json", tie_word_embeddings=True
        ),
        "head_retied flag": lambda: edit(copy(), "config.json", tie_word_embeddings=True),
        "template": lambda: (copy() / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        "template missing": lambda: (copy() / "chat_template.jinja").unlink(),
        "bos_twice": lambda: with_bos_twice(copy("begins")),
        "end_token": lambda: edit(copy(), "tokenizer_config.json", eos_token="<|endoftext|>"),
        "stop_tokens": lambda: edit(copy(), "generation_config.json", eos_token_id=0),
        "generation": lambda: edit(copy(), "generation_config.json", do_sample=True, temperature=0.1),
        "rope": lambda: edit(copy(), "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        "architecture": lambda: edit(copy(), "config.json", rms_norm_eps=0.1),
        "layer_missing": lambda: edit(
            edit_weights(copy(), lambda w: drop_first_layer(w)), "config.json", num_hidden_layers=1, layer_types=None
        ),
        "layers_moved": lambda: edit_weights(copy(), lambda w: swap(w, ".layers.0.", ".layers.1.")),
        "layers_unread": lambda: edit(copy(), "config.json", num_hidden_layers=1, layer_types=None),
        "transposed": lambda: edit_weights(copy(), lambda w: w.update({Q: w[Q].T})),
        "transposed shape": lambda: edit_weights(copy(), lambda w: w.update({K: w[K].T})),
        "overflow": lambda: edit_weights(copy(), lambda w: w[Q].view(-1)[:3].fill_(float("inf"))),
        "embedding_resized": lambda: resize(copy(), 320),
        "embedding_resized file": lambda: edit_weights(
            copy(), lambda w: w.update({EMBEDDING: torch.cat([w[EMBEDDING], torch.zeros(20, 64)])})
        ),
        "vocabulary_shifted": lambda: edit_weights(copy(), lambda w: w.update({EMBEDDING: w[EMBEDDING].roll(1, 0)})),
        "special_tokens_missing": lambda: without_token(copy(), "<|im_start|>"),
        "weights_missing": lambda: edit_weights(copy(), lambda w: w.pop(Q)),
        "weights": lambda: edit_weights(copy(), lambda w: w.update({Q: w[Q] * 1.5})),
    }
    files[name]()
    return folder, root / ("begins" if name == "bos_twice" else "llama")


def drop_first_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".layers.1.", ".layers.0.")] = weights.pop(name)


def resize(folder: Path, rows: int) -> Path:
    model = load(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    return folder


def without_token(folder: Path, token: str) -> Path:
    """Remove a special token from the tokenizer, which then splits it into characters."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
    content["model"]["vocab"].pop(token)
    path.write_text(json.dumps(content))
    return folder


BROKEN = (
    *("wrong_base", "merge_quantized", "merge_quantized 8 bits", "adapter_not_merged", "adapter_not_merged bf16"),
    *("adapter_scale", "adapter_partly_merged", "weights another adapter", "wrong_base adapter"),
    *("head_missing", "head_retied", "head_retied flag", "template", "template missing", "bos_twice", "end_token"),
    *("stop_tokens", "generation", "rope", "architecture", "layer_missing", "layers_moved", "layers_unread"),
    *("transposed", "transposed shape", "overflow", "embedding_resized", "embedding_resized file"),
    *("vocabulary_shifted", "special_tokens_missing", "weights_missing", "weights"),
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_named(name, root, tmp_path, capsys):
    model, expected = break_model(name, root, tmp_path / "model")
    code, comparison = compare(capsys, model, expected)
    assert code == 1 and not comparison["same"]
    kinds = [difference["kind"] for difference in comparison["differences"]]
    assert name.split()[0] in kinds
    assert len(set(kinds)) == 1, comparison["differences"]  # one mistake, one name
    assert all(difference["fix"] for difference in comparison["differences"])


def write_right(name: str, root: Path, folder: Path) -> tuple[Path, Path]:
    """Write a model that is right; return it and what it should be."""
    kind, _, family = name.partition(" ")
    family = family or "llama"
    base = root / family
    if kind == "copy":
        return copied(base, folder), base
    if kind in ("bf16", "fp16", "sharded"):
        copied(base, folder)
        (folder / "model.safetensors").unlink()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
        load(base).to(dtype).save_pretrained(folder, **({"max_shard_size": "40KB"} if kind == "sharded" else {}))
        assert kind != "sharded" or len(list(folder.glob("*.safetensors"))) > 1
        return folder, base
    if kind.startswith("gguf"):
        from dstune.checkpoint.gguf_file import write_gguf

        folder.mkdir()
        write_gguf(base, folder / "model.gguf", kind.partition(":")[2], "model")
        return folder / "model.gguf", base
    if kind == "fp8":
        from transformers import AutoConfig, AutoModelForCausalLM

        from dstune.checkpoint.fp8 import write_fp8

        folder.mkdir()
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        write_fp8(base, folder, empty)
        return folder, base
    options = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "saved": {"modules_to_save": ["lm_head"]}}
    adapter = save_adapter(base, folder.parent / "adapter", **options.get(kind, {}))
    if kind == "adapter":
        return adapter, merged(base, adapter, folder)
    return merged(base, adapter, folder, dtype=torch.bfloat16 if kind == "merged-bf16" else None), adapter


RIGHT = (
    *(f"copy {family}" for family in MODELS),
    *("bf16 llama", "bf16 qwen3", "fp16 mistral", "sharded llama", "sharded qwen2"),
    *("gguf:f32 llama", "gguf:f16 qwen2", "gguf:bf16 mistral", "gguf:q8_0 qwen3", "gguf:q4_0 llama-tied"),
    *("fp8 llama", "fp8 qwen3"),
    *("lora llama", "lora qwen2", "dora llama", "rslora mistral", "saved llama", "merged-bf16 qwen3", "adapter llama"),
)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_passes(name, root, tmp_path, capsys):
    model, expected = write_right(name, root, tmp_path / "model")
    code, comparison = compare(capsys, model, expected)
    assert (code, comparison["differences"]) == (0, [])
    assert comparison["rows"] >= 6
    assert comparison["difference"] <= comparison["bound"] or "gguf:q4" in name  # what four bits cost a random model


def test_two_servers_and_settings_are_refused():
    for arguments, where in (
        (["http://localhost:1/v1", "--against", "http://localhost:2/v1"], "--against"),
        (["model", "--against", "other", "data.train=rows.jsonl"], "--against"),
        (["model", "--against", "other", "--shots", "2"], "--shots"),
        (["model", "--prompts", "rows.jsonl"], "--prompts"),
    ):
        with pytest.raises(UserError) as refused:
            main(arguments)
        assert refused.value.problems[0].where == where and refused.value.problems[0].fix


def test_the_names_of_differences_are_on_the_page():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "export.md").read_text(encoding="utf-8")
    folder = root / "dstune" / "evaluation" / "against"
    source = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    kinds = set(re.findall(r'Difference\(\s*"(\w+)"', source)) | set(re.findall(r'kind = "(\w+)"', source))
    assert len(kinds) > 20
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in page] == []
