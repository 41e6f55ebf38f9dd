"""A run directory from somebody else runs nothing, reaches nobody and resolves no variable, whatever verb reads it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.plugins import in_a_process, install

from dstune.cli import main
from dstune.config import convert
from dstune.config.compose import compose
from dstune.config.run_overrides import apply_overrides
from dstune.core.errors import UserError
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.launch.slurm.config import SlurmConfig
from dstune.sweep.directory import frozen_overrides, read_overrides
from tests.support.stranger import ESCAPED, EVIL_CODE, TOKEN, VERBS, Stranger, mine, read


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
        write_run(Path("run.yaml"), compose(["data=chitchat", "optimizer=signum", "optimizer.hook=theirs"]))
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
    value = {"mpirun": str(evil), "mpirun_options": [str(evil)]}[key]  # the first word that is no option is the program
    # A share that the run has not decided yet would be refused before anything is started.
    stranger.give("data.split.validation=0", launch=OpenMpiConfig(processes=1, **{key: value}))
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
    assert "model.revision=abc" in frozen_overrides(replace(base, model=replace(base.model, revision="abc")), [])
    assert "model.revision=a$b" in frozen_overrides(replace(base, model=replace(base.model, revision="a$b")), [])
    theirs = replace(base, model=replace(base.model, revision="${oc.${run.name}:HF_TOKEN}"))
    assert [text for text in frozen_overrides(theirs, []) if "${" in text] == []
    theirs = replace(base, model=replace(base.model, revision=ESCAPED))
    assert [text for text in frozen_overrides(theirs, []) if "HF_TOKEN" in text] == []


@pytest.mark.parametrize("content", ["[]", "overrides: 5", "axes: [a]", "a: ["])
def test_a_sweep_of_others_that_is_none_is_a_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.yaml"):
        read_overrides(tmp_path)


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


def test_overrides_of_a_run_still_apply(stranger: Stranger) -> None:
    mine(stranger, launch=SlurmConfig(setup=["module load cuda"]))
    assert apply_overrides(read(stranger, "launch.setup=[a]"), ["launch.setup=[a]"]).launch.setup == ["a"]
