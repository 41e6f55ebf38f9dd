"""`dstune import`: published examples of each tool compose; what is carried and what is not is told key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.names import all_keys, sections
from dstune.config.schema import Offload, Precision, RunConfig
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.importing import axolotl, llama_factory, trl
from dstune.importing.convert import Experiment, convert
from dstune.importing.files import TOOLS, of_command, read, tool_of
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED
from dstune.methods.lora.config import LoraConfig

EXAMPLES = Path(__file__).parents[1] / "data" / "imports"

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


def imported(name: str, monkeypatch: pytest.MonkeyPatch, ranks: int | None = 8) -> Experiment:
    path = EXAMPLES / name
    monkeypatch.chdir(path.parent)  # zero.path and dataset_info.json are relative to where dstune is started
    raw = read(path)
    return convert(raw, tool_of(raw, None, name), path, ranks)


def configuration(text: str, tmp_path: Path) -> RunConfig:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose(["experiment=mine"], [tmp_path]).config
    validate(config)
    return config


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
        report = {key for key, dropped in found.dropped.items() if dropped.kind == kind}
        assert report == NOT_CARRIED[name].get(kind, set()), kind
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


def test_trl_command_line(monkeypatch, tmp_path):
    found = imported("trl/sft_lora.sh", monkeypatch)
    config = configuration(found.text, tmp_path)
    assert config.method == LoraConfig(rank=32, alpha=16.0, dropout=0.05)
    assert (config.data.train, config.data.validation) == ("trl-lib/Capybara", "trl-lib/Capybara:test")
    assert (config.data.packing, config.trainer.epochs, config.evaluate.every) == (True, 1, 100)
    assert (config.schedule.name, config.trainer.global_batch_size) == ("linear", 2 * 8 * 8)
    assert config.task.train_on_prompt is True
    assert any("TRL trains on the prompts" in text for text in found.assumed)


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
    assert not any("TRL trains on the prompts" in text for text in found.assumed)


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


# ---- single keys ----


def values(tool: str, **keys: Any) -> tuple[dict[str, Any], Experiment]:
    base = {
        "axolotl": {"base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]},
        "llama-factory": {"model_name_or_path": "m", "stage": "sft", "dataset": "none"},
        "trl": {"model_name_or_path": "m", "dataset_name": "rows.jsonl"},
    }[tool]
    found = convert({**base, **keys}, tool, Path("x.yaml"), 1)
    return yaml.safe_load(found.text), found


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        (
            "axolotl",
            {"datasets": [{"path": "a/b", "type": "completion", "field": "body"}]},
            {"data": {"train": "a/b", "format": "text", "columns": {"text": "body"}}},
        ),
        (
            "axolotl",
            {"datasets": [{"path": "a/b", "type": "chat_template", "field_messages": "turns"}]},
            {"data": {"format": "messages", "columns": {"messages": "turns"}}},
        ),
        (
            "axolotl",
            {
                "datasets": [
                    {
                        "path": "a/b",
                        "type": "chat_template",
                        "message_property_mappings": {"role": "from", "content": "value"},
                    }
                ]
            },
            {"data": {"format": "conversations"}},
        ),
        (
            "axolotl",
            {"datasets": [{"path": "a/b", "type": "alpaca", "split": "part", "name": "en", "revision": "v1"}]},
            {"data": {"train": "a/b:part", "subset": "en", "revision": "v1"}},
        ),
        (
            "axolotl",
            {"datasets": [{"path": "json", "data_files": ["x.jsonl"], "type": "alpaca"}]},
            {"data": {"train": "x.jsonl"}},
        ),
        (
            "axolotl",
            {"wandb_project": "p", "wandb_entity": "e", "wandb_mode": "offline", "wandb_name": "n"},
            {"tracking": {"project": "p", "wandb": {"mode": "offline", "entity": "e"}}, "run": {"name": "n"}},
        ),
        (
            "axolotl",
            {"train_on_inputs": True, "seed": 7, "bf16": True},
            {"task": {"train_on_prompt": True}, "trainer": {"seed": 7, "precision": "bf16"}},
        ),
        (
            "axolotl",
            {"warmup_steps": 10, "max_steps": 100},
            {"schedule": {"warmup_steps": 10}, "trainer": {"max_steps": 100}},
        ),
        ("llama-factory", {"tf32": True}, {"trainer": {"tf32": True}}),
        ("axolotl", {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1}, {"schedule": {"min_lr_ratio": 0.1}}),
        (
            "axolotl",
            {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5},
            {"optimizer": {"betas": [0.9, 0.95], "eps": 1e-6}, "trainer": {"grad_clip": 0.5}},
        ),
        (
            "axolotl",
            {"early_stopping_patience": 3, "val_set_size": 0.1, "eval_steps": 20},
            {"evaluate": {"every": 20}, "trainer": {"early_stopping": {"patience": 3}}},
        ),
        ("axolotl", {"eval_steps": 0.1, "val_set_size": 0.1}, {"evaluate": {"every": "10%"}}),
        ("axolotl", {"evals_per_epoch": 4, "val_set_size": 0.1}, {"evaluate": {"every": "0.25 epoch"}}),
        ("axolotl", {"eval_strategy": "epoch", "val_set_size": 0.1}, {"evaluate": {"every": "1 epoch"}}),
        ("axolotl", {"saves_per_epoch": 1, "eval_strategy": "no", "val_set_size": 0.1}, {"evaluate": {"every": 0}}),
        (
            "llama-factory",
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "use_rslora": True},
            {"method": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "rslora": True}},
        ),
        ("llama-factory", {"mask_history": True}, {"task": {"turns": "last"}}),
        ("llama-factory", {"template": "alpaca"}, {"model": {"prompt_template": "alpaca"}}),
        (
            "llama-factory",
            {"template": "llama3", "flash_attn": "sdpa"},
            {"model": {"chat_template": "llama3", "attention": "sdpa"}},
        ),
        (
            "llama-factory",
            {"packing": True, "val_size": 0.1, "save_steps": 10, "save_total_limit": 3},
            {"data": {"split": {"validation": 0.1}}, "checkpoint": {"every": 10, "keep": 3}},
        ),
        (
            "trl",
            {
                "packing": True,
                "max_length": 512,
                "assistant_only_loss": True,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            },
            {"data": {"max_length": 512}, "schedule": {"min_lr_ratio": 0.1}},
        ),
        (
            "trl",
            {"dataset_text_field": "body", "optim": "sgd"},
            {"data": {"format": "text", "columns": {"text": "body"}}},
        ),
        (
            "trl",
            {"dtype": "float16", "report_to": "wandb", "run_name": "r"},
            {"trainer": {"precision": "fp16"}, "tracking": {"wandb": {"mode": "online"}}, "run": {"name": "r"}},
        ),
        (
            "trl",
            {"datasets": [{"path": "a/b", "name": "x", "split": "s"}, {"path": "c/b"}]},
            {"data": {"mixture": {"b_s": {"path": "a/b:s", "subset": "x"}, "b": {"path": "c/b"}}}},
        ),
        (
            "trl",
            {"auto_find_batch_size": True, "per_device_train_batch_size": 32},
            {"trainer": {"micro_batch_size": "auto", "global_batch_size": 32}},
        ),
        (
            "axolotl",
            {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "auto_find_batch_size": True},
            {"trainer": {"micro_batch_size": "auto", "global_batch_size": 8}},
        ),
        ("axolotl", {}, {"trainer": {"length_grouping": False}, "data": {"clean": {"duplicates": "keep"}}}),
        ("llama-factory", {}, {"trainer": {"length_grouping": False}}),
        ("trl", {}, {"trainer": {"length_grouping": False}}),
        # The optimizer's usual rate is written too: without one, the method's is filled in.
        ("axolotl", {"adapter": "lora", "learning_rate": 2e-5}, {"optimizer": {"lr": 2e-5}}),
        ("trl", {"use_peft": True}, {"optimizer": {"lr": 2e-5}}),
        ("trl", {"neftune_noise_alpha": 5}, {"model": {"neftune_alpha": 5.0}}),
    ],
)
def test_values(tool, keys, expected):
    tree, _ = values(tool, **keys)

    def within(part: Any, whole: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                within(value, whole[key])
        else:
            assert part == whole

    within(expected, tree)


@pytest.mark.parametrize(
    ("tool", "keys", "dropped", "kind"),
    [
        ("axolotl", {"made_up": 3}, "made_up", NOT_SUPPORTED),
        ("axolotl", {"lora_rr": 3}, "lora_rr", NOT_SUPPORTED),
        (
            "axolotl",
            {"datasets": [{"path": "a", "type": "dan"}, {"path": "b", "type": "alpaca"}]},
            "datasets",
            NOT_SUPPORTED,
        ),
        (
            "axolotl",
            {"datasets": [{"path": "a", "type": "completion"}, {"path": "b", "type": "alpaca"}]},
            "datasets",
            DIFFERENT,
        ),
        ("axolotl", {"val_set_size": 500}, "val_set_size", DIFFERENT),
        ("axolotl", {"num_epochs": 0.5}, "num_epochs", DIFFERENT),
        ("axolotl", {"group_by_length": True, "sample_packing": True}, "group_by_length", MEANINGLESS),
        ("axolotl", {"lr_scheduler": "one_cycle"}, "lr_scheduler", NOT_SUPPORTED),
        ("axolotl", {"optimizer": "ao_adamw_fp8"}, "optimizer", NOT_SUPPORTED),
        ("axolotl", {"deepspeed": {"zero_optimization": {}}}, "deepspeed", NOT_SUPPORTED),
        ("axolotl", {"fsdp": ["full_shard"]}, "fsdp", DIFFERENT),
        ("axolotl", {"eval_steps": 50}, "eval_steps", MEANINGLESS),
        ("axolotl", {"eval_steps": 50, "eval_strategy": "epoch", "val_set_size": 0.1}, "eval_steps", MEANINGLESS),
        (
            "axolotl",
            {"load_best_model_at_end": True, "eval_strategy": "no", "val_set_size": 0.1},
            "load_best_model_at_end",
            MEANINGLESS,
        ),
        ("axolotl", {"lr_scheduler": "constant", "cosine_min_lr_ratio": 0.1}, "cosine_min_lr_ratio", MEANINGLESS),
        ("llama-factory", {"finetuning_type": "freeze"}, "finetuning_type", NOT_SUPPORTED),
        ("llama-factory", {"quantization_bit": 8}, "quantization_bit", NOT_SUPPORTED),
        ("llama-factory", {"template": "default"}, "template", NOT_SUPPORTED),
        ("trl", {"load_in_4bit": True}, "load_in_4bit", NOT_SUPPORTED),
        ("llama-factory", {"dataset": "one,two"}, "dataset", DIFFERENT),
        ("trl", {"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1", MEANINGLESS),
        ("trl", {"lora_r": 8}, "lora_r", MEANINGLESS),
        ("trl", {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup_ratio", MEANINGLESS),
    ],
)
def test_keys_that_cannot_be_carried(tool, keys, dropped, kind):
    _, found = values(tool, **keys)
    assert found.dropped[dropped].kind == kind
    assert ("did you mean lora_r?" in found.dropped[dropped].reason) == (dropped == "lora_rr")


@pytest.mark.parametrize(("part", "rounded"), [(0.5, "rounded up to one"), (2.5, "rounded down")])
def test_a_part_of_an_epoch(part, rounded):
    tree, found = values("axolotl", num_epochs=part)
    assert tree["trainer"].get("epochs", 1) == max(1, int(part))
    assert rounded in found.dropped["num_epochs"].reason


def test_settings_of_validation_rows_that_are_lost_are_named():
    training = {"path": "org/rows", "type": "chat_template", "name": "small", "revision": "v1"}
    other = {"path": "org/held", "type": "completion", "name": "large", "revision": "v2", "field": "body"}
    experiment, found = values("axolotl", test_datasets=[other], datasets=[training])
    assert experiment["data"]["validation"] == "org/held"
    lost = found.dropped["test_datasets"]
    assert lost.kind == DIFFERENT
    for text in ("format (text)", "columns ({'text': 'body'})", "subset (large)", "revision (v2)"):
        assert f"its {text}" in lost.reason
    assert "data.subset=small" in lost.reason
    _, found = values("axolotl", test_datasets=[{**training, "split": "test"}], datasets=[training])
    assert "test_datasets" not in found.dropped, "both are read alike"
    # Beside a mixture there are the defaults only.
    _, found = values("axolotl", datasets=[training, {**training, "path": "org/more"}], test_datasets=[training])
    assert "subset (small)" in found.dropped["test_datasets"].reason


def test_every_lost_data_set_is_named():
    _, found = values("llama-factory", dataset="one,two")
    assert "one:" in found.dropped["dataset"].reason
    assert "two:" in found.dropped["dataset"].reason
    assert [problem.where for problem in found.problems] == ["data.train"]


def test_a_secret_is_not_repeated():
    _, found = values("trl", hub_token="hf_abc")
    assert "hf_abc" not in json.dumps(found.text) + str(found.dropped)


@pytest.mark.parametrize(
    ("tool", "keys", "key"),
    [
        ("axolotl", {"rl": "ppo"}, "rl"),
        ("axolotl", {"process_reward_model": True}, "process_reward_model"),
        ("llama-factory", {"stage": "ppo"}, "stage"),
        ("llama-factory", {"stage": "dpo", "pref_loss": "hinge"}, "pref_loss"),
        ("trl", {"beta": 0.1}, "beta"),
        ("trl", {"max_prompt_length": 512}, "max_prompt_length"),
        ("trl", {"loss_type": "hinge"}, "loss_type"),
        ("trl", {"loss_type": "dapo"}, "loss_type"),
        ("trl", {"trainer": "grpo", "loss_type": "sapo"}, "loss_type"),
        ("trl", {"trainer": "dpo", "loss_type": ["sigmoid", "ipo"]}, "loss_type"),
        ("trl", {"trainer": "kto", "loss_type": "apo_zero_unpaired"}, "loss_type"),
    ],
)
def test_another_kind_of_training_is_refused(tool, keys, key):
    with pytest.raises(UserError) as error:
        values(tool, **keys)
    assert error.value.problems[0].where == key


GRPO = {
    "num_generations": 4,
    "max_completion_length": 64,
    "reward_funcs": ["accuracy_reward", "think_format_reward"],
    "reward_weights": [1.0, 0.5],
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "beta": 0.0,
    "epsilon_high": 0.28,
    "num_iterations": 2,
    "temperature": 0.9,
    "mask_truncated_completions": True,
    "use_vllm": True,
    "vllm_mode": "colocate",
}


@pytest.mark.parametrize("tool", ["trl", "axolotl"])
def test_grpo_is_reinforcement(tool, tmp_path):
    if tool == "trl":
        keys = {**GRPO, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    else:
        keys = {"rl": "grpo", "trl": GRPO, "micro_batch_size": 8, "gradient_accumulation_steps": 2}
    _, found = values(tool, **keys)
    config = configuration(found.text, tmp_path)
    task = config.task
    assert found.problems == []
    assert (task.name, task.loss.name, task.samples, task.max_new_tokens) == ("reinforcement", "dr_grpo", 4, 64)
    assert (task.rewards, task.reward_weights) == (["boxed_answer", "reasoning_format"], [1.0, 0.5])
    assert (task.clip, task.updates, task.temperature, task.mask_truncated) == ((0.2, 0.28), 2, 0.9, True)
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (8, 4), "16 completions of 4 prompts"
    assert not [name for name, dropped in found.dropped.items() if dropped.kind == "not supported"]


def test_what_grpo_has_of_your_own_is_named():
    keys = {**GRPO, "reward_funcs": ["mine.correct", "org/judge"], "top_p": 0.9, "sync_ref_model": True}
    _, found = values("trl", **keys)
    assert "@dstune.reward" in found.dropped["reward_funcs"].reason
    assert "task.temperature" in found.dropped["top_p"].reason
    assert "sync_ref_model" in found.dropped
    assert "reward_models:\n  - org/judge" in found.text


@pytest.mark.parametrize(
    ("functions", "weights", "expected"),
    [
        (["org/judge", "accuracy_reward"], [0.3, 0.7], ["reward_weights:\n  - 0.7\n  - 0.3"]),
        (["accuracy_reward", "org/judge"], [0.3, 0.7], ["reward_weights:\n  - 0.3\n  - 0.7"]),
        (["accuracy_reward"], [0.3, 0.7], []),
    ],
)
def test_a_weight_stays_with_its_reward(functions, weights, expected):
    _, found = values("trl", **{**GRPO, "reward_funcs": functions, "reward_weights": weights})
    assert [text for text in expected if text not in found.text] == []
    assert ("reward_weights" in found.dropped) == (not expected)


def test_a_reward_model_of_its_own_key_is_weighed_first():
    keys = {"reward_model_name_or_path": "judge", "reward_funcs": ["accuracy_reward"], "reward_weights": [0.3, 0.7]}
    _, found = values("trl", **{**GRPO, **keys})
    assert "reward_models:\n  - judge" in found.text
    assert "reward_weights:\n  - 0.7\n  - 0.3" in found.text


@pytest.mark.parametrize("tool", [axolotl, llama_factory, trl])
def test_defaults_of_a_tool_are_in_its_table(tool):
    raws: list[dict[str, Any]] = [{}, *({"rl": loss} for loss in axolotl.LOSSES)]
    raws += [{"stage": stage} for stage in llama_factory.TASKS] if tool is llama_factory else []
    raws += [{"trainer": name} for name in trl.SUPPORTED] if tool is trl else []
    for raw in raws:
        assert set(tool.defaults(raw)) <= set(tool.TABLE)


ROWS = "--model_name_or_path m --dataset_name rows.jsonl --output_dir out"


@pytest.mark.parametrize(
    ("command", "task", "values_of_task", "rate"),
    [
        (f"trl sft {ROWS}", "chat", {"train_on_prompt": True}, 2e-5),
        (f"trl dpo {ROWS}", "preference", {"loss": "dpo", "beta": 0.1}, 1e-6),
        (f"trl dpo {ROWS} --loss_type ipo --beta 0.4", "preference", {"loss": "ipo", "beta": 0.4}, 1e-6),
        (f"trl dpo {ROWS} --label_smoothing 0.1", "preference", {"loss": "dpo", "label_smoothing": 0.1}, 1e-6),
        (f"uv run trl kto {ROWS} --desirable_weight 0.5", "preference", {"loss": "kto", "beta": 0.1}, 1e-6),
        (f"trl reward {ROWS}", "reward", {}, 1e-4),
        (
            f"accelerate launch --config_file z.yaml trl/scripts/dpo.py {ROWS}",
            "preference",
            {"loss": "dpo", "beta": 0.1},
            1e-6,
        ),
        (f"torchrun --nproc_per_node 2 examples/run_dpo_vlm.py {ROWS}", "preference", {"loss": "dpo"}, 1e-6),
        (f"python -m trl.scripts.kto {ROWS}", "preference", {"loss": "kto"}, 1e-6),
        (f"python examples/scripts/orpo.py {ROWS}", "preference", {"loss": "orpo", "beta": 0.1}, 1e-6),
        (f"python reward_modeling.py {ROWS}", "reward", {}, 1e-4),
        (f"python train.py {ROWS}", "chat", {}, 2e-5),
        (f"python train.py {ROWS} --loss_type sigmoid", "preference", {"loss": "dpo"}, 1e-6),
        (f"python train.py {ROWS} --undesirable_weight 2", "preference", {"loss": "kto"}, 1e-6),
    ],
)
def test_a_command_trains_what_its_name_says(command, task, values_of_task, rate, tmp_path):
    found = convert(of_command(command.replace("--config_file z.yaml ", ""), "x.sh"), "trl", Path("x.sh"))
    assert found.problems == []
    config = configuration(found.text, tmp_path)
    assert config.task.name == task
    for key, value in values_of_task.items():
        actual = getattr(config.task, key)
        assert getattr(actual, "name", actual) == value, key
    assert config.optimizer.lr == rate
    assert config.data.max_length == 1024


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((f"trl {name} {ROWS}", name) for name in ("rloo", "gkd", "ppo", "nash_md", "xpo", "online_dpo")),
        (f"accelerate launch trl/scripts/rloo.py {ROWS}", "rloo"),
        (f"accelerate launch --num_processes 2 examples/scripts/dpo_online.py {ROWS}", "dpo_online"),
        (f"python -m trl.scripts.rloo {ROWS}", "rloo"),
        (f"trl vllm-serve {ROWS}", "vllm_serve"),
    ],
)
def test_a_command_of_an_online_trainer_is_refused_by_its_name(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.sh").write_text(command)
    assert main(["import", "a.sh"]) == 2
    assert f"{name} is not supported" in capsys.readouterr().err


def test_the_configuration_of_a_command_is_read_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "dpo.yaml").write_text(
        "model_name_or_path: m\ndataset_name: rows.jsonl\nlearning_rate: 0.1\n"
    )
    (tmp_path / "scripts" / "a.sh").write_text("trl dpo --config dpo.yaml --learning_rate 0.2\n")
    assert main(["import", "scripts/a.sh"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert {"override /task": "preference"} in tree["defaults"]
    assert (tree["model"]["path"], tree["optimizer"]["lr"]) == ("m", 0.2)
    (tmp_path / "scripts" / "dpo.yaml").unlink()
    assert main(["import", "scripts/a.sh"]) == 2


@pytest.mark.parametrize(("trainer", "code"), [("dpo", 0), ("kto", 0), ("rloo", 2)])
def test_the_trainer_of_a_file_can_be_given(trainer, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\ndataset_name: rows.jsonl\nbeta: 0.2\n")
    assert main(["import", "a.yaml"]) == 2
    capsys.readouterr()
    assert main(["import", "a.yaml", "--trainer", trainer]) == code
    if code == 0:
        tree = yaml.safe_load(capsys.readouterr().out)
        assert tree["task"]["beta"] == 0.2 and tree["task"].get("loss", "dpo") == trainer


@pytest.mark.parametrize(
    ("keys", "task", "data"),
    [
        (
            {"rl": "dpo", "rl_beta": 0.2},
            {"name": "preference", "loss": "dpo", "beta": 0.2},
            {
                "path": "a/b",
                "type": "chat_template.default",
                "field_messages": "conversation",
                "field_chosen": "chosen",
                "roles": {"user": ["user"]},
                "message_property_mappings": {"role": "role", "content": "content"},
            },
        ),
        ({"rl": "dpo"}, {"loss": "dpo", "beta": 0.1}, {"path": "a/b", "type": "chatml.intel"}),
        (
            {"rl": "kto", "kto_desirable_weight": 0.2, "micro_batch_size": 2},
            {"loss": "kto", "desirable_weight": 0.2},
            {"path": "a/b", "type": "llama3.ultra"},
        ),
        ({"rl": "simpo"}, {"loss": "simpo", "beta": 0.1, "gamma": 0.5}, {"path": "a/b", "type": "chatml.ultra"}),
        (
            {"rl": "orpo", "orpo_alpha": 0.3},
            {"loss": "orpo", "beta": 0.3},
            {"path": "a/b", "type": "chat_template.argilla"},
        ),
        ({"reward_model": True}, {"name": "reward"}, {"path": "a/b", "type": "bradley_terry.chat_template"}),
    ],
)
def test_axolotl_preferences(keys, task, data, tmp_path):
    _, found = values("axolotl", **keys, datasets=[data])
    assert found.problems == []
    assert not set(found.dropped) & {*keys, "datasets"}
    config = configuration(found.text, tmp_path)
    for key, value in task.items():
        actual = getattr(config.task, key)
        assert getattr(actual, "name", actual) == value, key
    roles = {"chat_template.default": {"prompt": "conversation"}, "chatml.intel": {"prompt": "question"}}
    assert config.data.columns == roles.get(data["type"], {})


@pytest.mark.parametrize(
    ("keys", "task", "form", "columns"),
    [
        ({"stage": "dpo"}, {"loss": "dpo", "beta": 0.1}, "preference", {"prompt": "conversations"}),
        (
            {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0},
            {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
            "preference",
            {"prompt": "conversations"},
        ),
        ({"stage": "rm"}, {"name": "reward"}, "preference", {"prompt": "conversations"}),
        (
            {"stage": "kto", "kto_rejected_weight": 2},
            {"loss": "kto", "undesirable_weight": 2.0},
            "feedback_messages",
            {"label": "kto_tag"},
        ),
    ],
)
def test_llama_factory_preferences(keys, task, form, columns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    judged = {"messages": "messages", "kto_tag": "kto_tag"}
    described = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": pairs},
        "judged": {"file_name": "judged.json", "formatting": "sharegpt", "columns": judged},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    names = ("judged", "pairs") if keys["stage"] == "kto" else ("pairs", "judged")
    _, found = values("llama-factory", **keys, dataset=names[0])
    assert found.problems == []
    assert not set(found.dropped) & {*keys, "dataset"}
    config = configuration(found.text, tmp_path)
    for key, value in task.items():
        actual = getattr(config.task, key)
        assert getattr(actual, "name", actual) == value, key
    assert (config.data.format, config.data.columns, config.data.packing) == (form, columns, False)
    _, found = values("llama-factory", **keys, dataset=names[1])
    assert ("dataset" in found.dropped) == (keys["stage"] != "kto" or names[1] == "pairs")


def test_alpaca_rows_of_axolotl_are_written_as_its_plain_prompt():
    alpaca, turns = {"path": "a/b", "type": "alpaca"}, {"path": "a/c", "type": "chat_template"}
    tree, _ = values("axolotl", datasets=[alpaca])
    assert tree["model"]["prompt_template"] == "alpaca"
    tree, found = values("axolotl", datasets=[alpaca], chat_template="chatml")
    assert tree["model"] == {"path": "m", "prompt_template": "alpaca"}
    assert found.problems == []
    for datasets in ([alpaca, turns], [{**alpaca, "type": "alpaca:chatml"}]):
        tree, found = values("axolotl", datasets=datasets)
        assert "prompt_template" not in tree["model"]
        assert any("Alpaca" in text for text in found.assumed)


def test_a_command_with_an_accelerate_file():
    raw = of_command(
        "accelerate launch --config_file ds.yaml --num_processes 4 \\\n  trl/scripts/sft.py --model_name_or_path m "
        "--dataset_name d --learning_rate=1e-4 --use_peft --report_to wandb tensorboard  # comment\n",
        "x.sh",
    )
    assert raw == {
        "trainer": "sft",
        "config_file": "ds.yaml",
        "num_processes": 4,
        "model_name_or_path": "m",
        "dataset_name": "d",
        "learning_rate": "1e-4",
        "use_peft": True,
        "report_to": ["wandb", "tensorboard"],
    }
    found = convert(raw, "trl", Path("x.sh"))
    tree = yaml.safe_load(found.text)
    assert tree["zero"]["path"] == "ds.yaml"
    assert (tree["trainer"]["global_batch_size"], tree["optimizer"]["lr"]) == (32, 1e-4)


def test_variables_of_a_shell_are_not_carried():
    raw = of_command(
        """python sft.py --model_name_or_path $MODEL --run_name "a-${NAME}" --num_processes $(nproc) --learning_rate=$LR \\
        --chat_template '$x.jinja' --output_dir "out'$OUT'" --report_to wandb $TRACKER --dataset_name \\$rows \\
        --use_peft $MORE --bf16 "${ALL[@]}" "$@" # $X""",
        "x.sh",
    )
    found = convert(raw, "trl", Path("x.sh"))
    variables = {"model_name_or_path", "run_name", "num_processes", "learning_rate", "output_dir", "$TRACKER", "$MORE"}
    assert {key for key, dropped in found.dropped.items() if "variable of the shell" in dropped.reason} == variables
    assert found.dropped["model_name_or_path"].value == "$MODEL"
    tree = yaml.safe_load(found.text)
    assert (tree["model"], tree["data"]["train"]) == ({"chat_template": "$x.jinja"}, "$rows")
    assert tree["optimizer"]["lr"] == 2e-5, "TRL's own, as without the argument"
    assert {"override /method": "lora"} in tree["defaults"] and tree["trainer"]["precision"] == "bf16"
    assert convert({"model_name_or_path": "$MODEL"}, "trl", Path("x.yaml")).carried["model_name_or_path"]


