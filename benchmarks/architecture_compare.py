"""A run of dstune beside a plain loop: each sample alone in a forward pass, nothing packed, padded, masked or partitioned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from architecture_cases import Case, model_class_of

from dstune_verify import reference

LOSS, UPDATE, LOGITS = 1e-5, 2e-4, 2e-4
"""Largest relative differences of what counts as equal: in losses (ten times that in gradient norms), in the change of all weights,
and in logits of the export that is loaded again. What is equal differs by rounding in fp32: docs/architectures.md says how much."""


def compare(case: Case, config: Any, folder: Path, run_dir: Path) -> dict[str, Any]:
    """Train plainly what the run in `run_dir` trained from the checkpoint in `folder`; returns how far the two are apart."""
    import torch

    torch.set_grad_enabled(True)
    plain, start, losses, norms = train_plainly(case, config, folder, run_dir / "start")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    result: dict[str, Any] = {
        "loss": max(relative(row["loss"], loss) for row, loss in zip(rows, losses, strict=True)),
        "norm": max(relative(row["grad_norm"], norm) for row, norm in zip(rows, norms, strict=True)),
    }
    exported = load_export(case, folder, run_dir / "export")
    trained = dict(exported.named_parameters())
    missing = sorted(name for name in trained_parameters(plain) if name not in trained)
    both = {name: weight.detach().double() for name, weight in trained_parameters(plain).items() if name not in missing}
    expected = {name: weight - start[name].double() for name, weight in both.items()}
    measured = {name: trained[name].detach().double() - start[name].double() for name in both}
    worst, worst_name = reference.worst_tensor({name: measured[name] - expected[name] for name in both}, expected)
    result |= {"update": reference.distance(measured, expected), "worst": worst, "worst_tensor": worst_name}
    result |= {
        "moved": reference.norm(expected),
        "missing": missing,
        "trained": sum(map(torch.numel, trained_parameters(plain).values())),
    }
    result["logits"] = logits_apart(case, config, plain, exported)
    if result["logits"] > LOGITS and result["update"] <= UPDATE and not missing:
        # Some random models make much of a rounding of their weights (Gemma 3n: 1e-3 of 2e-5): the plain one gets the export's.
        with torch.no_grad():
            for name, parameter in trained_parameters(plain).items():
                parameter.copy_(trained[name])
        result["logits"] = logits_apart(case, config, plain, exported)
    result["class"] = type(exported if case.method == "full" else exported.get_base_model()).__name__
    if case.method == "lora":
        result["checkpoint_names"] = share_named_as_base(folder, run_dir / "export")
    bad = [
        key
        for key, limit in (("loss", LOSS), ("norm", 10 * LOSS), ("update", UPDATE), ("logits", LOGITS))
        if not result[key] <= limit
    ]
    if missing:
        bad.append("missing")
    result["status"] = "wrong" if bad else "equal"
    if bad:
        result["reason"] = ", ".join(f"{key} {result[key]}" for key in bad)
    return result


def trained_parameters(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative(measured: float, expected: float) -> float:
    return abs(measured - expected) / max(abs(expected), 1e-12) if math.isfinite(measured) else math.inf


def load_plain(case: Case, folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return model_class_of(case, config).from_pretrained(folder, dtype="float32")


def load_export(case: Case, folder: Path, export: Path) -> Any:
    import peft

    if case.method == "full":
        return load_plain(case, export)
    return peft.PeftModel.from_pretrained(load_plain(case, folder), export, is_trainable=True)


def samples_of(config: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the samples of each step."""
    from dstune.core.paths import cache_root
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import load_tokenizer
    from dstune.trainer.data_loader import order_of

    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "plain"), cache_root())
    order = order_of(config, data.train)
    for step in range(2):
        global_batch = order.global_batch(*order.locate(step))
        yield [
            data.train.sample(index) for part in global_batch.micro_batches if not part.filler for index in part.samples
        ]


def loss_of(case: Case, model: Any, sample: dict[str, Any]) -> tuple[Any, int]:
    import torch
    import torch.nn.functional as functional

    ids = torch.as_tensor(sample["input_ids"]).long()[None]
    if case.group == "classification":
        label = torch.as_tensor(sample["label"] if "label" in sample else sample["labels"]).long().reshape(1)
        return functional.cross_entropy(model(input_ids=ids).logits.float(), label, reduction="sum"), 1
    has_decoder = "target_ids" in sample  # some that transformers lists beside encoder-decoders have a single stack
    labels = torch.as_tensor(sample["target_ids" if has_decoder else "labels"]).long()[None]
    if has_decoder:
        logits = model(input_ids=ids, labels=labels, use_cache=False).logits.float()
        return functional.cross_entropy(logits[0], labels[0], reduction="sum"), labels.numel()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    expected = labels[0, 1:]
    loss = functional.cross_entropy(logits[0, :-1], expected, ignore_index=-100, reduction="sum")
    return loss, int((expected != -100).sum())


def train_plainly(
    case: Case, config: Any, folder: Path, adapter: Path
) -> tuple[Any, dict[str, Any], list[float], list[float]]:
    """Train two steps of SGD, each sample alone; return the model, its weights at the start, losses and gradient norms."""
    import peft
    import torch

    model = load_plain(case, folder)
    if case.method == "lora":
        settings = peft.LoraConfig.from_pretrained(adapter)
        settings.inference_mode = False
        model = peft.get_peft_model(model, settings)
        missing = set(trained_parameters(model)) ^ set(begin := torch.load(adapter / "start.pt"))
        if missing:
            raise RuntimeError(f"{sorted(missing)[:3]} are trained in one of the two models alone")
        model.load_state_dict(begin, strict=False)
    model.train()
    start = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    losses, norms = [], []
    for samples in samples_of(config):
        parts = [loss_of(case, model, sample) for sample in samples]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        model.zero_grad()
        loss.backward()
        chosen = [parameter for parameter in model.parameters() if parameter.grad is not None]
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in chosen])))
        with torch.no_grad():
            for parameter in chosen:
                parameter -= config.optimizer.lr * parameter.grad
    return model, start, losses, norms


def logits_apart(case: Case, config: Any, plain: Any, exported: Any) -> float:
    import torch

    sample = next(iter(samples_of(config)))[0]
    ids = torch.as_tensor(sample["input_ids"]).long()[None]
    options: dict[str, Any] = (
        {"labels": torch.as_tensor(sample["target_ids"]).long()[None]} if "target_ids" in sample else {}
    )
    if case.group != "classification":
        options["use_cache"] = False
    with torch.no_grad():
        plain_logits, exported_logits = (
            model.eval()(input_ids=ids, **options).logits.float() for model in (plain, exported)
        )
    return float((plain_logits - exported_logits).abs().max() / plain_logits.abs().max())


def share_named_as_base(folder: Path, export: Path) -> float:
    """Return the share of the adapter's modules whose names are those of weights in the base's files, as servers need them."""
    from safetensors.torch import load_file

    adapter = load_file(export / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter if ".lora_" in key}
    weights = {key.removesuffix(".weight") for key in load_file(folder / "model.safetensors")}
    return sum(name in weights for name in adapted) / max(1, len(adapted))
