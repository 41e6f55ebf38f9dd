"""Program of the matrix, on every rank: each case trains, saves, resumes, exports and is loaded again.

Prints one JSON line per case. A case is a run directory with its run.yaml; METHODS has the methods.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.ranks import end_with, start_rank

from dstune.checkpoint import store
from dstune.checkpoint.export import export_checkpoint
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.evaluation.ranks import evaluate
from dstune.generation.answers import generation_inputs
from dstune.methods.features.classifier import FeatureClassifier
from dstune.methods.features.config import FeaturesConfig
from dstune.methods.importance import scores as importance
from dstune.protocols import method_of
from dstune.rank import worker
from dstune.zero.engine import Engine
from dstune.zero.parts import gathered

TOKENS = torch.arange(9, 73).view(2, 32)
FEATURES = torch.linspace(-2, 2, 64).view(2, 32).sin()
"""What a classifier on cached features reads in their place."""


class Recorded:
    """What the engines of the run that goes on had: whole weights when built and at each save, logits at each save."""

    engines: list[Engine] = []  # noqa: RUF012
    first: dict[str, torch.Tensor]
    first_logits: torch.Tensor
    saves: dict[str, dict[str, Any]]


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    with gathered(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def logits_of(engine: Engine) -> torch.Tensor:
    engine.train(False)
    with torch.no_grad():
        if isinstance(engine.module, FeatureClassifier):
            logits = engine.forward(features=FEATURES).logits
        else:
            logits = engine.forward(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    engine.train(True)
    return logits


def record(world: World) -> None:
    """Let the engine tell what it holds."""
    build, save, close = Engine.__init__, Engine.save, Engine.close

    def recorded_build(engine: Engine, *arguments: Any, **options: Any) -> None:
        build(engine, *arguments, **options)
        Recorded.engines.append(engine)
        Recorded.first, Recorded.saves = whole(engine), {}
        Recorded.first_logits = logits_of(engine)

    def recorded_save(engine: Engine, directory: Path, tag: str, **options: Any) -> Any:
        saved = save(engine, directory, tag, **options)
        logits = logits_of(engine)
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        Recorded.saves[tag.removesuffix(".incomplete")] = {"whole": whole(engine), "logits": logits, "trained": trained}
        return saved

    def recorded_close(engine: Engine) -> None:
        Recorded.engines.remove(engine)
        close(engine)

    Engine.__init__ = recorded_build  # type: ignore[method-assign]
    Engine.save = recorded_save  # type: ignore[method-assign]
    Engine.close = recorded_close  # type: ignore[method-assign]


def train(run_dir: Path, world: World) -> dict[str, Any]:
    """The records of a run; its last save among them."""
    worker.train(config_of(run_dir), run_dir, world)
    found = {"first": Recorded.first, "first_logits": Recorded.first_logits, **Recorded.saves}
    put_away()
    return found


def put_away() -> None:
    """Take the engines apart on all ranks together: collected at will, one in the middle of the next model's partitioned
    loading on a single rank would switch partitioning off there, and the others would wait for it."""
    for engine in list(Recorded.engines):
        engine.close()
    gc.collect()
    gc.freeze()  # a third of the table's time were later collections that walked through all imports


def config_of(run_dir: Path) -> RunConfig:
    return read_run(run_dir / "run.yaml").config


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in rows if "loss" in row]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def load(folder: Path, task: str, quantized: bool = False) -> Any:
    """As anyone would, without dstune."""
    import peft
    import transformers

    if quantized:
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
        rounding = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=rounding)
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # its product for evaluation is one of bf16
        return peft.PeftModel.from_pretrained(model, folder).eval()
    kind = "SequenceClassification" if task == "classification" else "CausalLM"
    if (folder / "adapter_config.json").is_file():
        return getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(folder).eval()
    model, report = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        folder, output_loading_info=True, trust_remote_code=(folder / "modeling_dstune.py").is_file()
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def reloaded(folder: Path, task: str, logits: torch.Tensor, quantized: bool = False) -> float:
    model = load(folder, task, quantized)
    with torch.no_grad():
        if (folder / "modeling_dstune.py").is_file():
            return difference(model.classifier(FEATURES), logits)
        found = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return difference(found, logits)


def check(case: dict[str, Any], world: World) -> dict[str, Any]:
    run_dir = Path(case["run_dir"])
    began = time.perf_counter()
    if case["after"] and world.is_main:
        stand_on(run_dir, case)
    world.barrier()
    through = train(run_dir, world)
    middle, last = through["step-00000002"], through["step-00000004"]
    trained = last["trained"]
    result: dict[str, Any] = {
        "trained": len(trained),
        "moved": sum(not torch.equal(through["first"][name], last["whole"][name]) for name in trained),
        "frozen": len(last["whole"]) - len(trained),
        # Of a method that unfreezes, as long as each was frozen.
        "frozen_equal": all(
            torch.equal(weight, save["whole"][name])
            for save in (middle, last)
            for name, weight in through["first"].items()
            if name not in save["trained"]
        ),
        "changed": difference(middle["logits"], last["logits"]),
    }
    moved = {
        part: [float((last["whole"][n] - through["first"][n]).abs().mean()) for n in trained if f".lora_{part}." in n]
        for part in "AB"
    }
    if moved["A"]:
        result["b_to_a"] = sum(moved["B"]) / sum(moved["A"])
    masks = importance._read(run_dir).masks if (run_dir / importance.MASKS).is_file() else {}
    result["frozen"] += sum(int((~mask).sum()) for mask in masks.values())
    result["outside_masks_equal"] = all(
        torch.equal(through["first"][name][~mask], last["whole"][name][~mask]) for name, mask in masks.items()
    )
    if case["after"]:
        result["began"] = difference(through["first_logits"], torch.load(Path(case["after"]) / "logits.pt"))
    if case["evaluates"]:
        result["evaluated"] = evaluated_again(run_dir, world)
    resumed_dir = Path(f"{run_dir}-resumed")
    if world.is_main:
        store.folder(resumed_dir).mkdir(parents=True)
        shutil.copytree(store.folder(run_dir) / "step-00000002", store.folder(resumed_dir) / "step-00000002")
        for name in ("metrics.jsonl", importance.MASKS, importance.REPORT):
            if (run_dir / name).is_file():
                shutil.copyfile(run_dir / name, resumed_dir / name)
        stored = config_of(run_dir)
        config = replace(stored, zero=replace(stored.zero, stage=case["resumed_stage"]))
        write_run(resumed_dir / "run.yaml", Composed(config, []))
    world.barrier()
    resumed = train(resumed_dir, world)["step-00000004"]
    # The softmax takes off what a bias of keys adds to all scores, and in so small an encoder most of what one of queries adds:
    # their gradients are little but rounding, of which AdamW makes whole steps; another stage rounds in another order. All other
    # weights agreed within 2e-6 (stage 0 resumed at stage 3).
    exact = case["resumed_stage"] == case["stage"]
    compared = [name for name in trained if exact or not name.endswith(("self.key.bias", "self.query.bias"))]
    result["resumed"] = max(difference(resumed["whole"][name], last["whole"][name]) for name in compared)
    if world.is_main:
        torch.save(last["logits"], run_dir / "logits.pt")
        try:
            result |= read_back(case, run_dir, resumed_dir, last["logits"])
            if case["quantized"]:
                result["rounding"] = reloaded(Path(config_of(run_dir).model.path), "chat", through["first_logits"])
        except Exception:  # of this rank alone: the other one waits
            result["error"] = traceback.format_exc()[-3000:]
        result["seconds"] = time.perf_counter() - began
    world.barrier()
    return result


def generates_what_it_computes(model: Any) -> bool:
    """Greedy answers to prompts of different length in one batch are those of the forward pass, one token at a time."""
    prompts = [[9, 10, 11, 12, 13], [20, 21]]
    width = max(map(len, prompts))
    rows = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        speaker, inputs, before = generation_inputs(model, rows, mask)
        answers = speaker.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=None
        )
        for prompt in prompts:
            for _ in range(5):
                tokens = torch.tensor([prompt])
                prompt.append(
                    int(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1].argmax())
                )
    return answers[:, before:].tolist() == [prompt[-5:] for prompt in prompts]


def evaluated_again(run_dir: Path, world: World) -> float:
    """How far `dstune evaluate`, with the adapter in place, is from the loss that the run ended with."""
    config, folder = config_of(run_dir), Path(f"{run_dir}-evaluated")
    if world.is_main:
        folder.mkdir()
    labels = store.read_state(run_dir / "checkpoints" / "step-00000004")["labels"]
    if labels:
        config = replace(config, task=replace(config.task, labels=labels))
    evaluate(config, folder, "validation", store.newest(run_dir), world)
    put_away()
    found = json.loads((folder / "result.json").read_text())["metrics"]["loss"]
    return abs(found / json.loads((run_dir / "result.json").read_text())["eval_final"]["loss"] - 1)


def same_body(model: Any, base: str) -> bool:
    """Whether an export has the weights of the model that it was made from, to the bit."""
    import transformers

    mine, theirs = model.base_model.state_dict(), transformers.AutoModel.from_pretrained(base).state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


def stand_on(run_dir: Path, case: dict[str, Any]) -> None:
    """Let the run begin with what another one has trained."""
    config = config_of(run_dir)
    changes = {"adapter": case["after"]} if case["as"] == "adapter" else {"frozen_adapters": [case["after"]]}
    method = method_of(replace(config.method, **changes)).resolve()
    write_run(run_dir / "run.yaml", Composed(replace(config, method=method), []))


def read_back(case: dict[str, Any], run_dir: Path, resumed_dir: Path, logits: torch.Tensor) -> dict[str, Any]:
    """What the files say."""
    task = config_of(run_dir).task.name
    found: dict[str, Any] = {
        "metrics_equal": metrics(run_dir) == metrics(resumed_dir),
        "first_loss": metrics(run_dir)[0]["loss"],
        "reloaded": reloaded(run_dir / "export", task, logits, case["quantized"]),
    }
    model = load(run_dir / "export", task, case["quantized"])
    if isinstance(config_of(run_dir).method, FeaturesConfig):
        found["frozen_equal"] = same_body(model, config_of(run_dir).model.path)
    if hasattr(model, "prompt_encoder") and task == "chat":
        found["generated"] = generates_what_it_computes(model)
    if case["merges"]:
        merged = export_checkpoint(run_dir, store.newest(run_dir), run_dir / "merged", merge=True)
        found["merged"] = reloaded(merged, task, logits)
    return found


def main() -> None:
    world = start_rank()
    record(world)
    for case in json.loads(sys.argv[1]):
        # An error ends the table: the ranks are not in step any more, and others stand on the cell.
        result = check(case, world)
        if world.is_main:
            print("CASE " + json.dumps({**case, **result}), flush=True)


if __name__ == "__main__":
    end_with(main)