# ---- the verb ----


def test_the_verb_writes_an_experiment_that_trains_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = EXAMPLES / "axolotl" / "llama3_qlora_1b.yaml"
    assert main(["import", str(source), "--output", "mine/experiment/qlora.yaml", "--ranks", "2"]) == 0
    report = capsys.readouterr().out
    assert "dataset_prepared_path: last_run_prepared" in report
    assert "next: dstune train --config-dir mine experiment=qlora" in report
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


def test_columns_of_a_described_data_set_are_carried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "instructions", "tools": "functions"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": described}))
    tree, _ = values("llama-factory", dataset="mine")
    assert tree["data"]["columns"] == {"conversations": "turns", "system": "instructions", "tools": "functions"}


def test_settings_of_a_described_data_set_that_are_lost_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = {"hf_hub_url": "org/rows", "subset": "en", "folder": "math", "columns": {"prompt": "q", "response": "a"}}
    described = {
        "training": training,
        "alike": {**training, "split": "test", "num_samples": 50},
        "other": {"hf_hub_url": "org/held", "subset": "de"},
        "turns": {"hf_hub_url": "org/turns", "formatting": "sharegpt"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    _, found = values("llama-factory", dataset="training", eval_dataset="other")
    assert "its folder (math)" in found.dropped["dataset"].reason
    lost = found.dropped["eval_dataset"]
    assert lost.kind == DIFFERENT
    assert "its subset (de)" in lost.reason
    assert "its columns ({})" in lost.reason
    _, found = values("llama-factory", dataset="turns", eval_dataset="training")
    assert "its format (alpaca); it is read with data.format=conversations" in found.dropped["eval_dataset"].reason
    _, found = values("llama-factory", dataset="turns", eval_dataset="turns")
    assert "eval_dataset" not in found.dropped, "both are read alike"
    tree, _ = values("llama-factory", dataset="training", eval_dataset="alike")
    assert tree["evaluate"]["max_rows"] == 50


def test_llama_factory_with_images(tmp_path):
    described = {
        "charts": {
            "file_name": "charts.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "pictures"},
            "tags": {"role_tag": "role"},
        }
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    (tmp_path / "charts.json").write_text("[]")
    raw = {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "template": "qwen2_vl"}
    raw |= {"dataset": "charts", "dataset_dir": str(tmp_path), "media_dir": "/media", "freeze_vision_tower": False}
    found = yaml.safe_load(convert(raw, "llama-factory", Path("x.yaml"), 1).text)
    assert found["data"]["columns"] == {"images": "pictures"}
    assert found["data"]["image_folder"] == "/media"
    assert found["model"]["train_vision"] is True
