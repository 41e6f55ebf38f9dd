"""Versions of MLflow's registry in place of a path: pinned once, fetched once, held against what was registered."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dstune.config import registered
from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.inference import export_command
from dstune.launch.preflight import resolve_model
from tests.support.tiny import save_decoder

mlflow = pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("made") / "model")


class Registry:
    def __init__(self, folder: Path):
        from mlflow.tracking import MlflowClient

        self.folder, self.uri = folder, f"file://{folder}/mlruns"
        self.client = MlflowClient(self.uri, self.uri)
        self.client.create_registered_model("film")

    def add(self, model: Path, inside: str = "artifacts/export", **tags: str) -> str:
        upload = self.folder / f"upload-{len(list(self.folder.iterdir()))}"
        shutil.copytree(model, upload / inside)
        return str(self.client.create_model_version("film", str(upload), tags=tags).version)


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    for name, value in (("MLFLOW_ALLOW_FILE_STORE", "true"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    found = Registry(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return found


def test_a_run_keeps_the_version_that_the_alias_meant_when_it_was_made(registry, model):
    registry.client.set_registered_model_alias("film", "champion", registry.add(model))
    said: list[str] = []
    config = compose(["model.path=models:/film@champion", "data.train=rows.jsonl"]).config
    pinned = resolve_model(config.model, said.append)
    assert pinned.path == "models:/film/1" and said == [
        "model models:/film@champion: models:/film/1", "fetching models:/film/1",
    ]  # fmt: skip
    registry.client.set_registered_model_alias("film", "champion", registry.add(model))
    assert registered.pin("models:/film@champion", "MODEL") == "models:/film/2"
    assert resolve_model(pinned, said.append) == pinned and len(said) == 2, "fetched once"
    folder = Path(registered.fetched_path(pinned.path))
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
    with pytest.raises(UserError, match="has no revisions"):
        resolve_model(replace(pinned, revision="a"), said.append)


def test_a_pinned_version_needs_no_registry_once_it_is_fetched(registry, model, monkeypatch):
    registry.add(model)
    folder = registered.local_path("models:/film/1", "MODEL", lambda text: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert registered.local_path("models:/film/1", "MODEL") == folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@elsewhere.example")
    with pytest.raises(UserError, match="another registry") as caught:
        registered.local_path("models:/film/1", "MODEL")
    assert "secret" not in str(caught.value)


def test_what_cannot_be_used_is_named(registry, model, tmp_path, monkeypatch):
    registry.client.set_registered_model_alias("film", "champion", registry.add(model, dstune_digest="0" * 64))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.pkl").write_text("x")
    other = registry.add(tmp_path / "other")
    for address, reason in (
        ("models:/film@old", "no such alias; it has champion"),
        ("models:/film", "names no version"),
        ("models:/nothing@x", "not found"),
        ("models:/film/9", "not found"),
        ("models:/film@champion", "not those that were registered"),
        (f"models:/film/{other}", "holds no model of transformers or peft"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            registered.local_path(address, "MODEL", lambda text: None)
        assert caught.value.problems[0].where == "MODEL"
    assert not list((tmp_path / "cache").rglob("config.json")), "nothing is kept of what was refused"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="no MLflow server is named"):
        registered.local_path("models:/film@champion", "MODEL")


def test_paths_that_are_no_addresses_stay_as_they_are():
    for path in ("org/name", "sample://smollm2", "models", "./models:/x", "other:/x", "models://x"):
        assert registered.registry_of(path) is None
        assert registered.local_path(path, "MODEL") == registered.fetched_path(path) == path


def test_the_verbs_take_a_version(registry, model, tmp_path, capsys):
    from dstune.evaluation.command import parse
    from dstune.inference.generate import main as generate

    number = registry.add(model, "model")  # as MLflow's flavour for transformers keeps it
    registry.client.set_registered_model_alias("film", "champion", number)
    out = tmp_path / "copy"
    assert export_command.main(["models:/film@champion", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"export": str(out), "model": "models:/film/1"}
    assert {file.name for file in out.iterdir()} == {file.name for file in model.iterdir()}
    for words in (["models:/film@champion"], ["models:/film@champion", "--out", str(out), "--merge"]):
        with pytest.raises(UserError):
            export_command.main(words)
    folder = registered.fetched_path("models:/film/1")
    assert parse(["models:/film@champion", "task=chat", "data.validation=rows.jsonl"]).target == folder
    assert generate(["models:/film@champion", "--prompt", "w1", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] <= 2


def test_an_adapter_of_another_machine_finds_its_base_in_the_registry(tmp_path):
    from dstune.config.schema import ModelConfig
    from dstune.inference.resolve_model import base_of

    for base, path in (("models:/film/3", "models:/film/3"), ("org/name", "/elsewhere/export")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere/export"}))
        (tmp_path / "dstune.json").write_text(json.dumps({"base_model": base}))
        assert base_of(tmp_path, ModelConfig()).path == path
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert base_of(tmp_path, ModelConfig()).path == str(tmp_path)
