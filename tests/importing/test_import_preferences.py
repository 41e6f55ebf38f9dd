"""Preferences, rewards and reinforcement of other tools."""

from __future__ import annotations

import json

import pytest
from support.imports import configuration, values


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
        keys = {**GRPO, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations_eval": 2}
    else:
        keys = {"rl": "grpo", "trl": GRPO, "micro_batch_size": 8, "gradient_accumulation_steps": 2}
    _, found = values(tool, **keys)
    config = configuration(found.text, tmp_path)
    task = config.task
    assert found.problems == []
    assert (task.name, task.loss.name, task.samples, task.max_new_tokens) == ("reinforcement", "dr_grpo", 4, 64)
    assert task.evaluation_samples == (2 if tool == "trl" else 1)
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
