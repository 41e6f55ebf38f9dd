"""Exports in MLflow's registry, on SQLite: loaded back by alias in another process, with the logits of the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command import Commands
from support.tiny import save_decoder, write_dialogues

pytest.importorskip("mlflow", reason="pip install '.[mlflow-server]' in a clone of dstune")
pytest.importorskip("alembic", reason="pip install '.[mlflow-server]' in a clone of dstune")
pytest.importorskip("flask", reason="pip install '.[mlflow-server]' in a clone of dstune")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("registry")
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 60)
    place = Commands(folder)
    place.env |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_USERNAME": "",
    }
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    words = ["data.train=dialogues.jsonl", "data.max_length=64", "trainer.max_steps=2", "launch.processes=1"]
    words += [
        "trainer.global_batch_size=4",
        "checkpoint.every=1",
        "checkpoint.keep=5",
        "optimizer.lr=1e-2",
        "evaluate.every=0",
    ]
    for name, method in (("full", "full"), ("lora", "lora")):
        done = place.run(
            "train", f"model.path={folder}/model", *words, f"method={method}", f"run.dir={name}", f"run.name={name}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return place


def client(place: Commands):
    from mlflow.tracking import MlflowClient

    uri = place.env["MLFLOW_TRACKING_URI"]
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def aliases(place: Commands) -> dict[str, str]:
    return {name: str(number) for name, number in client(place).get_registered_model("film").aliases.items()}


def register(place: Commands, *words: str) -> dict:
    done = place.run("export", *words, "--json", "--no-reference", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


FRESH = """
import sys, mlflow.pyfunc, numpy
loaded = mlflow.pyfunc.load_model(sys.argv[1])
import pandas
print(loaded.predict(pandas.DataFrame({"text": ["Hello"]}), params=None))
model = loaded.unwrap_python_model()
numpy.save(sys.argv[2], sys.modules[type(model).__module__].probe(model.model))
"""


DESCRIBED = """
import sys, mlflow
from mlflow.models import Model
path = mlflow.artifacts.download_artifacts(sys.argv[1])
model = Model.load(path)
example = model.load_input_example(path)
print(model.signature.inputs.input_names(), [str(kind.name) for kind in model.signature.outputs.input_types()], len(example) == 1)
"""


def fresh_logits(place: Commands, uri: str, out: Path) -> np.ndarray:
    """In a process that has no dstune."""
    env = {**place.env, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", FRESH, uri, str(out)], env=env, check=True, cwd=place.folder)
    return np.load(out)


def own_logits(export: Path) -> np.ndarray:
    """The export as transformers and peft load it."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = (export / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(export).eval()
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[(7 * place + 3) % size for place in range(12)]])
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().numpy()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_loaded_back_by_alias_in_another_process(place, tmp_path, kind):
    first = register(place, kind, "--register", f"models:/{kind}@champion")
    assert (first["version"], first["created"], first["before"]) == ("1", True, None)
    again = register(place, kind, "--register", f"models:/{kind}@champion")
    assert (again["version"], again["created"]) == ("1", False)
    assert len(client(place).search_model_versions(f"name='{kind}'")) == 1
    logits = fresh_logits(place, f"models:/{kind}@champion", tmp_path / "logits.npy")
    assert np.array_equal(logits, own_logits(place.folder / kind / "export"))
    described = subprocess.run(
        [sys.executable, "-c", DESCRIBED, f"models:/{kind}@champion"],
        env={**place.env, "PYTHONPATH": ""},
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert described.stdout.split() == ["['text']", "['string']", "True"], described.stdout
    tags = client(place).get_model_version(kind, "1").tags
    assert tags["dstune_run"] == kind
    assert tags["dstune_step"] == "2"
    assert tags["dstune_data_train"] == "dialogues.jsonl"


def test_promotion_rollback_and_a_promotion_that_fails(place):
    register(place, "full", "--register", "models:/film@champion")
    other = register(place, "full", "--checkpoint", "1", "--out", "step-1", "--register", "models:/film@champion")
    assert (other["version"], other["before"]) == ("2", "1")
    assert aliases(place) == {"champion": "2", "champion-previous": "1"}
    back = place.run("export", "models:/film@champion", "--rollback", "--json")
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["version"] == "1"
    assert aliases(place) == {"champion": "1", "champion-previous": "2"}

    # What is in the registry is not what was exported: its weights are those of another step.
    version = client(place).get_model_version("film", "2")
    client(place).delete_model_version_tag("film", "2", "dstune_proven")
    logged = client(place).get_logged_model(version.source.rpartition("/")[2])
    weights = next(Path(logged.artifact_location.removeprefix("file://")).rglob("model.safetensors"))
    weights.write_bytes((place.folder / "full" / "export" / "model.safetensors").read_bytes())
    failed = place.run("export", "full", "--checkpoint", "1", "--out", "step-1b", "--register", "models:/film@champion")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "answers otherwise than the export" in failed.stderr
    assert aliases(place)["champion"] == "1"
    wrong = place.run("export", "full", "--register", "film")
    assert wrong.returncode == 2
    assert "no place in a model registry" in wrong.stderr
