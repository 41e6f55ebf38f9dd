"""What keeps working in runs of one's own: signatures, shared keys, and what is named or repeated on the command line."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import pytest

from dstune.config import trust
from dstune.config.compose import compose
from dstune.config.run_file import Composed, write_run
from dstune.core.errors import UserError
from dstune.launch.slurm.config import SlurmConfig
from dstune.protocols import TASKS
from tests.support.stranger import CONSEQUENTIAL, TOKEN, Stranger, mine, read


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


def test_further_models_of_a_task_are_signed_with_the_consent_to_their_code() -> None:
    named = {
        f"task.{key}"
        for task in TASKS.classes().values()
        for one in getattr(task, "further_models", ())
        for key in vars(one).values()
    }
    assert named and named <= set(trust.CODE_OF)

    def signed(task: dict[str, str]) -> str:
        config = {"model": {"path": "m", "trust_remote_code": True}, "task": task, "method": {"name": "full"}}
        return trust.statement({"config": config})["model.trust_remote_code"]

    plugin = {"name": "distil", "teacher": "a/b"}  # not loaded where the signature is read
    assert signed(plugin) == signed(dict(plugin)) != signed(plugin | {"teacher": "evil/b"})
    assert signed({"name": "chat", "chat_template": "a"}) == signed({"name": "chat", "chat_template": "b"})


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
    assert "the keys to trust are missing" in capsys.readouterr().err


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
