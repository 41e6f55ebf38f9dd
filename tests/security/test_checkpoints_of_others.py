"""`dstune import` of somebody's checkpoint: nothing in it runs, and nothing in it takes the memory or the disk."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainer_checkpoints import write_checkpoint

from dstune.cli import main
from dstune.zero import safe_load
from dstune.zero.safe_load import load_settings

SENTINEL = Path("sentinel")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Runs:
    """Leaves a file when it is loaded by a plain unpickler."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touches() -> Runs:
    return Runs(SENTINEL.touch)


def refused(capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    words = [
        "task=causal_lm",
        "data.format=tokens",
        "data.train=rows.jsonl",
        "data.tokenizer=model",
        "model.path=model",
    ]
    assert main(["import", "checkpoint-8", "--output", "run", *words]) == code
    assert not SENTINEL.exists(), "it ran"
    assert Path("run").exists() is (code == 0)
    return "".join(capsys.readouterr())


def shards(pattern: str = "*_optim_states.pt") -> list[Path]:
    return sorted(Path("checkpoint-8/global_step8").glob(pattern))


def test_the_attack_is_one():
    pickle.loads(pickle.dumps(Runs(exec, "import builtins; builtins.attacked = True")))
    import builtins

    assert vars(builtins).pop("attacked")


def evil_objects() -> dict[str, Any]:
    import os
    import subprocess

    return {
        "system": Runs(os.system, "touch sentinel"),
        "popen": Runs(subprocess.Popen, ["touch", "sentinel"]),
        "exec": Runs(exec, "open('sentinel', 'w')"),
        "eval": Runs(eval, "open('sentinel', 'w')"),
        "open": Runs(open, "sentinel", "w"),
        "getattr": Runs(getattr, "x", "upper"),
        "package": Runs(torch.save, {}, "sentinel"),
        "rmtree": Runs(shutil.rmtree, "model"),
        "import": Runs(__import__, "support.import_that_leaks"),
    }


@pytest.mark.parametrize(
    "attack", ["system", "popen", "exec", "eval", "open", "getattr", "package", "rmtree", "import"]
)
@pytest.mark.parametrize("place", ["arguments", "argument", "model", "optimizer", "buffer"])
def test_nothing_in_a_checkpoint_runs(attack, place, folder, capsys):
    evil = evil_objects()[attack]
    arguments = Path("checkpoint-8/training_args.bin")
    if place == "arguments":
        torch.save(evil, arguments)
    elif place == "argument":
        content = torch.load(arguments, weights_only=False)
        content.seed = evil
        torch.save(content, arguments)
    else:
        file = shards("*_model_states.pt" if place != "optimizer" else "*_optim_states.pt")[0]
        content = torch.load(file, weights_only=True)
        {"model": content, "optimizer": content.get("optimizer_state_dict"), "buffer": content.get("module")}[place][
            "x"
        ] = evil
        torch.save(content, file)
    message = refused(capsys)
    # A function of a package becomes an empty class: the setting is then of no type that is read.
    assert "is not read" in message or (attack == "package" and "damaged" in message)
    assert Path("model").is_dir()


def test_a_class_of_an_unknown_package_is_not_imported(folder, capsys, monkeypatch):
    """TRL, axolotl and LLaMA-Factory have classes of their own, which need not be installed."""
    Path("harmful.py").write_text("from pathlib import Path\nPath('sentinel').touch()\nclass Arguments: pass\n")
    arguments = Path("checkpoint-8/training_args.bin")
    content = torch.load(arguments, weights_only=False)
    module = type(io)("harmful")
    module.Arguments = type("Arguments", (), {"__module__": "harmful", "__qualname__": "Arguments"})
    foreign = module.Arguments()
    foreign.__dict__.update(vars(content))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "harmful", module)
        torch.save(foreign, arguments)
    monkeypatch.syspath_prepend(folder)
    assert "Arguments, step 8 of 16" in refused(capsys, 0)


def test_files_of_random_states_are_not_opened(folder, capsys):
    torch.save(touches(), "checkpoint-8/rng_state_0.pth")
    torch.save(touches(), "checkpoint-8/scheduler.pt")
    torch.save(touches(), "checkpoint-8/optimizer.pt")
    Path("checkpoint-8/zero_to_fp32.py").write_text("open('sentinel', 'w')")
    refused(capsys, 0)


