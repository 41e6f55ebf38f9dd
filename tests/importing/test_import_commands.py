"""Commands of TRL: the trainer is in the name of the program, options are keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.imports import configuration

from dstune.cli import main
from dstune.importing.convert import convert
from dstune.importing.files import of_command

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
