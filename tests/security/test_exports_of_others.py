"""An export from somebody else, or in an own run that others could write, runs nothing and resolves no variable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from dstune.checkpoint import store
from dstune.cli import main
from dstune.config.compose import compose
from dstune.core.errors import UserError
from tests.support.stranger import ESCAPED, EVIL_CODE, TOKEN, Stranger, mine, read


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


def test_a_head_of_an_earlier_version_is_still_trusted() -> None:
    """Exports carry a copy of the file: whoever changes it adds the digest from here to those of earlier versions."""
    from dstune.checkpoint.model_code import EARLIER_HEADS
    from dstune.models import pooled

    digest = hashlib.sha256(Path(pooled.__file__).read_bytes()).hexdigest()
    assert digest == "fd26b2868a9cadd364d11edac9359ea9c833e921e644fc0a65bfb96dcd3feb84"
    assert len(EARLIER_HEADS) == 2 and digest not in EARLIER_HEADS


@pytest.mark.parametrize(
    "fault", ["other code", "further code", "code of another repository", "another base", "no checkpoint"]
)
def test_code_that_somebody_put_into_an_own_run_does_not_run(fault: str, stranger: Stranger) -> None:
    """Of a run that was lent and came back: signed, and its base model is trusted."""
    from dstune.checkpoint.export import existing_or_new_export
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
            existing_or_new_export(stranger.run, stranger.folder / "scratch")


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