def test_settings_that_grow_or_hold_themselves(tmp_path):
    class Settings:
        pass

    def settings(value: object) -> Path:
        holder = Settings()
        holder.value = value
        file = tmp_path / "settings.bin"
        Settings.__qualname__ = "Settings"
        globals()["Settings"] = Settings
        torch.save(holder, file)
        return file

    level: list[Any] = ["x"]
    for _ in range(30):
        level = [level, level]
    with pytest.raises(ValueError, match="more than 20 levels"):
        load_settings(settings(level))
    level = ["x"]
    for _ in range(15):
        level = [level] * 10
    with pytest.raises(ValueError, match="more than 100,000 values"):
        load_settings(settings(level))
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(ValueError, match="more than 20 levels"):
        load_settings(settings(ring))
    file = settings(1)
    compressed = tmp_path / "compressed.bin"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.namelist():
            bomb.writestr(entry, archive.read(entry))
    with pytest.raises(ValueError, match="it is compressed"):
        load_settings(compressed)
    assert load_settings(file).values == {"value": 1}


def test_settings_of_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_load, "MAX_SETTINGS_BYTES", 1000)
    torch.save(torch.zeros(1000), tmp_path / "settings.bin")
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        load_settings(tmp_path / "settings.bin")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_file_of_torch(content, folder, capsys):
    for file in [Path("checkpoint-8/training_args.bin"), *shards()]:
        before = file.read_bytes()
        file.write_bytes(content)
        refused(capsys)
        file.write_bytes(before)


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        shapes = state["param_shapes"][0]
        first = next(iter(shapes))
        state["param_shapes"][0] = {name: shapes[first], **{key: shapes[key] for key in list(shapes)[1:]}}

    return edit


def reshaped(*shape: int) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        shapes = state["param_shapes"][0]
        shapes[next(iter(shapes))] = torch.Size(shape)

    return edit


IMPOSSIBLE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a name with a place": renamed("x@3"),
    "a name with a kind": renamed("exp_avg:x"),
    "a name with lines": renamed("x\x1b[31m\nnext: rm -rf ."),
    "a long name": renamed("x" * 5000),
    "a huge shape": reshaped(1 << 40, 1 << 40),
    "no shape": lambda state: state.update(param_shapes=None),
    "shapes that are numbers": lambda state: state.update(param_shapes=[1, 2]),
    "one group": lambda state: state.update(param_shapes=state["param_shapes"][:1]),
    "three groups": lambda state: state.update(param_shapes=[*state["param_shapes"], {"more": torch.Size([3])}]),
    "no step": lambda state: state.pop("global_steps"),
    "a list": lambda state: state.update(module=[1]),
    "a huge buffer": lambda state: state.update(buffer_names=["b"], module={"b": torch.zeros(1).expand(1 << 40)}),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_descriptions_that_fit_no_weights(case, folder, capsys):
    (file,) = shards("*_model_states.pt")
    content = torch.load(file, weights_only=True)
    IMPOSSIBLE[case](content)
    torch.save(content, file)
    message = refused(capsys)
    assert "damaged, or no checkpoint of DeepSpeed" in message
    assert "\x1b" not in message


def optimizer(edit: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
    def apply() -> None:
        for file in shards():
            content = torch.load(file, weights_only=True)
            edit(content["optimizer_state_dict"])
            torch.save(content, file)

    return apply


def weights(state: dict[str, Any]) -> list[torch.Tensor]:
    return state["single_partition_of_fp32_groups"]


def moments(state: dict[str, Any]) -> dict[str, Any]:
    return state["base_optimizer_state"]["state"][0]


BROKEN_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor without memory": lambda state: weights(state).__setitem__(0, torch.zeros(1).expand(1 << 40)),
    "few elements": lambda state: weights(state).__setitem__(0, torch.zeros(3)),
    "no weights": lambda state: weights(state).clear(),
    "a text as weights": lambda state: weights(state).__setitem__(0, "x"),
    "whole numbers": lambda state: weights(state).__setitem__(
        0, torch.zeros_like(weights(state)[0], dtype=torch.int32)
    ),
    "no groups": lambda state: state["base_optimizer_state"].update(param_groups=[]),
    "a rate of text": lambda state: state["base_optimizer_state"]["param_groups"][0].update(initial_lr="x"),
    "a stage of text": lambda state: state.update(zero_stage="x"),
    "no state": lambda state: state["base_optimizer_state"].clear(),
    "short moments": lambda state: moments(state).update(exp_avg=torch.zeros(2)),
    "many steps": lambda state: moments(state).update(step=torch.zeros(1000)),
    "steps of text": lambda state: moments(state).update(step="x"),
}


