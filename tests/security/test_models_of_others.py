"""Model folders of a stranger: what their files name, and what they are called."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from support.tiny import save_decoder

import dstune
from dstune.checkpoint.serving import vllm_problems
from dstune.cli import main
from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.launch.preflight import resolve_model
from dstune.models.base_weights import tensor_files
from dstune.serve import source


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in `Org/Model` of the working directory."""
    monkeypatch.chdir(tmp_path)
    return save_decoder(tmp_path / "Org" / "Model")


@pytest.mark.parametrize("kind", ["above", "absolute", "a second index"])
def test_weights_come_from_the_folder_of_their_index(kind: str, model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "elsewhere.safetensors"
    shutil.move(model / "model.safetensors", weights)
    name = str(weights) if kind == "absolute" else "../../elsewhere.safetensors"
    index = "model.safetensors.index.json" if kind != "a second index" else "other.safetensors.index.json"
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    if kind == "a second index":  # transformers is led there by the configuration
        shutil.copy(weights, model / "model.safetensors")
        description = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(description | {"transformers_weights": index}))
    with pytest.raises(UserError, match="outside of its folder"):
        resolve_model(ModelConfig(path=str(model)), lambda text: None)
    if kind != "a second index":
        with pytest.raises(UserError, match="outside of its folder"):
            tensor_files(model)
    with pytest.raises(UserError, match="outside of its folder"):
        vllm_problems(model)

    pytest.importorskip("mlflow")
    from dstune.lakehouse import registered_model

    with pytest.raises(ValueError, match="outside of its folder"):
        registered_model.load_export(str(model))


def test_weights_in_a_folder_below_are_read(model: Path) -> None:
    (model / "parts").mkdir()
    shutil.move(model / "model.safetensors", model / "parts" / "..a.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "parts/..a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    resolve_model(ModelConfig(path=str(model)), lambda text: None)


@pytest.mark.parametrize("way", ["train", "generate", "predict", "evaluate", "serve"])
def test_consent_to_the_code_of_a_hub_id_is_none_to_that_of_a_folder(
    way: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = model.parent.parent / "ran"
    (model / "evil.py").write_text(f"open({str(evil)!r}, 'w')\n")
    description = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(description | {"auto_map": classes, "model_type": "evil"}))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    trust = "model.trust_remote_code=true"
    words = {
        "train": ["train", "model.path=Org/Model", trust, "data.train=rows.jsonl", "run.dir=out"],
        "generate": ["generate", "Org/Model", "--trust-remote-code", "--prompt", "a"],
        "predict": ["predict", "Org/Model", "--trust-remote-code", "--text", "a"],
        "evaluate": ["evaluate", "Org/Model", trust, "data.train=rows.jsonl"],
        "serve": ["serve", "Org/Model", "--trust-remote-code"],
    }
    assert main(words[way]) == 2
    assert "./Org/Model" in capsys.readouterr().err
    assert not evil.exists()


def test_a_folder_that_is_written_as_one_is_taken(model: Path) -> None:
    told: list[str] = []
    for path in ("./Org/Model", str(model)):
        assert resolve_model(ModelConfig(path=path, trust_remote_code=True), told.append).path == path
    assert told == []
    resolve_model(ModelConfig(path="Org/Model"), told.append)
    assert "./Org/Model" in told[0]
    with pytest.raises(UserError, match=r"\./Org/Model"):
        source.resolve("", "Org/Model", trust_remote_code=True)


@pytest.mark.parametrize("part", ["model", "part of it"])
def test_the_file_of_a_model_names_no_kernel_of_a_hub(part: str, tmp_path: Path) -> None:
    """transformers downloads "OWNER/NAME" and runs it."""
    from dstune.config.compose import compose
    from dstune.models.load import load_config

    values = {"attn_implementation": "someone/kernel", "experts_implementation": "someone/experts"}
    config: dict[str, object] = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, **values}
    if part != "model":
        config = {
            "model_type": "llava",
            "text_config": config,
            "vision_config": {"model_type": "clip_vision_model", **values},
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_config(compose([f"model.path={tmp_path}", "data=chitchat"]).config.model)
    requested = [
        one.__dict__.get(f"_{kind}_implementation_internal")
        for one in (loaded, *(getattr(loaded, name) for name in type(loaded).sub_configs))
        for kind in ("attn", "experts")
    ]
    assert set(requested) == {None}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_file_of_a_model_may_name_what_transformers_has(name: str, tmp_path: Path) -> None:
    from dstune.config.compose import compose
    from dstune.models.load import load_config

    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "attn_implementation": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(compose([f"model.path={tmp_path}", "data=chitchat"]).config.model)._attn_implementation == name


def calls_that_load(file: Path) -> list[tuple[str, str]]:
    """The calls in a file that read a model's config.json, each with what is around it."""
    tree = ast.parse(file.read_text())
    around = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            of = ast.unparse(node.func.value)
            outer = around[id(node)]
            wrapper = ast.unparse(outer.func) if isinstance(outer, ast.Call) else ""
            if of == "AutoConfig":
                calls.append((f"{file.name}:{node.lineno}", wrapper))
            elif of.startswith("AutoModel"):
                has_config = any(keyword.arg == "config" for keyword in node.keywords)
                calls.append((f"{file.name}:{node.lineno}", "config" if has_config else ""))
    return calls


def test_no_loader_reads_the_kernels_of_a_file() -> None:
    """Also those of exports, compression and quantization. Samples are dstune's own; MLflow's code works without dstune."""
    root = Path(dstune.__file__).parent
    own = {root / "samples" / "convert.py", root / "lakehouse" / "registered_model.py"}
    calls = [call for file in root.rglob("*.py") if file not in own for call in calls_that_load(file)]
    assert len(calls) > 6
    unlimited = {place for place, around in calls if around not in ("without_stored_implementations", "config")}
    assert {place.partition(":")[0] for place in unlimited} <= {"inventory.py"}, "which does so in the next line"


def test_the_code_in_mlflow_names_no_kernel_of_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")
    from transformers import AutoConfig, AutoModel

    from dstune.lakehouse import registered_model

    values = {
        "attn_implementation": "someone/kernel",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "model_type": "llama",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded: list[object] = []

    def load(folder: str, config: object, **options: object) -> None:
        loaded.append(config.__dict__.get("_attn_implementation_internal"))
        raise EOFError

    monkeypatch.setattr(AutoModel, "from_pretrained", load)
    with pytest.raises(EOFError):
        registered_model._whole(str(tmp_path), AutoConfig.from_pretrained(tmp_path))
    assert loaded == [None]
