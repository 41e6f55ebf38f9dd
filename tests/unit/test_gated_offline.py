"""A gated model that is not in the cache, without a connection: the message says each thing to do, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.data import hub as data_hub
from dstune.data.hub import HubName
from dstune.launch import hub


def test_a_model_that_the_cache_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(path="meta-llama/Llama-3.1-8B", revision="v1")
    with pytest.raises(UserError) as caught:
        hub.fetch(config, lambda text: None, lambda folder: None)
    (problem,) = caught.value.problems
    assert problem.where == "model.path"
    assert problem.reason == "HF_HUB_OFFLINE is set, and the cache does not hold this model at revision v1"
    places = [
        problem.fix.find(text)
        for text in (
            "hf download meta-llama/Llama-3.1-8B --revision v1",
            "HF_HOME",
            "--local-dir DIR",
            "accept its terms at",
        )
    ]
    assert -1 not in places and places == sorted(places)
    assert problem.fix.endswith("log in with `hf auth login`")


def test_a_data_set_that_the_cache_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        UserError, match=r"run once where there is a connection to .*org/rows; if the data set is gated, first accept"
    ):
        data_hub.cached(HubName("org/rows", None, None), None, "data.train")
