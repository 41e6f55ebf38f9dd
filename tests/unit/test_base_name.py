"""What an adapter says of its base: the hub id also where the run was given the folder in the hub's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.checkpoint.model_folder import base_name, base_revision
from dstune.config.schema import ModelConfig


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("models--org--a--b", "models--gpt2"):
        (tmp_path / "hub" / name / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.parametrize(("folder", "name"), [("models--org--a--b", "org/a--b"), ("models--gpt2", "gpt2")])
def test_a_folder_of_the_hub_s_cache_is_named_by_its_id_and_commit(cache, folder, name):
    model = ModelConfig(path=str(cache / "hub" / folder / "snapshots" / "abc"))
    assert (base_name(model), base_revision(model)) == (name, "abc")


@pytest.mark.parametrize("folder", ["model", "hub/models--gpt2", "hub/models--gpt2/snapshots"])
def test_other_folders_are_named_by_their_paths(cache, folder):
    model = ModelConfig(path=str(cache / folder))
    assert (base_name(model), base_revision(model)) == (str((cache / folder).resolve()), None)


def test_ids_stay(cache):
    model = ModelConfig(path="org/a--b", revision="main")
    assert (base_name(model), base_revision(model)) == ("org/a--b", "main")
