"""A run directory from somebody else runs nothing, reaches nobody and resolves no variable, whatever verb reads it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.plugins import in_a_process, install
from support.tiny import save_decoder, write_dialogues

from dstune.checkpoint import store
from dstune.cli import main
from dstune.config import convert
from dstune.config.compose import compose
from dstune.config.run_file import Composed, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.launch.slurm.config import SlurmConfig
from dstune.sweep.directory import frozen, given_before

TOKEN = "hf_planted0123456789"
VERBS: dict[str, list[str]] = {
    "train": ["train", "RUN"],
    "train --cfg": ["train", "RUN", "--cfg", "job"],
    "plan": ["plan", "RUN", "hardware=8xH100"],
    "data show": ["data", "show", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "w1 w2"],
    "predict": ["predict", "RUN", "--text", "w1 w2"],
    "evaluate": ["evaluate", "RUN"],
    "export": ["export", "RUN", "--out", "OUT"],
    "upgrade": ["upgrade", "RUN"],
    "serve": ["serve", "RUN", "--port", "0"],
}
EVIL_CODE = """
import os, pathlib
pathlib.Path({sentinel!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class Evil(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def nobody_active() -> None:
    plugins._active.clear()


class Stranger:
    """Somebody who makes runs in a home of their own, and gives them to the user of this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self._patch = folder, patch
        self.sentinel = folder / "sentinel"
        self.run = folder / "run"
        self.model = save_decoder(folder / "model")
        write_dialogues(folder / "rows.jsonl", 20)
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        patch.delenv("DSTUNE_TRUST_KEY", raising=False)

    def at_home(self) -> None:
        self._patch.setenv("XDG_CONFIG_HOME", str(self.folder / "stranger"))

    def give(self, *overrides: str, **sections: object) -> Path:
        """Write the run, with a checkpoint and an export, and be the user again."""
        self.at_home()
        composed = compose([f"model.path={self.model}", "data.train=rows.jsonl", "zero=stage2", *overrides])
        config = replace(composed.config, run=replace(composed.config.run, dir=str(self.run)), **sections)
        self.run.mkdir(exist_ok=True)
        write_run(self.run / "run.yaml", Composed(config, [], composed.plugins))
        self.with_checkpoint()
        self.user()
        plugins._active.clear()
        return self.run

    def with_checkpoint(self) -> None:
        written = store.folder(self.run) / f"{store.tag(2)}{store.INCOMPLETE}"
        written.mkdir(parents=True)
        (written / "shard.pt").write_bytes(b"weights")
        state = {"step": 2, "train": {"step": 2}, "labels": [], "best": None}
        store.commit(written, state)

    def user(self) -> None:
        self._patch.setenv("XDG_CONFIG_HOME", str(self.folder / "user"))

    def edit(self, change: Callable[[dict], None]) -> None:
        content = yaml.safe_load((self.run / "run.yaml").read_text())
        change(content)
        (self.run / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def attack(self, verb: str, *further: str) -> int:
        words = [{"RUN": str(self.run), "OUT": str(self.folder / "out")}.get(word, word) for word in VERBS[verb]]
        return main([*words, *further])


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    return Stranger(tmp_path, monkeypatch)


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_a_model_does_not_run(verb: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    (stranger.model / "evil.py").write_text(EVIL_CODE.format(sentinel=str(stranger.sentinel)))
    for name, maps in (
        ("config.json", {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.EvilTokenizer", None]}),
    ):
        content = json.loads((stranger.model / name).read_text())
        kind = {"model_type": "evil"} if name == "config.json" else {}
        (stranger.model / name).write_text(json.dumps({**content, **kind, "auto_map": maps}))
    stranger.give("model.trust_remote_code=true")
    code = stranger.attack(verb)
    assert not stranger.sentinel.exists()
    assert code == 2
    said = capsys.readouterr().err
    assert "model.trust_remote_code" in said and "--trust model.trust_remote_code" in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_plugin_does_not_run(verb: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    file = stranger.folder / "own.py"
    file.write_text("")
    stranger.give(f"plugins=[{file}]")
    evil = f"import pathlib; pathlib.Path({str(stranger.sentinel)!r}).write_text('ran')"
    (stranger.run / "plugins" / "own.py").write_text(evil)
    stranger.edit(lambda content: content["plugins"][0].update(sha256=hashlib.sha256(evil.encode()).hexdigest()))
    code = stranger.attack(verb)
    assert not stranger.sentinel.exists()
    assert code == 2
    assert "--trust plugins" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "train --cfg", "plan", "data show", "predict", "evaluate", "upgrade"])
def test_a_module_of_callbacks_is_not_imported(verb: str, stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it were installed: what is not is refused whoever names it.
    monkeypatch.syspath_prepend(stranger.folder)
    monkeypatch.setenv("PYTHONPATH", str(stranger.folder), prepend=os.pathsep)
    (stranger.folder / "evil_callback.py").write_text(
        f"import pathlib; pathlib.Path({str(stranger.sentinel)!r}).write_text('ran')"
    )
    stranger.give()
    stranger.edit(lambda content: content["config"]["trainer"].update(callbacks=["evil_callback:Evil"]))
    sys.modules.pop("evil_callback", None)
    with suppress(Exception):  # those that go on without callbacks find no weights
        stranger.attack(verb)
    assert not stranger.sentinel.exists()
    assert "evil_callback" not in sys.modules


def test_a_signed_key_of_an_installed_plugin_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run lists the plugin or not: its classes are there before anything is believed."""
    monkeypatch.chdir(tmp_path)
    hook = "    hook: str | None = setting(None, signed=True)\n"
    install(tmp_path, "1.0", "    update_momentum:", f"{hook}    update_momentum:")
    write = """
        from pathlib import Path
        write_run(Path("run.yaml"), compose(["data=chitchat", "optimizer=lion", "optimizer.hook=theirs"]))
        """
    in_a_process(tmp_path, write)
    content = yaml.safe_load(Path("run.yaml").read_text())
    del content["signature"], content["plugins"]
    Path("run.yaml").write_text(yaml.safe_dump(content))
    read = """
        from pathlib import Path
        from dstune.core.errors import UserError
        try:
            print(read_run(Path("run.yaml")).config.optimizer.hook)
        except UserError as error:
            print([problem.where for problem in error.problems])
        """
    assert in_a_process(tmp_path, read) == "['optimizer.hook']\n"


@pytest.mark.parametrize("verb", VERBS)
def test_no_variable_is_resolved(
    verb: str, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger.give()
    stranger.edit(lambda content: content["config"]["model"].update(path="${oc.env:HF_TOKEN}.evil/model"))
    resolved = []
    true_one = convert.resolve_text
    monkeypatch.setattr(convert, "resolve_text", lambda *given: resolved.append(given) or true_one(*given))
    assert stranger.attack(verb) == 2
    assert resolved == []
    said = capsys.readouterr()
    assert "--trust model.path" in said.err and TOKEN not in said.err + said.out


@pytest.mark.parametrize("key", ["tracking.mlflow.uri", "data.train", "tracking.notes", "run.name"])
def test_verbs_that_use_no_such_key_leave_it_alone(
    key: str, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads weights only goes on without trackers, rows and launches of others."""
    stranger.give()
    *sections, last = key.split(".")

    def change(content: dict) -> None:
        section = content["config"]
        for name in sections:
            section = section[name]
        section[last] = "http://evil/${oc.env:HF_TOKEN}"

    stranger.edit(change)
    resolved = []
    monkeypatch.setattr(convert, "resolve_text", lambda *given: resolved.append(given))
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use

    config = read_run(stranger.run / "run.yaml", use=Use.weights).config
    assert resolved == [] and TOKEN not in str(config)
    assert stranger.attack("train") == 2


SLURM = {
    "setup": ["touch SENTINEL"],
    "srun_options": ["--prolog=SENTINEL"],
    "directives": ["--wrap=SENTINEL"],
    "container": "SENTINEL",
    "container_python": "SENTINEL",
    "container_mounts": ["/root:/root"],
}


@pytest.mark.parametrize("key", SLURM)
def test_a_job_of_others_is_not_submitted(key: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch = stranger.folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun", "sinfo"):
        script = sbatch.with_name(name)
        script.write_text(f"#!/bin/sh\ncat > {stranger.sentinel}\necho 1\n")
        script.chmod(0o755)
    os.environ["PATH"] = f"{sbatch.parent}:{os.environ['PATH']}"
    stranger.give(launch=SlurmConfig(**{key: SLURM[key]}, wait=False))
    code = stranger.attack("train")
    assert not stranger.sentinel.exists()
    assert code == 2
    assert f"--trust launch.{key}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize("key", ["mpirun", "mpirun_options"])
def test_a_program_of_others_does_not_start_ranks(key: str, verb: str, stranger: Stranger) -> None:
    evil = stranger.folder / "mpirun"
    evil.write_text(f"#!/bin/sh\necho ran > {stranger.sentinel}\nexit 1\n")
    evil.chmod(0o755)
    value = {"mpirun": str(evil), "mpirun_options": ["--app", str(evil)]}[key]
    stranger.give(launch=OpenMpiConfig(processes=1, **{key: value}))
    with suppress(Exception):  # as above
        stranger.attack(verb)
    assert not stranger.sentinel.exists()


def test_ranks_are_not_started_on_hosts_of_others(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    (stranger.folder / "hosts").write_text("evil.example slots=1\n")
    stranger.give(launch=OpenMpiConfig(hostfile=str(stranger.folder / "hosts")))
    assert stranger.attack("train") == 2
    assert "--trust launch.hostfile" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["tracking.wandb.entity=evil", "tracking.mlflow.uri=http://evil.example"])
def test_metrics_do_not_go_to_others(key: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    stranger.give("tracking.wandb.mode=online", key)
    assert stranger.attack("train") == 2
    said = capsys.readouterr().err
    assert f"--trust {key.split('=')[0]}" in said and "--trust tracking.wandb.mode" in said


ESCAPED = r"$\{oc.env\:HF_TOKEN\}"
"""Which Hydra reads as a reference."""


@pytest.mark.parametrize(
    "stored",
    [
        *("plugins=[evil.py]", "hydra.searchpath=[file:///evil]", "+launch.setup=[evil]"),
        *(
            f"model.path=evil/{ESCAPED}",
            f"run.name=str({ESCAPED})",
            "task=../evil",
            f"model.config_overrides.a={ESCAPED}",
        ),
    ],
)
def test_words_of_a_sweep_of_others_are_not_repeated(
    stored: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = stranger.folder / "sweep"
    sweep.mkdir()
    (stranger.folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(stranger.sentinel)!r}).write_text('')")
    content = {"overrides": [stored, "optimizer.lr=1e-4,1e-5", "data.train=none.jsonl"], "config": {}, "axes": {}}
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", "--multirun", str(sweep)]) == 2
    assert not stranger.sentinel.exists()
    assert "--trust sweep.overrides" in capsys.readouterr().err


def test_what_a_sweep_of_others_has_frozen_is_not_resolved() -> None:
    base = compose(["model.path=owner/name", "data.train=rows.jsonl"]).config
    assert "model.revision=abc" in frozen(replace(base, model=replace(base.model, revision="abc")), [])
    assert "model.revision=a$b" in frozen(replace(base, model=replace(base.model, revision="a$b")), [])
    theirs = replace(base, model=replace(base.model, revision="${oc.${run.name}:HF_TOKEN}"))
    assert [text for text in frozen(theirs, []) if "${" in text] == []
    theirs = replace(base, model=replace(base.model, revision=ESCAPED))
    assert [text for text in frozen(theirs, []) if "HF_TOKEN" in text] == []


@pytest.mark.parametrize("content", ["[]", "overrides: 5", "axes: [a]", "a: ["])
def test_a_sweep_of_others_that_is_none_is_a_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.yaml"):
        given_before(tmp_path)


def test_the_task_of_an_export_of_others_is_no_file_of_theirs(stranger: Stranger) -> None:
    """As the choice of a group, a path would be a configuration file, which may set any key."""
    from dstune.checkpoint.record import recorded_overrides

    evil = stranger.folder / "evil.yaml"
    task = {"name": "classification", "labels": ["a", "b"]}
    evil.write_text("# @package _global_\n" + yaml.safe_dump({"task": task, "model": {"trust_remote_code": True}}))
    up = "../" * 40
    name = f"{up}{str(evil.with_suffix(''))[1:]}"
    with pytest.raises(UserError, match=r"^task=\.\."):
        compose([f"task={name}", "data=chitchat", "model.path=x"])
    for one in (name, str(evil), "nope"):
        (stranger.folder / "dstune.json").write_text(json.dumps({"task": {"name": one}}))
        with pytest.raises(UserError, match="there is no such task"):
            recorded_overrides(stranger.folder, [])


def test_an_export_of_others_resolves_no_variable(stranger: Stranger) -> None:
    from dstune.checkpoint.record import recorded_overrides
    from dstune.config.schema import ModelConfig
    from dstune.inference.resolve_model import base_of

    folder = stranger.folder / "export"
    folder.mkdir()
    settings = {"base_model_name_or_path": "${oc.env:HF_TOKEN}.evil/model"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"--trust model\.path"):
        base_of(folder, ModelConfig())
    record = {"task": {"name": "classification", "labels": ["${oc.env:HF_TOKEN}"]}}
    record["data"] = {"format": "auto", "max_length": 8, "packing": False, "train": "/etc/passwd"}
    (folder / "dstune.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"dstune\.json: task\.labels") as caught:
        recorded_overrides(folder, [])
    assert TOKEN not in str(caught.value)
    (folder / "dstune.json").write_text(json.dumps(record | {"task": {"name": "classification", f"k={ESCAPED}\\": 1}}))
    with pytest.raises(UserError, match="refers to something outside"):
        recorded_overrides(folder, [])
    (folder / "dstune.json").write_text(json.dumps(record))
    words = recorded_overrides(folder, ["task.labels=[a]", "task=embedding"])
    assert words == ["data.max_length=8", "data.packing=false"]


@pytest.mark.parametrize(
    "fault", ["other code", "further code", "code of another repository", "another base", "no checkpoint"]
)
def test_code_that_somebody_put_into_an_own_run_does_not_run(fault: str, stranger: Stranger) -> None:
    """Of a run that was lent and came back: signed, and its base model is trusted."""
    from dstune.checkpoint.export import exported
    from dstune.checkpoint.model_code import is_of_base

    (stranger.model / "own_code.py").write_text("")
    mine(stranger, "model.trust_remote_code=true")
    export = stranger.run / "export"
    shutil.copytree(stranger.model, export)
    base = read(stranger).model
    settings = {"base_model_name_or_path": str(stranger.model.resolve())}
    (export / "adapter_config.json").write_text(json.dumps(settings))
    assert is_of_base(export, base)
    if fault == "code of another repository":
        maps = {"auto_map": {"AutoConfig": "evil/model--own_code.Evil"}}
        (export / "config.json").write_text(json.dumps(json.loads((export / "config.json").read_text()) | maps))
    elif fault == "another base":  # with code of its own
        (export / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    else:
        (export / ("own_code.py" if fault == "other code" else "evil.py")).write_text("evil()")
    assert not is_of_base(export, base)
    if fault == "no checkpoint":
        shutil.rmtree(stranger.run / "checkpoints")
        with pytest.raises(UserError, match="--trust-remote-code"):
            exported(stranger.run, stranger.folder / "scratch")


def test_a_signed_run_is_served_without_what_somebody_put_into_its_export(stranger: Stranger) -> None:
    from dstune.serve import source

    (stranger.model / "own_code.py").write_text("")
    mine(stranger, "model.trust_remote_code=true")
    export = stranger.run / "export"
    shutil.copytree(stranger.model, export)
    (export / "dstune.json").write_text(json.dumps({"task": {"name": "chat"}, "checkpoint": store.tag(2)}))
    (export / "reference.json").write_text("{}")
    os.utime(export / "config.json")
    assert not source.needs_preparation(str(stranger.run))
    served = source.resolve("", str(stranger.run))
    assert served.trust_remote_code and served.folder == export.resolve()
    stranger.user()
    with pytest.raises(UserError, match=r"--trust model\.trust_remote_code"):
        source.resolve("", str(stranger.run))
    stranger.at_home()
    (export / "evil.py").write_text(EVIL_CODE.format(sentinel=str(stranger.sentinel)))
    assert source.needs_preparation(str(stranger.run)), "it is exported anew, from the checkpoint"
    assert stranger.attack("serve", "--check", "--state", str(stranger.folder / "state")) != 0
    assert not stranger.sentinel.exists()


def test_an_adapter_of_others_is_not_served_from_a_base_that_a_variable_names(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    export = stranger.folder / "export"
    export.mkdir()
    settings = {"base_model_name_or_path": "${oc.env:HF_TOKEN}.evil/model"}
    (export / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["serve", str(export), "--state", str(stranger.folder / "state")]) == 2
    said = capsys.readouterr()
    assert "--trust model.path" in said.err and TOKEN not in said.err + said.out


@pytest.mark.parametrize("name", ["__class__.__init__.__globals__", "run.dir.nothing", "method.rank", "x"])
def test_origins_of_a_strangers_run_name_keys_alone(name: str, stranger: Stranger) -> None:
    """Where values come from, by key: what is no key is left out, and no attribute of that name is looked up."""
    from dstune.config.resume import kept_origins
    from dstune.config.run_file import read_run

    stranger.give()
    stranger.edit(lambda content: content.update(origins={name: "evil", "optimizer.lr": "the default of method=full"}))
    stored = read_run(stranger.run / "run.yaml")
    assert kept_origins(stored, stored.config) == {"optimizer.lr": "the default of method=full"}
    assert stranger.attack("train --cfg") == 0


def test_an_own_export_finds_its_base_by_a_variable(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstune.checkpoint.record import write_record
    from dstune.config.schema import ModelConfig
    from dstune.core import secrets
    from dstune.inference.resolve_model import base_of

    monkeypatch.setenv("MODELS", str(stranger.folder))
    reference = "${oc.env:MODELS}/model"
    mine(stranger, f"model.path={reference}")
    folder = stranger.folder / "moved"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": reference}))
    write_record(folder, read(stranger), {"step": 2, "labels": []}, "step-2", stranger.run)
    monkeypatch.setattr(secrets, "_references", set())
    assert base_of(folder, ModelConfig()).path == str(stranger.model)
    monkeypatch.setattr(secrets, "_references", set())
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "${oc.env:HF_TOKEN}/x"}))
    with pytest.raises(UserError, match="changed after it was signed"):
        base_of(folder, ModelConfig())


# ---- what keeps working ----


def read(stranger: Stranger, *given: str):
    from dstune.config.run_file import read_run

    return read_run(stranger.run / "run.yaml", given).config


def mine(stranger: Stranger, *overrides: str, **sections: object) -> None:
    stranger.give(*overrides, **sections)
    os.environ["XDG_CONFIG_HOME"] = str(stranger.folder / "stranger")


CONSEQUENTIAL = [
    "model.trust_remote_code=true",
    "model.revision=abc",
    "tracking.mlflow.uri=http://x/${oc.env:HF_TOKEN}",
    "tracking.notes='${oc.env:HF_TOKEN}'",
]


def test_own_runs_need_nothing_also_when_they_were_moved_and_harmless_keys_edited(stranger: Stranger) -> None:
    mine(stranger, *CONSEQUENTIAL, launch=SlurmConfig(setup=["module load cuda"]))
    stranger.edit(lambda content: content["config"]["optimizer"].update(lr=0.5))
    stranger.run.rename(stranger.folder / "moved")
    stranger.run = stranger.folder / "moved"
    config = read(stranger)
    assert config.launch.setup == ["module load cuda"] and config.optimizer.lr == 0.5
    assert config.tracking.mlflow.uri == f"http://x/{TOKEN}"
    file = stranger.folder / "stranger" / "dstune" / "trust.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() not in (stranger.run / "run.yaml").read_text()


def test_the_signature_fits_no_other_value(stranger: Stranger) -> None:

    def altered(change: Callable[[dict], object]) -> list[str]:
        mine(stranger, *CONSEQUENTIAL) if not (stranger.run / "run.yaml").exists() else None
        whole = (stranger.run / "run.yaml").read_text()
        stranger.edit(lambda content: change(content["config"]))
        try:
            read(stranger)
        except UserError as error:
            return [problem.where for problem in error.problems]
        finally:
            (stranger.run / "run.yaml").write_text(whole)
        return []

    assert altered(lambda config: config["tracking"]["mlflow"].update(uri="http://evil/${oc.env:HF_TOKEN}")) == [
        "tracking.mlflow.uri"
    ]
    assert altered(lambda config: config["model"].update(path="evil/model")) == ["model.trust_remote_code"]
    assert altered(lambda config: config["model"].update(revision="main")) == ["model.trust_remote_code"]
    assert altered(lambda config: config["model"].update(config_overrides={"auto_map": {"AutoConfig": "e--m.C"}})) == [
        "model.trust_remote_code"
    ]
    assert altered(lambda config: config["data"].update(train="${oc.env:HF_TOKEN}")) == ["data.train"]
    assert altered(lambda config: config["tracking"].update(tags=["${oc.env:HF_TOKEN}"])) == ["tracking.tags"]
    assert altered(lambda config: config["tracking"].update(tags=["${ oc.env :HF_TOKEN}"])) == ["tracking.tags"]
    assert altered(lambda config: config["model"].update(trust_remote_code=False)) == []
    assert altered(lambda config: config["tracking"].update(notes="mine")) == []


def test_a_run_with_nothing_of_consequence_needs_no_signature(stranger: Stranger) -> None:
    stranger.give()
    stranger.edit(lambda content: content.pop("signature"))
    assert read(stranger).data.train == "rows.jsonl"
    assert stranger.attack("train --cfg") == 0


def test_a_team_shares_a_key(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("DSTUNE_TRUST_KEY", "0123456789abcdef" * 4)
    stranger.give(*CONSEQUENTIAL)
    assert read(stranger).model.trust_remote_code
    assert not (stranger.folder / "stranger").exists(), "a team's key is written nowhere"
    monkeypatch.setenv("DSTUNE_TRUST_KEY", "another9abcdef01" * 4)
    with pytest.raises(UserError, match="signed with another key"):
        read(stranger)
    monkeypatch.setenv("DSTUNE_TRUST_KEY", "short")
    with pytest.raises(UserError, match="guessed"):
        read(stranger)


def test_a_key_that_others_can_read_signs_nothing(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    mine(stranger, *CONSEQUENTIAL)
    (stranger.folder / "stranger" / "dstune" / "trust.key").chmod(0o644)
    assert stranger.attack("train --cfg") == 2
    assert "chmod 600" in capsys.readouterr().err


def test_what_is_named_or_repeated_is_believed(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    stranger.give(*CONSEQUENTIAL)
    assert stranger.attack("train --cfg", "--trust", "model.trust_remote_code,tracking.mlflow.uri") == 2
    assert "tracking.notes" in capsys.readouterr().err
    named = ("--trust=model.trust_remote_code,tracking.mlflow.uri", "tracking.notes=mine")
    assert stranger.attack("train --cfg", *named) == 0
    shown = capsys.readouterr().out
    assert "trust_remote_code: true" in shown and "notes: mine" in shown
    from dstune.config import trust

    with trust.from_flags(["a", "--trust", "plugins,model.path"]) as words:
        assert words == ["a"] and trust.flags_for(stranger.run) == ["--trust", "model.path,plugins"]
    assert trust.flags_for(stranger.run) == []
    assert stranger.attack("train --cfg") == 2, "no command believes what another one named"
    assert "4 problems" not in capsys.readouterr().err
    assert stranger.attack("train --cfg", "--trust") == 2
    assert "keys are missing" in capsys.readouterr().err


def test_a_run_that_is_continued_by_its_whole_command_needs_no_signature(stranger: Stranger) -> None:
    from dstune.config.run_file import read_run_beside

    words = [f"model.path={stranger.model}", "data.train=rows.jsonl", "zero=stage2", *CONSEQUENTIAL]
    stranger.give(*CONSEQUENTIAL)
    composed = compose(words)
    assert read_run_beside(stranger.run / "run.yaml", composed.config, words).config.model.trust_remote_code
    less = [word for word in words if "mlflow" not in word]
    with pytest.raises(UserError) as caught:
        read_run_beside(stranger.run / "run.yaml", compose(less).config, less)
    assert [problem.where for problem in caught.value.problems] == ["tracking.mlflow.uri"]
    other = [*less, "tracking.mlflow.uri=folder"]
    stored = read_run_beside(stranger.run / "run.yaml", compose(other).config, other)
    assert stored.config.tracking.mlflow.uri == "folder"


def test_ranks_read_what_the_launch_has_written(stranger: Stranger) -> None:
    """In a container a rank has another home, and no key."""
    from dstune.config.run_file import read_decided

    stranger.give(*CONSEQUENTIAL)
    assert read_decided(stranger.run / "run.yaml").config.model.trust_remote_code
    stage = stranger.run / "language_model"
    stage.mkdir()
    composed = read_decided(stranger.run / "run.yaml")
    write_run(stage / "run.yaml", Composed(composed.config, []), signature_of=stranger.run / "run.yaml")
    assert not (stranger.folder / "user").exists(), "a rank makes no key"
    stranger.at_home()
    stranger.run = stage
    assert read(stranger).model.trust_remote_code


def test_upgrade_signs_what_its_user_believes(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    stranger.give(*CONSEQUENTIAL)
    keys = "model.trust_remote_code,tracking.mlflow.uri,tracking.notes"
    assert stranger.attack("upgrade", "--trust", keys) == 0
    assert "signed with your key" in capsys.readouterr().out
    assert stranger.attack("train --cfg") == 0
    assert stranger.attack("upgrade") == 0
    assert "signed" not in capsys.readouterr().out.split("\n")[-2]


def test_launches_at_once_agree_on_one_key(stranger: Stranger) -> None:
    import threading

    from dstune.core import signing

    os.environ["XDG_CONFIG_HOME"] = str(stranger.folder / "new")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(signing.sign({})["hmac"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert os.listdir(stranger.folder / "new" / "dstune") == ["trust.key"]


# ---- folders that are links ----


@pytest.mark.parametrize("verb", ["train", "export", "upgrade", "prune", "serve"])
def test_folders_of_a_strangers_run_lead_nowhere(
    verb: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger.give()
    precious = stranger.folder / "precious"
    (stranger.run / "checkpoints").rename(precious)
    for name in ("checkpoints", "logs", "export"):
        (stranger.run / name).symlink_to(precious)
    before = sorted(path.name for path in precious.rglob("*"))
    words = {"export": ["export", str(stranger.run)], "prune": ["checkpoints", str(stranger.run), "--prune", "1"]}
    code = main(words[verb]) if verb in words else stranger.attack(verb)
    assert sorted(path.name for path in precious.rglob("*")) == before
    assert code == 2
    assert "--trust links" in capsys.readouterr().err


def test_scratch_disks_are_normal_in_own_runs(stranger: Stranger) -> None:
    from dstune.config.run_links import refuse_links

    mine(stranger)
    scratch = stranger.folder / "scratch"
    (stranger.run / "checkpoints").rename(scratch)
    (stranger.run / "checkpoints").symlink_to(scratch)
    refuse_links(stranger.run)
    if os.getuid() == 0:
        os.lchown(stranger.run / "checkpoints", 65534, 65534)
        with pytest.raises(UserError, match="another user made it"):
            refuse_links(stranger.run)
    stranger.user()
    with pytest.raises(UserError, match="another key"):
        refuse_links(stranger.run)


def test_overrides_of_a_run_still_apply(stranger: Stranger) -> None:
    mine(stranger, launch=SlurmConfig(setup=["module load cuda"]))
    assert apply_overrides(read(stranger, "launch.setup=[a]"), ["launch.setup=[a]"]).launch.setup == ["a"]
