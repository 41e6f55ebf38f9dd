"""`dstune export --push`: what arrives on a hub on loopback, and what the hub's refusals become."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from dstune.core.errors import UserError
from dstune.core.paths import REFERENCE_FILE
from dstune.inference import export_command, hub_upload
from tests.support.generation import saved_run
from tests.support.hub_uploads import Repository, UploadHub, serving
from tests.support.tiny import save_decoder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    with serving() as server:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    return saved_run(folder, save_decoder(folder / "model"), "task=causal_lm", "run.name=verses")


def refusal(*arguments: Any, name: str = "ada/verses") -> str:
    with pytest.raises(UserError) as caught:
        hub_upload.check_repository(name, public=bool(arguments))
    return str(caught.value)


def test_an_export_becomes_a_private_repository_without_held_out_rows(hub, run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(run_dir), "--out", str(out), "--no-reference", "--push", "ada/verses", "--json"]
    assert export_command.main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    uploaded = hub.repositories["ada/verses"]
    assert uploaded.private
    assert uploaded.titles == ["dstune export of step 3"]
    assert printed["commit"].startswith(f"{hub.url}/ada/verses/commit/")
    assert {name: (out / name).read_bytes() for name in uploaded.files if name != ".gitattributes"} == {
        file.name: file.read_bytes() for file in out.iterdir()
    }
    assert ModelCard(uploaded.files["README.md"].decode()).data.library_name == "transformers"

    (out / REFERENCE_FILE).write_text("{}")
    hub_upload.upload(out, "ada/verses", public=False)
    assert REFERENCE_FILE not in uploaded.files
    assert len(uploaded.titles) == 2


def test_the_card_carries_measured_metrics_as_a_model_index(hub, tmp_path):
    from dstune.checkpoint.card import write_card
    from tests.support.configs import run_config

    state = {"step": 3, "labels": [], "metrics": {"loss": 1.5, "perplexity": 4.5, "targets": 9}}
    write_card(tmp_path, tmp_path, run_config(), state, adapter=False)
    hub_upload.upload(tmp_path, "lab/verses", public=True)
    uploaded = hub.repositories["lab/verses"]
    assert not uploaded.private
    measured = ModelCard(uploaded.files["README.md"].decode()).data.eval_results
    assert {result.metric_type: result.metric_value for result in measured} == {"loss": 1.5, "perplexity": 4.5}


def test_what_the_hub_would_refuse_is_asked_before_the_export(hub, run_dir, monkeypatch, tmp_path):
    assert "is not OWNER/NAME" in refusal(name="verses")
    hub.repositories["ada/public"] = Repository(private=False)
    hub.repositories["ada/mine"] = Repository(private=True)
    assert "exists and is public" in refusal(name="ada/public")
    hub_upload.check_repository("ada/public", public=True)
    hub_upload.check_repository("ada/mine", public=False)
    hub_upload.check_repository("lab/verses", public=False)
    assert "--push ada/verses" in refusal(name="somebody/verses")
    hub.role = "read"
    assert "may only read" in refusal()
    hub.refuses_token = True
    assert "does not accept the token" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=0 dstune export RUN --push ada/verses" in refusal()
    with pytest.raises(UserError, match="switched off"):
        export_command.main([str(run_dir), "--out", str(tmp_path / "out"), "--push", "ada/verses"])
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_names_the_export_that_stays(hub, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.refused_owners.add("lab")
    with pytest.raises(UserError, match=r"does not let this token write there.*(\n.*)*export is complete in"):
        hub_upload.upload(folder, "lab/verses", public=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(UserError, match=r"cannot be reached.*(\n.*)*--force"):
        hub_upload.upload(folder, "ada/verses", public=False)


def test_an_adapter_whose_base_only_this_machine_has_is_not_uploaded(tmp_path):
    from tests.support.configs import run_config

    model = run_config().model
    for path in (str(tmp_path), "sample://smollm2"):
        with pytest.raises(UserError, match="--merge"):
            hub_upload.check_base(type(model)(**{**vars(model), "path": path}))
    hub_upload.check_base(type(model)(**{**vars(model), "path": "org/name"}))


def test_options_that_belong_together(run_dir):
    for flags, message in ((["--public"], "nothing is uploaded"), (["--push", "a/b", "--rollback"], "--push")):
        with pytest.raises(UserError, match=message):
            export_command.main([str(run_dir), *flags])
