"""What happens to versions and aliases, with a double of the registry."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
from support.configs import run_config
from support.generation import saved_run
from support.tiny import save_decoder

from dstune.core.errors import DstuneError, UserError
from dstune.lakehouse import register as registry

PROVE = registry._prove


class Missing(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class Page(list):
    token: str | None = None


class Registry:
    """Versions with their tags, and aliases."""

    def __init__(self):
        self.tags: dict[str, dict[str, str]] = {}
        self.aliases: dict[str, str] = {}

    def search_model_versions(self, query, page_token=None):
        """One a page, as servers give them."""
        at = int(page_token or 0)
        found = Page(SimpleNamespace(version=number, status="READY") for number in list(self.tags)[at : at + 1])
        found.token = str(at + 1) if at + 1 < len(self.tags) else None
        return found

    def get_model_version(self, name, number):
        return SimpleNamespace(tags=self.tags[number])

    def set_model_version_tag(self, name, number, key, value):
        self.tags[number][key] = value

    def get_model_version_by_alias(self, name, alias):
        if alias not in self.aliases:
            raise Missing
        return SimpleNamespace(version=self.aliases[alias])

    def set_registered_model_alias(self, name, alias, number):
        self.aliases[alias] = number


@pytest.fixture
def known(monkeypatch):
    """The registry; `proof` is what loading back does."""
    client = Registry()
    client.proof = lambda *arguments: None

    def log(client, name, export, digest, tags, project):
        number = str(len(client.tags) + 1)
        client.tags[number] = {**tags, registry.DIGEST: digest}
        return number

    monkeypatch.setattr(registry, "client_for", lambda name, config: client)
    monkeypatch.setattr(registry, "_log", log)
    monkeypatch.setattr(registry, "_prove", lambda *arguments: client.proof(*arguments))
    return client


def export(folder, weights: str):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "README.md").write_text(f"made at another time: {weights}")
    return folder


def register(place: str, folder):
    return registry.register(place, folder, folder.parent, run_config())


def test_an_equal_export_is_the_same_version_and_an_alias_moves_and_back(known, tmp_path):
    first = register("models:/film@champion", export(tmp_path / "a", "1"))
    assert (first.version, first.created, first.before) == ("1", True, None)
    assert known.aliases == {"champion": "1"}
    again = register("models:/film@champion", export(tmp_path / "b", "1"))
    assert (again.version, again.created) == ("1", False)
    (tmp_path / "b" / "README.md").write_text("other words")
    assert not register("models:/film", tmp_path / "b").created
    other = register("models:/film@champion", export(tmp_path / "b", "2"))
    assert (other.version, other.created, other.before) == ("2", True, "1")
    assert known.aliases == {"champion": "2", "champion-previous": "1"}
    back = registry.roll_back("models:/film@champion")
    assert (back.version, back.before) == ("1", "2")
    assert known.aliases == {"champion": "1", "champion-previous": "2"}
    assert registry.roll_back("models:/film@champion").version == "2"
    assert known.tags["1"]["dstune_task"] == run_config().task.name


def test_a_version_that_cannot_be_proven_gets_no_alias(known, tmp_path):
    register("models:/film@champion", export(tmp_path / "a", "1"))

    def differs(*arguments):
        raise DstuneError("answers otherwise")

    known.proof = differs
    for _ in range(2):  # it is registered by now, and not proven still
        with pytest.raises(DstuneError, match="answers otherwise"):
            register("models:/film@champion", export(tmp_path / "b", "2"))
        assert known.aliases == {"champion": "1"}
    assert len(known.tags) == 2
    known.proof = lambda *arguments: None
    assert not register("models:/film@champion", tmp_path / "b").created
    assert known.aliases["champion"] == "2"


def test_what_the_registry_refuses_is_a_mistake_of_the_user(known, tmp_path):
    def refuse(*arguments):
        raise RuntimeError("PERMISSION_DENIED: no\nmore")

    known.set_registered_model_alias = refuse
    with pytest.raises(UserError, match="PERMISSION_DENIED: no"):
        register("models:/film@champion", export(tmp_path / "a", "1"))
    known.aliases = {"champion": "2", "champion-previous": "1"}
    with pytest.raises(UserError, match="PERMISSION_DENIED: no"):
        registry.roll_back("models:/film@champion")


def test_an_equal_export_is_found_on_any_page(known, tmp_path):
    for number in range(3):
        register("models:/film", export(tmp_path / "a", str(number)))
    assert register("models:/film", export(tmp_path / "a", "2")).version == "3"
    assert len(known.tags) == 3


def test_a_model_that_does_not_come_back_in_time_moves_no_alias(known, tmp_path, monkeypatch):
    def slow(words, *, timeout, **more):
        raise subprocess.TimeoutExpired(words, timeout)

    known.proof = PROVE
    monkeypatch.setattr(registry.subprocess, "run", slow)
    with pytest.raises(DstuneError, match="was not loaded back within 1800 s; no alias was moved") as caught:
        register("models:/film@champion", export(tmp_path / "a", "1"))
    assert not isinstance(caught.value, UserError)
    assert not known.aliases


def test_unity_catalog_takes_the_tags(known, tmp_path):
    """It refuses names with any of `. , - = / :` and long values (INVALID_PARAMETER_VALUE)."""
    table = {"table": "delta:///" + "long/" * 100, "version": 3, "id": "5fba94ed", "digest": "0" * 32}
    (tmp_path / "data_report.json").write_text(json.dumps({"tables": {"data.train": table}}))
    register("models:/main.reviews.film", export(tmp_path / "a", "1"))
    tags = known.tags["1"]
    assert {"dstune_table_data_train", "dstune_digest", "dstune_proven", "dstune_run"} <= tags.keys()
    assert not set(".,-=/:") & set("".join(tags))
    assert max(len(value) for value in tags.values()) <= 256


def test_adapters_with_other_labels_are_other_versions(known, tmp_path):
    folder = export(tmp_path / "a", "1")
    (folder / "adapter_config.json").write_text("{}")
    for labels, number in ((["bad", "good"], "1"), (["nein", "ja"], "2"), (["bad", "good"], "1")):
        record = {"task": {"name": "classification", "labels": labels}, "checkpoint": f"step {number}"}
        (folder / "dstune.json").write_text(json.dumps(record))
        assert register("models:/film", folder).version == number


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3"])
def test_aliases_that_mlflow_keeps_for_itself(alias):
    with pytest.raises(UserError, match="keeps this alias for itself"):
        registry.parse(f"models:/film@{alias}")


@pytest.mark.parametrize("place", ["film", "models:/", "models:/film/3", "models:/film@a b", "models:/it's"])
def test_places_that_are_none(place):
    with pytest.raises(UserError, match="no place in a model registry"):
        registry.parse(place)


def test_names_of_three_levels_and_rollback_without_an_alias(known):
    assert registry.parse("models:/main.reviews.films@champion") == ("main.reviews.films", "champion")
    with pytest.raises(UserError, match="names no alias"):
        registry.roll_back("models:/film")
    with pytest.raises(UserError, match="has not been moved"):
        registry.roll_back("models:/film@champion")


class Classifier:
    """What `predict` needs of a model of transformers, named as one of its classes."""

    def __init__(self, logits, **settings):
        labels = dict(enumerate(("bad", "good", "long")))
        self.config = SimpleNamespace(id2label=labels, **{"problem_type": None, **settings})
        self.logits = logits

    def __call__(self, **inputs):
        import torch

        return SimpleNamespace(logits=torch.tensor([self.logits]))


class TinyForSequenceClassification(Classifier): ...


class TinyForTokenClassification(Classifier):
    def can_generate(self):
        return False


def predicted(model):
    pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")
    from dstune.lakehouse.registered_model import ExportedModel

    served = ExportedModel()
    served.model, served.tokenizer = model, lambda text, **more: {}
    return served.predict(None, ["a text"])


def test_a_registered_model_answers_as_its_task_does():
    assert predicted(TinyForSequenceClassification([0.1, 2.0, -1.0])) == ["good"]
    several = {"problem_type": "multi_label_classification"}
    assert predicted(TinyForSequenceClassification([0.1, -2.0, 1.0], **several)) == ['["bad", "long"]']
    assert predicted(TinyForSequenceClassification([2.5], problem_type="regression")) == ["2.5"]
    assert predicted(TinyForSequenceClassification([2.5])) == ["2.5"], "one number is no choice"
    with pytest.raises(ValueError, match="no text to give for TinyForTokenClassification"):
        predicted(TinyForTokenClassification([1.0]))


def test_a_head_is_built_from_the_record_whatever_the_task_is_called(tmp_path):
    pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dstune.checkpoint import store
    from dstune.checkpoint.export import export_checkpoint
    from dstune.lakehouse.registered_model import load_export

    base = save_decoder(tmp_path / "base", tied=True)
    run_dir = saved_run(tmp_path, base, "task=reward", "method=full", "data.packing=false")
    whole = export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "whole")
    record = json.loads((whole / "dstune.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "dstune.json").write_text(json.dumps(record | {"task": {"name": "own_reward"}}))
    _, loaded = load_export(str(tmp_path / "adapter"))
    assert loaded.get_base_model().config.num_labels == 1
