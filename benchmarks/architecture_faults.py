"""Faults that are planted in a run, for the comparison of `architectures.py` to find: a test of the test.

python benchmarks/architecture_faults.py FOLDER    # one of two ranks (tests/parity/test_architecture_faults.py)

Each is planted when the engine stands and its sanity checks have passed, so that nothing but the comparison can see it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

LAYER = "model.layers.0"


def skip_a_head(model: Any) -> None:
    def hook(module: Any, inputs: Any) -> Any:
        (attended,) = inputs
        attended = attended.clone()
        attended[..., -model.config.head_dim :] = 0
        return (attended,)

    model.get_submodule(f"{LAYER}.self_attn.o_proj").register_forward_pre_hook(hook)


def skip_a_layer(model: Any) -> None:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return inputs[0] + 0 * output

    model.get_submodule("model.layers.1").register_forward_hook(hook)


def turn_faster(model: Any) -> None:
    model.get_submodule("model.rotary_emb").inv_freq.mul_(1.01)


def scale_a_norm(model: Any) -> None:
    model.get_parameter("model.norm.weight").data.mul_(1.001)


def keep_a_tensor(model: Any) -> None:
    model.get_parameter(f"{LAYER}.mlp.up_proj.weight").register_hook(lambda gradient: gradient * 0)


def double_a_gradient(model: Any) -> None:
    model.get_parameter(f"{LAYER}.input_layernorm.weight").register_hook(lambda gradient: gradient * 2)


def round_the_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())


def lose_a_bit_of_the_residual(model: Any) -> None:
    model.get_submodule(f"{LAYER}.mlp").register_forward_hook(lambda module, inputs, output: output * 0.999)


MODELS: dict[str, Callable[[Any], None]] = {
    "a head is skipped": skip_a_head,
    "a layer is skipped": skip_a_layer,
    "the rotary embedding is 1% faster": turn_faster,
    "a norm's weight begins 0.1% larger": scale_a_norm,
    "a tensor gets no gradient": keep_a_tensor,
    "a norm gets twice its gradient": double_a_gradient,
    "weights are rounded to bf16": round_the_weights,
    "a feed-forward part adds 0.1% less": lose_a_bit_of_the_residual,
}
"""Of the model that is trained."""


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Let runs have a fault, by its name."""
    import torch.nn.functional as functional

    from dstune.data.collate import NO_TARGET
    from dstune.models.heads import language
    from dstune.rank.setup import Setup

    build_training, inputs_of = Setup.build_training, language.inputs_of
    active: list[str] = []

    def build(setup: Any, *arguments: Any, **keywords: Any) -> Any:
        training = build_training(setup, *arguments, **keywords)
        active.append(fault)
        if fault in MODELS:
            MODELS[fault](training.engine.module)
        return training

    def labels_of(head: Any, batch: Any) -> Any:
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=NO_TARGET)
        if active and fault == "targets are those of the next token but one":
            labels = functional.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
        if active and fault == "one target is left out":
            labels = labels.clone()
            row, position = (labels != NO_TARGET).nonzero()[0].tolist()
            labels[row, position] = NO_TARGET
        return labels

    def inputs(batch: Any, *arguments: Any) -> Any:
        model_inputs = inputs_of(batch, *arguments)
        if active and fault == "samples of a row see each other" and "position_ids" in model_inputs:
            import torch

            positions = torch.arange(model_inputs["position_ids"].shape[1]).expand_as(model_inputs["position_ids"])
            model_inputs = {**model_inputs, "position_ids": positions}
        return model_inputs

    with (
        patch.object(Setup, "build_training", build),
        patch.object(language.CausalLmHead, "labels_of", labels_of),
        patch.object(language, "inputs_of", inputs),
    ):
        yield


BATCHES = (
    "targets are those of the next token but one",
    "one target is left out",
    "samples of a row see each other",
)
"""Of what the model is given."""
EXPORTED = "a tensor of the export is that of the start"
FAULTS = (*MODELS, *BATCHES, EXPORTED)


def spoil_the_export(folder: Path, start: Path) -> None:
    """Put a tensor of the start into the export."""
    from safetensors.torch import load_file, save_file

    name = f"{LAYER}.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name: load_file(start / "model.safetensors")[name]}, folder / "model.safetensors", {"format": "pt"}
    )


def main() -> None:
    """Train one tiny Llama without a fault and with each of them; rank 0 prints what the comparison says."""
    import architecture_rank
    from architecture_cases import Case
    from support.ranks import start_rank

    work, world = Path(json.loads(sys.argv[1])), start_rank()
    case = Case("causal", "llama", "full", True, 0)
    compare, status_by_fault = architecture_rank.compare, {}
    for fault in ("none", *FAULTS):

        def spoiled(case: Any, config: Any, folder: Path, run_dir: Path, fault: str = fault) -> Any:
            if fault == EXPORTED:
                spoil_the_export(run_dir / "export", folder)
            return compare(case, config, folder, run_dir)

        with planted(fault), patch.object(architecture_rank, "compare", spoiled):
            status_by_fault[fault] = architecture_rank.run_case(case, world, work).get("status")
    if world.is_main:
        print("FOUND", json.dumps(status_by_fault))


if __name__ == "__main__":
    from support.ranks import end_with

    end_with(main)
