"""Single keys of other tools: what carries each, and what is said of those that nothing carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.imports import values

from dstune.core.errors import UserError
from dstune.importing import axolotl, llama_factory, trl
from dstune.importing.convert import convert
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED


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
        (
            "llama-factory",
            {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
            {"model": {"train_vision": True}},
        ),
        ("axolotl", {"processor_type": "AutoProcessor"}, {"model": {"train_vision": True}}),
        (
            "ms-swift",
            {"freeze_vit": False, "freeze_aligner": False, "vit_lr": 1e-6, "packing": True},
            {"model": {"train_vision": True}, "optimizer": {"vision_lr": 1e-6, "lr": 1e-4, "weight_decay": 0.1}},
        ),
        ("ms-swift", {"train_type": "full", "loss_scale": "last_round"}, {"task": {"turns": "last"}}),
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
        ("llama-factory", {"freeze_vision_tower": False}, "freeze_vision_tower", DIFFERENT),
        (
            "llama-factory",
            {"freeze_vision_tower": True, "freeze_multi_modal_projector": False},
            "freeze_multi_modal_projector",
            NOT_SUPPORTED,
        ),
        ("llama-factory", {"freeze_language_model": True}, "freeze_language_model", NOT_SUPPORTED),
        ("llama-factory", {"image_max_pixels": 589824}, "image_max_pixels", NOT_SUPPORTED),
        ("llama-factory", {"video_fps": 2}, "video_fps", NOT_SUPPORTED),
        ("axolotl", {"image_size": 512}, "image_size", NOT_SUPPORTED),
        (
            "axolotl",
            {"adapter": "lora", "lora_target_modules": r"model.language_model.layers.[\d]+.self_attn.(q|v)_proj"},
            "lora_target_modules",
            DIFFERENT,
        ),
        ("axolotl", {"skip_prepare_dataset": True}, "skip_prepare_dataset", MEANINGLESS),
        ("ms-swift", {"freeze_vit": False}, "freeze_vit", DIFFERENT),
        ("ms-swift", {"freeze_vit": False, "vit_lr": 1e-6, "aligner_lr": 1e-5}, "aligner_lr", DIFFERENT),
        ("ms-swift", {"vit_lr": 1e-6}, "vit_lr", MEANINGLESS),
        ("ms-swift", {"MAX_PIXELS": 1003520}, "MAX_PIXELS", NOT_SUPPORTED),
        ("ms-swift", {"train_type": "adalora"}, "train_type", NOT_SUPPORTED),
        ("trl", {"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs", MEANINGLESS),
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


@pytest.mark.parametrize("tool", [axolotl, llama_factory, trl])
def test_defaults_of_a_tool_are_in_its_table(tool):
    raws: list[dict[str, Any]] = [{}, *({"rl": loss} for loss in axolotl.LOSSES)]
    raws += [{"stage": stage} for stage in llama_factory.TASKS] if tool is llama_factory else []
    raws += [{"trainer": name} for name in trl.SUPPORTED] if tool is trl else []
    for raw in raws:
        assert set(tool.defaults(raw)) <= set(tool.TABLE)


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
    assert (
        "its format (alpaca) is not carried; it is read with data.format=conversations"
        in found.dropped["eval_dataset"].reason
    )
    _, found = values("llama-factory", dataset="turns", eval_dataset="turns")
    assert "eval_dataset" not in found.dropped, "both are read alike"
    tree, _ = values("llama-factory", dataset="training", eval_dataset="alike")
    assert tree["evaluate"]["max_rows"] == 50


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("llama-factory", {"freeze_vision_tower": True}),
        ("axolotl", {"processor_type": "AutoProcessor", "freeze_mm_modules": True}),
        ("axolotl", {"processor_type": "AutoProcessor", "adapter": "lora", "lora_target_modules": "language_model.*q"}),
        ("ms-swift", {"freeze_vit": True, "freeze_aligner": True}),
    ],
)
def test_a_tower_that_is_frozen_there_is_frozen_here(tool, keys):
    tree, found = values(tool, **keys)
    assert "train_vision" not in tree["model"], "the default"
    assert "model.train_vision" in {key for ours in found.carried.values() for key in ours}


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
    described["charts"] |= {"ranking": True}
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    found = yaml.safe_load(convert(raw | {"stage": "dpo"}, "llama-factory", Path("x.yaml"), 1).text)
    assert found["data"]["format"] == "preference" and found["data"]["columns"]["images"] == "pictures"
    rewarded = convert(raw | {"stage": "rm"}, "llama-factory", Path("x.yaml"), 1)
    assert "images" in rewarded.dropped["dataset"].reason


FULL = {"fsdp": "full_shard auto_wrap"}


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory", "ms-swift", "trl"])
@pytest.mark.parametrize(
    ("keys", "zero"),
    [
        ({"fsdp": "full_shard offload auto_wrap"}, "stage3_offload"),
        ({"fsdp": ["shard_grad_op", "auto_wrap"]}, "stage2"),
        ({**FULL, "fsdp_config": {"offload_params": True}}, "stage3_offload"),
        ({**FULL, "fsdp_config": {"fsdp_offload_params": "true", "fsdp_version": 2}}, "stage3_offload"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}}, "stage2"),
        ({"fsdp_config": {"fsdp_version": 2, "reshard_after_forward": False}}, "stage2"),
        ({**FULL, "fsdp_config": {"offload_params": False}}, "stage3"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True}}, "stage3_offload"),
        ({"use_fsdp": True, "fsdp_offload_params": True}, "stage3_offload"),
        ({"fsdp_sharding_strategy": 2}, "stage2"),
    ],
)
def test_the_memory_of_fsdp_is_carried(tool, keys, zero):
    tree, found = values(tool, **keys)
    assert {"override /zero": zero} in tree["defaults"], found.text
    assert not [problem for problem in found.problems if problem.where != "data.train"]  # LLaMA-Factory's rows
    for key in keys:
        assert key in found.carried or key in found.dropped
    assert all(dropped.kind != NOT_SUPPORTED for dropped in found.dropped.values())


def test_activations_of_fsdp_are_computed_again():
    tree, _ = values("trl", **FULL, fsdp_config={"activation_checkpointing": True}, gradient_checkpointing=False)
    assert tree["trainer"]["activation_checkpointing"] is True


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp": "half_shard"},
        {**FULL, "fsdp_config": "absent.json"},
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
    ],
)
def test_memory_that_is_not_carried_is_a_problem(keys):
    """With exit code 2: the run would need more memory than in the other tool."""
    _, found = values("trl", **keys)
    assert [problem.where for problem in found.problems] == [next(reversed(keys))]


def test_keys_inside_of_a_section_of_a_choice_are_carried():
    tree, found = values("trl", trainer="grpo", reward_funcs=["accuracy_reward"], beta=0.04, loss_type="grpo")
    assert tree["task"]["kl"] == {"coefficient": 0.04} and "beta" not in found.dropped
    assert found.carried["beta"] == ["task.kl.coefficient"]
    tree, found = values("axolotl", rl="grpo", trl={"beta": 0.04, "reward_funcs": ["accuracy_reward"]})
    assert tree["task"]["kl"] == {"coefficient": 0.04}, found.dropped
