"""`dstune import`: published examples of each tool compose; what is carried and what is not is told key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from support.imports import EXAMPLES, configuration, imported

from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.names import all_keys, sections
from dstune.config.schema import Offload, Precision
from dstune.core.errors import UserError
from dstune.importing.convert import convert
from dstune.importing.files import TOOLS, read
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED
from dstune.methods.lora.config import LoraConfig

TRAINER = {"do_train", "dataloader_num_workers", "logging_steps", "plot_loss", "overwrite_output_dir", "ddp_timeout"}

HANDBOOK = {
    "do_eval",
    "gradient_checkpointing_kwargs",
    "hub_model_id",
    "hub_strategy",
    "log_level",
    "logging_steps",
    "logging_strategy",
    "overwrite_output_dir",
}

AXOLOTL = {"logging_steps", "special_tokens"}

WATCHDOG = {"loss_watchdog_threshold", "loss_watchdog_patience"}

NOT_CARRIED: dict[str, dict[str, set[str]]] = {
    "axolotl/llama3_instruct_lora.yaml": {
        NOT_SUPPORTED: {"load_in_8bit"},
        MEANINGLESS: {"model_type", "tokenizer_type", *AXOLOTL},
    },
    "axolotl/llama3_full.yaml": {
        DIFFERENT: {"optimizer", "attn_implementation"},
        MEANINGLESS: {"dataset_prepared_path", "gradient_checkpointing_kwargs", *AXOLOTL},
    },
    "axolotl/llama3_qlora_1b.yaml": {
        NOT_SUPPORTED: WATCHDOG,
        DIFFERENT: {"attn_implementation"},
        MEANINGLESS: {"dataset_prepared_path", "eval_sample_packing", *AXOLOTL},
    },
    "axolotl/tiny_llama_pretrain.yaml": {
        DIFFERENT: {"attn_implementation"},
        MEANINGLESS: {"model_type", "tokenizer_type", "num_epochs", "logging_steps"},
    },
    "llama_factory/qwen3_full_sft.yaml": {NOT_SUPPORTED: {"template", "trust_remote_code"}, MEANINGLESS: TRAINER},
    "llama_factory/qwen3_lora_sft.yaml": {NOT_SUPPORTED: {"template", "trust_remote_code"}, MEANINGLESS: TRAINER},
    "llama_factory/qwen3_lora_pretrain.yaml": {NOT_SUPPORTED: {"trust_remote_code"}, MEANINGLESS: TRAINER},
    "llama_factory/qwen3_qlora_sft.yaml": {
        NOT_SUPPORTED: {"template", "quantization_method", "trust_remote_code"},
        MEANINGLESS: TRAINER,
    },
    "ms_swift/vision_lora.sh": {
        NOT_SUPPORTED: {"MAX_PIXELS"},
        MEANINGLESS: {"dataloader_num_workers", "logging_steps"},
    },
    "ms_swift/vision_full.sh": {NOT_SUPPORTED: {"vit_gradient_checkpointing"}, MEANINGLESS: {"num_processes"}},
    "ms_swift/vision_dpo.sh": {NOT_SUPPORTED: {"rpo_alpha"}, MEANINGLESS: {"num_processes"}},
    "trl/cli_example.yaml": {},
    "trl/sft_lora.sh": {NOT_SUPPORTED: {"push_to_hub"}, MEANINGLESS: {"eos_token"}},
    "trl/smollm2_sft.yaml": {
        NOT_SUPPORTED: {"push_to_hub", "chat_template"},
        MEANINGLESS: {"remove_unused_columns", *HANDBOOK},
    },
    "trl/zephyr_qlora.yaml": {NOT_SUPPORTED: {"push_to_hub"}, DIFFERENT: {"dataset_mixture"}, MEANINGLESS: HANDBOOK},
}

OFF = {
    "axolotl/llama3_instruct_lora.yaml": {
        "load_in_4bit",
        "dataset_prepared_path",
        "lora_model_dir",
        "wandb_project",
        "resume_from_checkpoint",
    },
    "axolotl/llama3_qlora_1b.yaml": {"load_in_8bit"},
    "axolotl/tiny_llama_pretrain.yaml": {"evals_per_epoch"},
    **{
        f"llama_factory/qwen3_{name}.yaml": {"save_only_model", "resume_from_checkpoint"}
        for name in ("full_sft", "lora_sft", "lora_pretrain")
    },
    "llama_factory/qwen3_qlora_sft.yaml": {"save_only_model"},
}
"""Keys of the examples that ask for nothing."""


def test_there_are_three_examples_of_each_tool_and_all_are_in_the_table():
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.*")}
    assert files == set(NOT_CARRIED)
    assert all(sum(name.startswith(tool.replace("-", "_")) for name in files) >= 3 for tool in TOOLS)


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_example_composes_and_every_key_is_accounted_for(name, monkeypatch):
    found = imported(name, monkeypatch)
    assert found.problems == []
    assert found.tool.replace("-", "_") == name.split("/")[0]
    for kind in (NOT_SUPPORTED, DIFFERENT, MEANINGLESS):
        dropped_keys = {key for key, dropped in found.dropped.items() if dropped.kind == kind}
        assert dropped_keys == NOT_CARRIED[name].get(kind, set()), kind
    assert set(found.off) == OFF.get(name, set())
    assert set(read(EXAMPLES / name)) == {*found.carried, *found.dropped, *found.off}
    assert all(dropped.reason for dropped in found.dropped.values())


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_carries_a_key_is_a_key_or_a_group(name, monkeypatch):
    for theirs, ours in imported(name, monkeypatch).carried.items():
        assert ours, theirs
        assert set(ours) <= {*all_keys(), *sections()}, theirs


def test_axolotl_lora(monkeypatch, tmp_path):
    config = configuration(imported("axolotl/llama3_instruct_lora.yaml", monkeypatch, ranks=4).text, tmp_path)
    assert config.model.path == "NousResearch/Meta-Llama-3-8B-Instruct"
    assert config.method == LoraConfig(rank=32, alpha=16.0, dropout=0.05)
    assert (config.data.train, config.data.format) == ("fozziethebeat/alpaca_messages_2k_test", "messages")
    assert (config.data.max_length, config.data.packing, config.data.split.validation) == (4096, False, 0.05)
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (2, 2 * 4 * 4)
    assert (config.trainer.epochs, config.optimizer.lr, config.schedule.warmup_ratio) == (4, 2e-4, 0.1)
    assert (config.schedule.name, config.trainer.precision) == ("cosine", Precision.auto)


def test_axolotl_pretraining_streams(monkeypatch, tmp_path):
    config = configuration(imported("axolotl/tiny_llama_pretrain.yaml", monkeypatch).text, tmp_path)
    assert (config.task.name, config.data.train, config.data.subset) == ("causal_lm", "allenai/c4", "en")
    assert (config.data.streaming, config.trainer.max_steps) == (True, 200)


def test_llama_factory_with_a_deepspeed_file_and_two_data_sets(monkeypatch, tmp_path):
    config = configuration(imported("llama_factory/qwen3_full_sft.yaml", monkeypatch).text, tmp_path)
    assert (config.zero.stage, config.zero.offload_param) == (3, Offload.none)
    assert config.zero.settings["zero_optimization"]["sub_group_size"] == 10**9
    assert {name: source.path for name, source in config.data.mixture.items()} == {
        "identity": "data/identity.json",
        "alpaca_en_demo": "data/alpaca_en_demo.json",
    }
    assert {source.max_rows for source in config.data.mixture.values()} == {1000}
    assert (config.method.name, config.trainer.precision, config.trainer.epochs) == ("full", Precision.bf16, 3)
    assert (config.schedule.warmup_ratio, config.schedule.warmup_steps) == (0.1, None)
    assert config.data.split.validation == 0  # LLaMA-Factory holds nothing out by itself


def test_ms_swift_trains_what_sees(monkeypatch, tmp_path):
    def imported_run(name):
        (tmp_path / name).mkdir()
        return configuration(imported(f"ms_swift/{name}.sh", monkeypatch).text, tmp_path / name)

    config = imported_run("vision_full")
    assert (config.model.train_vision, config.optimizer.lr, config.optimizer.vision_lr) == (True, 1e-5, 1e-6)
    assert (config.data.train, config.data.validation, config.zero.stage) == ("charts.jsonl", "held_out.jsonl", 3)
    # 16 rows a step where the file says nothing, over four ranks.
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (1, 16)
    config = imported_run("vision_lora")
    assert config.method == LoraConfig(rank=8, alpha=32.0, dropout=0.05)
    assert (config.data.train, config.data.subset) == ("AI-ModelScope/LaTeX_OCR", "human_handwrite")
    assert (config.data.max_rows, config.data.packing, config.model.train_vision) == (20000, False, False)
    config = imported_run("vision_dpo")
    assert (config.task.name, config.task.loss.name, config.task.beta) == ("preference", "dpo", 0.05)
    assert (config.zero.stage, config.zero.offload_optimizer.name) == (2, "cpu")


def test_trl_command_line(monkeypatch, tmp_path):
    found = imported("trl/sft_lora.sh", monkeypatch)
    config = configuration(found.text, tmp_path)
    assert config.method == LoraConfig(rank=32, alpha=16.0, dropout=0.05)
    assert (config.data.train, config.data.validation) == ("trl-lib/Capybara", "trl-lib/Capybara:test")
    assert (config.data.packing, config.trainer.epochs, config.evaluate.every) == (True, 1, 100)
    assert (config.schedule.name, config.trainer.global_batch_size) == ("linear", 2 * 8 * 8)
    assert config.task.train_on_prompt is True
    assert any("TRL also trains on the prompts" in text for text in found.assumed)


@pytest.mark.parametrize(
    ("tool", "raw", "expected"),
    [
        (
            "axolotl",
            {
                "base_model": "m",
                "adapter": "qlora",
                "peft_use_dora": True,
                "loraplus_lr_ratio": 8,
                "lora_model_dir": "runs/a",
            },
            {"dora": True, "lr_ratio": 8, "adapter": "runs/a"},
        ),
        (
            "llama-factory",
            {"model_name_or_path": "m", "finetuning_type": "lora", "quantization_bit": 4, "use_dora": True},
            {"dora": True},
        ),
        ("trl", {"model_name_or_path": "m", "use_peft": True, "load_in_4bit": True, "use_dora": True}, {"dora": True}),
    ],
)
def test_adapters_on_4_bit_weights(tool, raw, expected):
    found = yaml.safe_load(convert(raw, tool, Path("x.yaml"), 1).text)
    assert {"override /method": "qlora"} in found["defaults"]
    assert {key: found["method"][key] for key in expected} == expected


def test_trl_trains_completions_alone_where_the_file_says_so():
    found = convert({"model_name_or_path": "m", "completion_only_loss": True}, "trl", Path("x.yaml"), 1)
    assert "train_on_prompt" not in found.text
    assert not any("TRL also trains on the prompts" in text for text in found.assumed)


@pytest.mark.parametrize(
    ("keys", "tiles"),
    [({"tiled_mlp": True, "tiled_mlp_num_shards": 4}, 4), ({"tiled_mlp": True}, 8), ({"tiled_mlp": False}, None)],
)
def test_axolotl_tiles(keys, tiles):
    found = yaml.safe_load(
        convert({"base_model": "m", "micro_batch_size": 1, **keys}, "axolotl", Path("x.yaml"), 1).text
    )
    assert found["trainer"].get("mlp_tiles") == tiles


def test_trl_mixture(monkeypatch, tmp_path):
    config = configuration(imported("trl/zephyr_qlora.yaml", monkeypatch).text, tmp_path)
    assert [source.path for source in config.data.mixture.values()] == [
        "HuggingFaceH4/ultrachat_200k:train_sft",
        "HuggingFaceH4/ultrachat_200k:test_sft",
    ]
    assert config.tracking.tensorboard is True
    assert (config.checkpoint.every, config.checkpoint.keep) == (100, 1)


def test_the_number_of_ranks_is_required():
    raw = {"base_model": "m", "micro_batch_size": 2, "gradient_accumulation_steps": 3}
    for ranks, rows in ((None, 6), (8, 48)):
        found = convert(raw, "axolotl", Path("x.yaml"), ranks)
        assert yaml.safe_load(found.text)["trainer"]["global_batch_size"] == rows
        assert any("--ranks" in text for text in found.assumed)


@pytest.mark.parametrize("processes", ["auto", [4], {"a": 1}, -2, 1.5, True])
def test_a_number_of_ranks_that_is_none_is_refused(processes):
    raw = {"base_model": "m", "num_processes": processes}
    with pytest.raises(UserError) as error:
        convert(raw, "axolotl", Path("x.yaml"))
    assert error.value.problems[0].where == "num_processes"
    assert "--ranks" in (error.value.problems[0].fix or "")
    assert convert(raw, "axolotl", Path("x.yaml"), 2)


def test_the_verb_writes_an_experiment_that_trains_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = EXAMPLES / "axolotl" / "llama3_qlora_1b.yaml"
    assert main(["import", str(source), "--output", "mine/experiment/qlora.yaml", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "dataset_prepared_path: last_run_prepared" in printed
    assert "next: dstune train --config-dir mine experiment=qlora" in printed
    config = compose(["experiment=qlora"], ["mine"]).config
    assert config.trainer.global_batch_size == 16
    assert main(["import", str(source), "--output", "mine/experiment/qlora.yaml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["import", str(source), "--output", "mine/experiment/qlora.yaml", "--force", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["dropped"]["dataset_prepared_path"]["kind"] == MEANINGLESS
    assert answer["carried"]["learning_rate"] == ["optimizer.lr"]
    assert answer["output"] == "mine/experiment/qlora.yaml"


def test_the_next_command_is_quoted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base_model: m\ndatasets: [{path: a/b, type: alpaca}]\n")
    assert main(["import", "a.yaml", "-o", "my dir/experiment/my sft.yaml"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command) == ["dstune", "train", "--config-dir", "my dir", "experiment=my sft"]
    assert compose(["experiment=my sft"], ["my dir"]).config.model.path == "m"


def test_the_verb_prints_the_experiment_and_what_has_to_be_fixed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base_model: m\nmicro_batch_size: 1\n")
    assert main(["import", "a.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("# @package _global_\n")
    assert "to fix before it runs" in err
    assert "data.train" in err


@pytest.mark.parametrize(
    ("text", "arguments", "where"),
    [
        ("[1, 2]", [], "FILE"),
        ("b: 1\na: [", [], "a.yaml:2"),
        ("some: keys\n", [], "FILE"),
        ("base_model: m\n", ["--from", "unsloth"], "--from"),
        ("base_model: m\n", ["--ranks", "0"], "--ranks"),
        ("base_model: m\n", ["--ranks", "two"], "command line"),
        ("base_model: m\n", ["-o", "mine/experiment/sft.yml"], "--output"),
        ("base_model: m\n", ["-o", "mine/experiment/quickstart.yaml"], "my_quickstart.yaml"),
    ],
)
def test_bad_files_and_arguments(tmp_path, monkeypatch, capsys, text, arguments, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    assert main(["import", "a.yaml", *arguments]) == 2
    assert where in capsys.readouterr().err
