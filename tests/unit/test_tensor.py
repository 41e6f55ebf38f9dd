"""Weights that ranks share: who can share which, what is refused, and what the plan counts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder

from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.parallel_rules import SLICED, slices_problems
from dstune.config.schema import Precision
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.launch.preflight import check_folder, resolve_model
from dstune.planning import time
from dstune.planning.architecture import architecture, sliced
from dstune.planning.memory import memory
from dstune.planning.setup import setup
from dstune.zero.ds_config import deepspeed_config, micro_batches_per_rank
from dstune.zero.slices import SlicedSource, Slices

SOURCES = ["model=smollm2", "data=chitchat", "parallel=tensor"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


def test_it_goes_by_the_name_of_deepspeeds_own_layers_too():
    words = ["model=smollm2", "data=chitchat", "zero=stage2", "parallel.size=3"]
    assert compose([*words, "parallel=autotp"]).config.parallel == compose([*words, "parallel=tensor"]).config.parallel


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data=sentiment", "model=minilm", "task=classification"], "parallel"),
        (["task=seq2seq"], "parallel"),
        (["data=files", "data.mixture.a.path=x", "data.mixture.a.task=seq2seq"], "parallel"),
        (["method=freeze"], "parallel"),
        (["method=qlora"], "parallel"),
        (["method=lora", "method.dora=true"], "method.dora"),
        (["method=lora", "method.frozen_adapters=[x]"], "method.frozen_adapters"),
        (["method=lora", "method.init=pissa"], "method.init"),
        (["zero=stage3"], "zero.stage"),
        (["zero.offload_optimizer=cpu"], "zero.offload_optimizer"),
        (["trainer.precision=fp16"], "trainer.precision"),
        (["trainer.micro_batch_size=auto"], "trainer.micro_batch_size"),
        (["forgetting.l2sp=0.1"], "forgetting.l2sp"),
        (["launch.processes=3"], "parallel.size"),
        (["parallel.size=1"], "parallel.size"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides, key):
    problems = find_problems(compose([*SOURCES, "zero=stage2", *overrides]).config)
    (found,) = [problem for problem in problems if problem.where == key]
    assert found.reason and found.fix


def test_what_can_be_shared_is_not():
    for more in ([], ["method=lora"], ["task=causal_lm"], ["zero=stage0", "trainer.precision=fp32"], ["zero=stage1"]):
        assert find_problems(compose([*SOURCES, "zero=stage2", "launch.processes=4", *more]).config) == []


@pytest.mark.parametrize(
    ("changes", "parts", "reason", "fix"),
    [
        ({}, 2, None, None),
        ({}, 4, "2 heads of keys cannot", "parallel.size=2"),
        ({}, 3, "4 attention heads, 2 heads of keys, 64 values", "parallel.size=2"),
        ({"intermediate_size": 65}, 2, "65 values inside", "parallel=none"),
        ({"model_type": "gpt2"}, 2, "gpt2: it is not known", "a model of the kinds"),
    ],
)
def test_models_whose_weights_can_be_shared(changes, parts, reason, fix):
    problems = slices_problems(LLAMA | changes, parts)
    if reason is None:
        assert problems == []
    else:
        (problem,) = problems
        assert reason in problem.reason and fix in problem.fix


def test_a_model_that_cannot_be_shared_is_refused_before_ranks_start(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    config = compose([f"model.path={folder}", "data=chitchat", "parallel=tensor", "zero=stage2"]).config
    check_folder(folder, config.model, config)
    config = compose(
        [f"model.path={folder}", "data=chitchat", "parallel=tensor", "parallel.size=4", "zero=stage2"]
    ).config
    with pytest.raises(UserError, match="2 heads of keys cannot be shared by 4 ranks"):
        check_folder(folder, config.model, config)
    config = compose(SOURCES).config
    with pytest.raises(UserError, match=r"(?s)9 attention heads, 3 heads of keys cannot be shared by 2 ranks.*size=3"):
        resolve_model(config.model, lambda text: None, config)


def test_ranks_of_a_group_have_the_same_micro_batches_and_are_one_to_deepspeed():
    config = compose([*SOURCES, "trainer.micro_batch_size=2", "trainer.global_batch_size=16"]).config
    assert micro_batches_per_rank(config, 4) == 4
    settings = deepspeed_config(config, 4, Precision.fp32, on_gpu=False)
    assert settings["train_batch_size"] == 16


def held(part: int, parts: int, cuts: dict[str, int]) -> Slices:
    found = Slices.__new__(Slices)
    found.parts, found.part, found.cuts = parts, part, cuts
    return found


def test_a_whole_parameter_is_read_as_a_slice():
    whole = {"rows": torch.arange(24.0).view(4, 6), "columns": torch.arange(24.0).view(4, 6), "norm": torch.arange(5.0)}
    source = SimpleNamespace(
        shapes={name: tensor.shape for name, tensor in whole.items()},
        buffers={},
        loss_scaler=None,
        global_steps=7,
        read=lambda name, kind, start=0, count=None: whole[name].view(-1)[start:][:count],
    )
    cuts = {"rows": 0, "columns": 1}
    for part in range(2):
        own = SlicedSource(source, held(part, 2, cuts))
        assert torch.equal(own.read("rows").view(own.shapes["rows"]), whole["rows"][2 * part :][:2])
        assert torch.equal(own.read("columns").view(own.shapes["columns"]), whole["columns"][:, 3 * part :][:, :3])
        assert torch.equal(
            own.read("columns", "exp_avg", 4, 3), whole["columns"][:, 3 * part :][:, :3].reshape(-1)[4:7]
        )
        assert torch.equal(own.read("norm", "weight", 1, 2), whole["norm"][1:3])


def test_the_plan_knows_the_tensors_of_a_slice():
    """Against a model of transformers that is cut, name by name; and its bytes by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dstune.models.tensor import slice_model

    for kind in SLICED:
        named = {key: value for key, value in LLAMA.items() if key != "model_type"}
        named |= {"attention_bias": kind in ("llama", "qwen3"), "head_dim": 8, "pad_token_id": 0}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **named))
        slice_model(model, model, held(1, 2, {}))
        planned = sliced(architecture(model.config.to_dict()), 2)
        found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert {tensor.name: tensor.shape for tensor in planned.tensors} == found, kind


