"""The README's first command on few rows, and architectures whose attention transformers has in one way only."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import Commands, metrics, result
from support.printed_commands import printed
from support.tiny import SPECIAL, WORDS, save_decoder, save_tokenizer


def write_chats(path: Path, rows: int) -> None:
    """Different ones, whose answers repeat the last word of the question."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            words = [WORDS[20 + number // 20], WORDS[40 + number % 20], draw.choice(WORDS[:8])]
            turns = [("user", " ".join(words)), ("assistant", " ".join(words[-1:] * 3))]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    commands = Commands(tmp_path_factory.mktemp("few"))
    save_decoder(commands.folder / "model")
    write_chats(commands.folder / "chats.jsonl", 300)
    return commands


def test_the_first_command_on_300_chats_learns_saves_evaluates_and_says_what_it_did(workplace: Commands) -> None:
    recipe = ["experiment=chat_lora", "model.path=model", "data.train=chats.jsonl", "run.dir=runs/mine"]
    longer = ["trainer.epochs=4", "optimizer.lr=2e-2", "launch.processes=2"]  # of a model of 30,000 weights
    done = workplace.run("train", *recipe, *longer)
    assert done.returncode == 0, done.stderr
    run = workplace.folder / "runs" / "mine"
    said = done.stdout + done.stderr
    found = result(run)
    assert found["steps"] < 20
    assert f"this run has only {found['steps']} optimizer step" in said
    assert "rows -> " in said and "packed rows" in said and "trainer.epochs=" in said
    evaluated = [row["step"] for row in metrics(run) if "eval/loss" in row]
    assert evaluated == [0, *range(5, found["steps"], 5), found["steps"]], "not after each step of a short run"
    assert (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("*/COMMITTED"))
    assert (run / "export" / "adapter_config.json").is_file()
    assert found["eval_final"]["loss"] < 0.9 * found["eval_initial"]["loss"]
    assert found["best"]["value"] <= found["eval_final"]["loss"]
    content = yaml.safe_load((run / "run.yaml").read_text())
    assert content["config"]["zero"]["stage"] == 2  # of the experiment


def test_what_is_left_out_is_chosen_reported_and_kept(workplace: Commands) -> None:
    few = ["model.path=model", "data.train=chats.jsonl", "method=lora", "trainer.max_steps=2", "data.max_rows=40"]
    done = workplace.run("train", *few, "run.dir=runs/chosen", "launch.processes=1", "evaluate.at_start=false")
    assert done.returncode == 0, done.stderr
    path = workplace.folder / "runs" / "chosen" / "run.yaml"
    content = yaml.safe_load(path.read_text())
    assert content["config"]["optimizer"]["lr"] == 2e-4
    assert content["origins"]["optimizer.lr"] == "the default of method=lora"
    stage = content["config"]["zero"]["stage"]
    assert stage in (0, 1) and "fit by the plan" in content["origins"]["zero.stage"]
    assert f"zero.stage={stage}: {content['origins']['zero.stage']}" in done.stderr
    assert "optimizer.lr=0.0002: the default of method=lora" in done.stderr
    again = workplace.run("train", "runs/chosen", "trainer.max_steps=3")
    assert again.returncode == 0, again.stderr
    kept = yaml.safe_load(path.read_text())
    assert kept["origins"] == content["origins"]
    assert kept["config"]["zero"] == content["config"]["zero"]


SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


@pytest.mark.parametrize("kind", SIZES)
def test_attention_auto_trains_architectures_without_sdpa(kind: str, workplace: Commands) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = workplace.folder / kind
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(SPECIAL) + len(WORDS), bos_token_id=1, eos_token_id=4, pad_token_id=2, **SIZES[kind]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    settings = ["trainer.max_steps=2", "data.max_length=64", "data.packing=false", "launch.processes=1"]
    done = workplace.run("train", f"model.path={kind}", "data.train=chats.jsonl", f"run.dir=runs/{kind}", *settings)
    assert done.returncode == 0, done.stderr
    assert all(row["loss"] > 0 for row in metrics(workplace.folder / "runs" / kind) if "loss" in row)


def test_the_commands_that_init_and_the_end_of_its_run_print_work(workplace: Commands) -> None:
    small = ["model.path=model", "data.max_rows=40", "trainer.max_steps=2", "trainer.micro_batch_size=2"]
    done = workplace.run("init", "chats.jsonl", *small, "--output", "mine of chats.yaml")
    assert done.returncode == 0, done.stderr
    commands = printed(done.stdout)
    assert [words[0] for words in commands] == ["data", "plan", "train"]
    for words in commands:
        done = workplace.run(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    generate, serve = printed(done.stdout)
    done = workplace.run(*generate, "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert serve == ["serve", generate[1]]
