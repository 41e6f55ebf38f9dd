"""Checks, from its files alone, whether vLLM can serve a folder. vLLM need not be installed.

The checks follow vLLM's loader as of 0.11: for models `architectures`, safetensors and their index; for adapters `PEFTHelper`
(rank, DoRA, bias, modules_to_save) and the names of their tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dstune.checkpoint.answer_files import base_folder
from dstune.core.parsing import object_in
from dstune.core.weight_index import INDEX, check_indexes

MAX_RANK = 512
"""The largest value that `--max-lora-rank` takes (its default is 16)."""
STACKED_CLASSES = frozenset({"GptOssForCausalLM"})
"""Classes of bases for which vLLM (as of 0.12) reads adapters of stacked experts under peft's names (`is_3d_moe_weight`), in the
orientation in which peft saves them."""
ADAPTER_ENDINGS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def vllm_problems(folder: Path) -> list[str]:
    """Return the reasons why vLLM would not serve the model or adapter in `folder`; empty if there are none."""
    adapter = object_in(folder / "adapter_config.json")
    problems = _adapter_problems(folder, adapter) if adapter else _model_problems(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        problems.append("there is no tokenizer")
    return problems


def _model_problems(folder: Path) -> list[str]:
    config, problems = object_in(folder / "config.json"), []
    if not config.get("architectures") or not config.get("model_type"):
        problems.append("config.json names no architecture")
    check_indexes(folder, "MODEL", str(folder))
    index = object_in(folder / INDEX)
    files = set(index.get("weight_map", {}).values()) if index else {"model.safetensors"}
    problems += [f"{name} is missing" for name in sorted(files) if not (folder / name).is_file()]
    if "ForCausalLM" in str(config.get("architectures")):
        if object_in(folder / "generation_config.json").get("eos_token_id") is None:
            problems.append("generation_config.json names no end of an answer")
        if not _has_template(folder):
            problems.append(
                "there is no chat template, so only completions are served (--chat-template FILE gives one)"
            )
    return problems


def _adapter_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"adapters of the type {config.get('peft_type')} are not served")
    if not isinstance(config.get("r"), int) or not 1 <= config["r"] <= MAX_RANK:
        problems.append(f"the rank {config.get('r')} is not between 1 and {MAX_RANK}")
    if isinstance(config.get("modules_to_save"), list) and config["modules_to_save"]:
        problems.append(f"modules trained as a whole are not served: {', '.join(map(str, config['modules_to_save']))}")
    if stacked := config.get("target_parameters"):
        problems += _stacked_problems(config, stacked)
    problems += _pattern_problems(config)
    if config.get("use_dora"):
        problems.append("DoRA is not served")
    if config.get("bias", "none") != "none":
        problems.append("trained biases are not served")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return [*problems, "adapter_model.safetensors is missing"]
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as opened:
        other = [name for name in opened.keys() if not name.endswith(ADAPTER_ENDINGS)]  # noqa: SIM118
    if other and not config.get("modules_to_save"):
        problems.append(f"{len(other)} tensors are no low-rank matrices, first {other[0]}")
    return problems


def _stacked_problems(config: dict[str, Any], stacked: Any) -> list[str]:
    """Return why vLLM would not serve an adapter of stacked experts, by the base's `config.json`."""
    base = base_folder(str(config.get("base_model_name_or_path")), config.get("revision"))
    classes = object_in(base / "config.json").get("architectures") if base else None
    if not isinstance(classes, list) or not STACKED_CLASSES & set(map(str, classes)):
        return ["adapters of stacked experts are not served"]
    endings = {str(name).rpartition(".")[2] for name in stacked} if isinstance(stacked, list) else set()
    if endings != {"gate_up_proj", "down_proj"}:
        return ["adapters of stacked experts are served for gate_up_proj and down_proj together only"]
    return []


def _pattern_problems(config: dict[str, Any]) -> list[str]:
    """Return the problem with per-module ranks and alphas, if any: vLLM scales every matrix by the adapter's common alpha and
    rank."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    root = 0.5 if config.get("use_rslora") else 1.0
    try:
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
        scales = [alphas.get(name, alpha) / ranks.get(name, rank) ** root for name in {*ranks, *alphas}]
        other = any(abs(scale - alpha / rank**root) > 1e-6 * abs(scale) for scale in scales)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):  # a malformed adapter
        return []
    return ["rank_pattern and alpha_pattern scale matrices differently, which vLLM ignores"] if other else []


def _has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or bool(
        object_in(folder / "tokenizer_config.json").get("chat_template")
    )