def planned_setup(*overrides: str, ranks: int = 8):
    words = ["model.path=x", "data=files", "data.train=x", "data.max_length=16", "trainer.micro_batch_size=3"]
    config = compose([*words, "trainer.global_batch_size=24", *overrides]).config
    return setup(
        config,
        architecture(LLAMA | {"tie_word_embeddings": False}),
        ranks=ranks,
        ranks_per_node=8,
        on_gpu=True,
        precision=Precision.bf16,
        values=LLAMA,
    )


def test_the_plan_counts_slices_by_hand():
    whole, shared = planned_setup("zero=stage2"), planned_setup("zero=stage2", "parallel=tensor")
    # Embedding and projection; norms; per layer q, k, v, o (64 x 32 of heads, keys 16) and three matrices 32 x 64.
    ends, norms = 2 * 50 * 32, (2 * 3 + 1) * 32
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    biases = 32 + 2 * 16  # of queries and keys; that of what goes back is whole
    assert whole.trained_count == ends + norms + 3 * (layer + biases + 32)
    assert shared.trained_count == ends + norms + 3 * (layer // 2 + biases // 2 + 32)
    assert (whole.ranks, shared.ranks, shared.groups, shared.slices) == (8, 4, 4, 2)
    assert (whole.micro_batches, shared.micro_batches) == (1, 2)
    parts = memory(shared).moments["step"]
    assert parts["weights"] == 2 * shared.trained_count
    assert parts["optimizer"] == 12 * -(-shared.trained_count // 4)
    # Two micro-batches, three layers, four sums of 3 x 16 positions x 32 in bf16, all of which leaves a rank of two once.
    assert time.summed_bytes(shared) == 2 * 3 * 4 * (3 * 16 * 32 * 2)
    assert time.summed_bytes(whole) == 0
    again = planned_setup("zero=stage2", "parallel=tensor", "trainer.activation_checkpointing=true")
    assert time.summed_bytes(again) == time.summed_bytes(shared) * 5 // 4


def test_the_plan_of_shared_weights(capsys):
    words = ["model=llama3_8b", "task=causal_lm", "data=files", "hardware=8xH100-80G", "data.max_length=4096"]
    words += ["trainer.micro_batch_size=1", "zero=stage1", "trainer.activation_checkpointing=true"]

    def plan(*more: str) -> dict:
        assert main(["plan", *words, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    whole, shared = plan(), plan("parallel=tensor", "parallel.size=8")
    assert shared["model"] == whole["model"]
    assert shared["configured"]["parts_gib"]["weights"] < 0.3 * whole["configured"]["parts_gib"]["weights"]
    assert {choice["zero"] for choice in shared["choices"]} == {"stage0", "stage1", "stage2"}
    assert {choice["offload"] for choice in shared["choices"]} == {"none"}
    for size, why in ((3, "cannot be shared by 3 ranks"), (16, "8 heads of keys")):
        assert main(["plan", *words, "parallel=tensor", f"parallel.size={size}"]) == 2
        assert why in capsys.readouterr().err