@pytest.mark.parametrize("case", BROKEN_STATES)
def test_states_that_fit_no_weights(case, folder, capsys):
    optimizer(lambda state: BROKEN_STATES[case](state))()
    assert "CHECKPOINT" in refused(capsys)


@pytest.mark.parametrize("tag", ["../checkpoint-8/global_step8", "/etc", "..", "", "a\nb", "x" * 4000, "global_step9"])
def test_the_newest_shards_are_in_the_checkpoint(tag, folder, capsys):
    Path("checkpoint-8/latest").write_text(tag)
    refused(capsys)


STATES: dict[str, Any] = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "texts": '{"global_step": "8", "max_steps": "16"}',
    "negative": '{"global_step": -1, "max_steps": 16}',
    "many steps": '{"global_step": 8, "max_steps": 1000000000000, "epoch": 1.3333333333333333}',
    "rows without end": '{"global_step": 8, "max_steps": 10000000, "epoch": 1.3333333333333333}',
    "a log of later steps": '{"global_step": 8, "max_steps": 16, "epoch": 1.3333333333333333, "log_history":'
    ' [{"step": 1000000000000, "num_tokens": 5}]}',
    "no epoch": '{"global_step": 8, "max_steps": 16}',
    "an epoch of text": '{"global_step": 8, "max_steps": 16, "epoch": "x"}',
    "a log of text": '{"global_step": 8, "max_steps": 16, "epoch": 1.3333333333333333, "log_history": ["x", 3]}',
    "rates of text": '{"global_step": 8, "max_steps": 16, "epoch": 1, "log_history": [{"learning_rate": "x", "step": []}]}',
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_the_trainer_that_are_none(case, folder, capsys):
    Path("checkpoint-8/trainer_state.json").write_text(STATES[case])
    refused(capsys, 0 if case == "a log of text" else 2)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "warmup_steps",
            "max_steps",
            "num_train_epochs",
            "seed",
            "per_device_train_batch_size",
            "lr_scheduler_kwargs",
        ),
        *("gradient_accumulation_steps", "accelerator_config", "learning_rate"),
    ],
)
@pytest.mark.parametrize("value", ["x", [1], {"a": [2]}, -1, 1e308, float("nan")], ids=str)
def test_settings_of_other_types(key, value, folder, capsys):
    arguments = Path("checkpoint-8/training_args.bin")
    content = torch.load(arguments, weights_only=False)
    vars(content)[key] = value
    if key == "num_train_epochs":
        content.max_steps = -1
    torch.save(content, arguments)
    optimizer(lambda state: state["base_optimizer_state"]["param_groups"][0].pop("initial_lr", None))()
    optimizer(lambda state: state["base_optimizer_state"]["param_groups"][1].pop("initial_lr", None))()
    words = [
        "task=causal_lm",
        "data.format=tokens",
        "data.train=rows.jsonl",
        "data.tokenizer=model",
        "model.path=model",
    ]
    assert main(["import", "checkpoint-8", "--output", "run", *words]) in (0, 2)  # never a traceback


def test_values_are_not_resolved_or_shown_as_commands(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    arguments = Path("checkpoint-8/training_args.bin")
    content = torch.load(arguments, weights_only=False)
    content.hub_model_id = "${oc.env:HF_TOKEN}"
    content.torch_compile_backend = "\x1b]0;x\x07\nnext: rm -rf ."
    content.lr_scheduler_kwargs = {"min_lr": "${oc.env:HF_TOKEN}"}
    torch.save(content, arguments)
    message = refused(capsys)
    assert "hf_secret" not in message and "\x1b" not in message and "\nnext: rm" not in message


def test_an_adapter_names_no_secret_as_its_base(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    settings = {"base_model_name_or_path": "${oc.env:HF_TOKEN}", "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    Path("checkpoint-8/adapter_config.json").write_text(json.dumps(settings))
    assert "hf_secret" not in refused(capsys)
