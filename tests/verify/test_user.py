"""What the user has: DeepSpeed files, models, known faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dstune_verify import known_faults, network, script, user
from dstune_verify.cases import CRASHED, WRONG
from dstune_verify.catalogue import all_cases
from dstune_verify.options import Options

ACCELERATE = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "offload_optimizer": {"device": "nvme"},
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": 64,
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wandb": {"enabled": True},
}  # fmt: skip


def test_a_file_of_a_trainer_keeps_its_settings_and_names_what_changes():
    prepared = user.prepare(ACCELERATE, "bf16")
    assert (prepared.precision, prepared.accumulation, prepared.clipping, prepared.unsupported) == ("bf16", 4, 1.0, "")
    settings = prepared.settings
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert not {"optimizer", "wandb", "train_batch_size"} & set(settings)
    assert "offload_optimizer: to the CPU instead of NVMe" in prepared.changes
    assert "gradient_accumulation_steps: 4 instead of 64" in prepared.changes
    assert ACCELERATE["gradient_accumulation_steps"] == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 0, 1, 2 or 3, not 4"),
        ({"zero_optimization": [2]}, "zero_optimization is an object, not [2]"),
        ({"gradient_clipping": "yes"}, 'gradient_clipping is a number, not "yes"'),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is a whole number from 1, not 0"),
        ({"hidden": {"size": "auto"}}, '"auto" is not known for hidden.size'),
    ],
)
def test_a_file_that_is_wrong_is_refused(verify, tmp_path, config, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    done = verify("--deepspeed", str(file))
    assert done.code == 2
    assert message in done.stderr


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(verify, tmp_path, content):
    file = tmp_path / "ds.json"
    file.write_text(content)
    done = verify("--deepspeed", str(file))
    assert done.code == 2
    assert f"{file}: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_quantized_gradients changes gradients",
        ),
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor parallelism is not compared yet"),
    ],
)
def test_what_cannot_be_compared_is_not_run(config, reason):
    cases = user.cases(Options(deepspeed=config))
    assert all(reason in case.missing("cpu") for case in cases)


SHOWN = {
    "zero2-bf16-clipping-left-out": ("clipping-default", "0.19.8"),
    "zero3-fp32-repeated-reentrant": ("reentrant-repeated", "0.19.8"),
    "zero2-fp32-uneven-experts": ("uneven-experts", "0.19.8"),
    "zero2-fp32-accumulation": ("zero2-accumulation", "0.18.2"),
    "zero2-fp32-accumulation-offload": ("zero2-accumulation-offload", "0.18.5"),
    "zero0-bf16": ("zero0-bf16", "0.18.5"),
    "zero1-bf16-accumulation-in-fp32": ("zero1-bf16-fp32-sums", "0.18.5"),
    "zero2-bf16-scattered-gradients": ("scattered-gradients", "0.19.7"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_known_fault_is_named_on_its_versions_only(name):
    fault, version = SHOWN[name]
    case = all_cases(Options())[name]
    found = known_faults.find(case, WRONG, lambda package: version)
    assert found is not None
    assert found.name == fault
    if found.first_good:
        later = known_faults.find(case, WRONG, lambda package: found.first_good)
        assert later is None or later.name != fault
    assert (
        known_faults.find(case, CRASHED, lambda package: "0.19.8.post1") is None
        or "experts" in fault
        or "repeated" in fault
    )


def test_versions_are_compared_as_numbers():
    assert known_faults.number("2.13.0+cpu") == (2, 13, 0) > known_faults.number("2.4")
    assert known_faults.number("0.19.10") > known_faults.number("0.19.8")


def test_a_model_is_shrunken_and_keeps_its_kind():
    small = network.shrink(
        {
            "model_type": "qwen3", "auto_map": {"AutoModel": "evil.Model"}, "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_hidden_layers": 36, "layer_types": ["full_attention"] * 35 + ["sliding_attention"],
            "attention_dropout": 0.1, "vocab_size": 151936, "sliding_window": None, "use_sliding_window": False, "eos_token_id": 7,
        }
    )  # fmt: skip
    assert small == {
        "model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"], "attention_dropout": 0.0, "vocab_size": 128,
        "sliding_window": None, "use_sliding_window": False, "eos_token_id": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "nothing"}, "nothing cannot be shrunken"),
        ({"model_type": "llama", "text_config": {}}, "models with images or sound are not compared"),
        (
            {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_inner": "x"},
            "cannot be shrunken",
        ),
    ],
)
def test_a_model_that_cannot_be_shrunken_is_not_run(config, reason):
    with pytest.raises(network.CannotShrink, match=reason):
        network.build(network.shrink(config))


@pytest.mark.ci
def test_the_two_open_faults_are_in_users_files(verify, tmp_path):
    for stage, case, fault in (
        (2, "yours-experts", "uneven-experts"),
        (3, "yours-repeated-reentrant", "reentrant-repeated"),
    ):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}))
        done = verify("--deepspeed", str(file), "--json", "--scripts", str(tmp_path / "scripts"))
        assert done.code == 1
        wrong = {name: outcome["known"]["name"] for name, outcome in done.cases.items() if outcome["status"] == "wrong"}
        assert wrong == {case: fault}
        assert [file.name for file in (tmp_path / "scripts").iterdir()] == [f"{case}.py"]
        started = start_script(tmp_path / "scripts" / f"{case}.py")
        assert started.returncode == 1
        assert "relative error of the gradient: 0." in started.stdout, started.stderr
        (tmp_path / "scripts" / f"{case}.py").unlink()


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    ["zero2-fp32-accumulation", "zero3-fp32-repeated", "zero3-bf16-lora-recomputed", "ddp-fp32-accumulation-clipped"],
)
def test_a_script_of_a_right_case_ends_in_order(tmp_path, name):
    started = start_script(script.write(tmp_path, all_cases(Options())[name]))
    assert started.returncode == 0, started.stderr
    assert "norm: 1 of the expected" in started.stdout


def test_a_script_is_short_and_names_the_versions_and_settings():
    case = all_cases(Options())["zero3-fp32-repeated-reentrant"]
    text = script.script_of(case, "a.py")
    assert text is not None and len(text.splitlines()) <= 110
    assert "ZeRO-3, fp32, 1 micro-batch, a repeated model, reentrant recomputation" in text
    assert f"torch {version('torch')}" in text and "dstune" not in text
    compile(text, "a.py", "exec")


def start_script(file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=file.parent)


@pytest.mark.ci
def test_a_model_with_adapters_is_right_at_every_engine(verify, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
                    "num_hidden_layers": 28, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936})
    )  # fmt: skip
    done = verify("--model", str(tmp_path), "--lora", "--precision", "bf16", "--json", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.stderr
    assert len(done.cases) == 8
