"""`dstune models`: which models a task can start from, and what is said of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.tiny import save_bart, save_decoder, save_encoder

from dstune import catalogue
from dstune.config.compose import compose
from dstune.config.presets import model_files
from dstune.core.errors import EXIT_FAILED, EXIT_PREEMPTED, DstuneError, Problem, UserError
from dstune.evaluation import command as evaluate
from dstune.launch import plan
from dstune.planning.published import PUBLISHED
from dstune.planning.published_today import TODAY

PREPARED = ("bert_base", "t5_small", "qwen3_4b", "llama3_8b", "llama3_70b")
PARAMETERS = 25_312
"""Of the decoder: 2 x 105 x 32 for the vocabulary, two layers of 9,280 and a norm."""


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub and of samples, and folders with models of each kind."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    few = [file for file in model_files() if file.stem in PREPARED]
    monkeypatch.setattr(catalogue, "model_files", lambda: few)  # planning all of them takes seconds
    monkeypatch.setattr(catalogue, "PUBLISHED", {})
    save_decoder(tmp_path / "decoder")
    save_encoder(tmp_path / "encoder")
    save_bart(tmp_path / "bart")
    return tmp_path


def listed(capsys, *words: object) -> dict[str, dict]:
    assert catalogue.main([*map(str, words), "--json"]) == 0
    return {row["choose"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_task_starts_from_models_of_its_kind(shelf, capsys):
    folders = {name: shelf / name for name in ("decoder", "encoder", "bart")}
    kinds = {"chat": {"decoder"}, "classification": {"decoder", "encoder"}, "seq2seq": {"decoder", "bart"}}
    kinds |= {"token_classification": {"decoder", "encoder"}, "embedding": {"decoder", "encoder"}}
    for task, expected in kinds.items():
        packing = ["data.packing=false"] if task != "chat" else []
        found = listed(capsys, *folders.values(), f"task={task}", *packing, "hardware=H100")
        assert {name for name in folders if f"model.path={folders[name]}" in found} == expected, task
        assert ("model=bert_base" in found) is ("encoder" in expected) and ("model=t5_small" in found) is (
            "bart" in expected
        )


def test_the_description_of_a_model(shelf, capsys):
    (shelf / "decoder" / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A model\n")
    snapshot = shelf / "hub" / "models--me--mine" / "snapshots" / "abc"
    save_decoder(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    found = listed(capsys, shelf / "decoder", "method=lora", "hardware=8xH100-80G")
    own = found[f"model.path={shelf / 'decoder'}"]
    assert own["here"] and own["licence"] == "mit" and own["context"] == 256 and own["zero"] == "ZeRO-0"
    assert own["parameters"] == PARAMETERS
    cached = found["model.path=me/mine"]
    assert cached["here"] and cached["origin"] == "cache" and cached["gated"] is None
    assert found["model=llama3_8b"]["gated"] is True and not found["model=llama3_8b"]["here"]
    assert found["model.path=sample://smollm2"]["licence"] == "Apache-2.0"
    assert not found["model.path=sample://smollm2"]["here"]
    here = [row["here"] for row in found.values()]
    assert here == sorted(here, reverse=True), "those that are here come first"
    assert catalogue.main([str(shelf / "decoder"), "hardware=8xH100-80G"]) == 0
    text = capsys.readouterr().out
    assert "model=llama3_8b" in text and "ZeRO-" in text and "mit" in text


def test_models_of_today_tell_what_they_are_and_who_says_so(shelf, capsys, monkeypatch):
    """Those of `model=NAME` and others; a model for embeddings is no start for a chat."""
    paths = ("Qwen/Qwen3-4B", "HuggingFaceTB/SmolLM3-3B", "Qwen/Qwen3-Embedding-0.6B")
    today = {model.path: model for model in TODAY if model.path in paths}
    monkeypatch.setattr(catalogue, "PUBLISHED", today)
    found = listed(capsys, "task=chat", "method=lora", "hardware=24G")
    smol = found["model.path=HuggingFaceTB/SmolLM3-3B"]
    assert (smol["licence"], smol["year"], smol["modality"], smol["context"]) == ("apache-2.0", 2025, "text", 65536)
    assert smol["parameters"] == 3_075_098_624 and smol["origin"] == "published" and not smol["here"]
    assert smol["source"].endswith(", 2026-12-01")
    assert "model.path=Qwen/Qwen3-Embedding-0.6B" not in found
    embedding = listed(capsys, "task=embedding", "data.packing=false", "hardware=24G")
    assert embedding["model.path=Qwen/Qwen3-Embedding-0.6B"]["source"] == "unverified"
    assert catalogue.main(["task=embedding", "data.packing=false", "hardware=24G"]) == 0
    text = capsys.readouterr().out
    assert "apache-2.0?" in text and "; ?: licence, year and context from memory" in text


def test_every_preset_of_the_hub_has_licence_year_and_context():
    paths = [yaml.safe_load(file.read_text())["path"] for file in model_files()]
    missing = [path for path in paths if not path.startswith("sample://") and path not in PUBLISHED]
    assert not missing
    assert PUBLISHED["Qwen/Qwen2.5-3B-Instruct"].licence == "qwen-research"  # and that of the other sizes is not
    assert PUBLISHED["Qwen/Qwen2.5-7B-Instruct"].licence == "apache-2.0"
    gated = {path for path in paths if path in PUBLISHED and PUBLISHED[path].gated}
    said = {yaml.safe_load(f.read_text())["path"] for f in model_files() if "Gated" in f.read_text()}
    assert gated == said, "a preset's comment says so too"


@pytest.mark.parametrize("device", ["8xH100-80G", "2xRTX4090"])
def test_the_smallest_zero_is_the_first_of_the_plan_that_fits(shelf, capsys, device):
    words = ["task=chat", "method=full", f"hardware={device}", "hardware.host_gib=2000"]
    found = listed(capsys, *words)
    for name in ("qwen3_4b", "llama3_8b", "llama3_70b"):
        one = ["trainer.micro_batch_size=1", "trainer.global_batch_size=1"]
        assert plan.main([f"model={name}", *words, *one, "--json"]) == 0
        choices = [row for row in json.loads(capsys.readouterr().out)["choices"] if row["fits"]]
        expected = "none fits"
        if choices:
            ways = [False, "selective", True]
            least = min(
                choices,
                key=lambda row: (row["offload"] != "none", row["zero"], ways.index(row["activation_checkpointing"])),
            )
            expected = least["zero"].replace("stage", "ZeRO-")
        assert found[f"model={name}"]["zero"].startswith(expected), (name, found[f"model={name}"], choices)


def test_the_hub_is_queried_where_it_is_reachable(shelf, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        catalogue.main(["--hub", "tiny"])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)

    def list_models(self, **keywords):
        assert (keywords["search"], keywords["sort"]) == ("tiny", "downloads")
        card = SimpleNamespace(to_dict=lambda: {"license": "llama3"})
        return [SimpleNamespace(id="them/tiny", card_data=card, gated="manual")]

    def download(repository, name):
        snapshot = shelf / "hub" / "models--them--tiny" / "snapshots" / "def"
        snapshot.mkdir(parents=True)
        (snapshot / name).write_bytes((shelf / "decoder" / name).read_bytes())
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("def")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", list_models)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = listed(capsys, "--hub", "tiny", "hardware=H100")["model.path=them/tiny"]
    assert (found["licence"], found["gated"], found["here"], found["origin"]) == ("llama3", True, False, "hub")
    assert found["parameters"] == PARAMETERS

    def unreachable(self, **keywords):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", unreachable)
    with pytest.raises(UserError, match="cannot be reached"):
        catalogue.main(["--hub", "tiny"])


def test_every_prepared_model_is_listed(capsys, monkeypatch):
    """Those that the planner counts are in `test_plan_published.py`."""
    monkeypatch.setattr(catalogue.counted, "count", lambda *_: [{"error": "not counted here"}])
    found = listed(capsys, "task=seq2seq", "data.packing=false", "hardware=H100")
    expected = {
        file.stem
        for file in model_files()
        if not file.stem.startswith(("bert", "deberta", "modernbert", "minilm", "smollm2"))
        and not re.search("embedding|reranker", file.stem)
    }
    assert expected <= {choose.removeprefix("model=") for choose in found}
    planned = [row for row in found.values() if row["origin"] == "preset" and "not counted here" not in row["note"]]
    assert len(planned) > 40 and all(row["zero"] and row["parameters"] for row in planned)


def test_what_is_refused(shelf):
    with pytest.raises(UserError, match=r"there is no such folder"):
        catalogue.main([str(shelf / "nothing")])
    with pytest.raises(UserError, match="has no answers to task=reward"):
        catalogue.main(["task=reward", "data.packing=false", "--probe", "rows.jsonl", "hardware=H100"])
    with pytest.raises(UserError, match="no model of the task is on this machine"):
        catalogue.main(["--probe", "rows.jsonl", "hardware=H100"])


@pytest.mark.parametrize(
    "words",
    [["data.max_length=0"], ["data.max_length=-5"], ["trainer.micro_batch_size=0"], ["method=lora", "method.rank=0"]],
)
def test_numbers_are_in_the_ranges_of_a_training(shelf, words):
    with pytest.raises(UserError, match=f"{words[-1]}: must be"):
        catalogue.main([*words, "hardware=H100"])


def test_a_length_that_is_no_number_is_none(shelf, capsys):
    file = shelf / "decoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": "2048"}))
    assert listed(capsys, shelf / "decoder", "hardware=H100")[f"model.path={shelf / 'decoder'}"]["context"] is None
    assert catalogue.main([str(shelf / "decoder"), "hardware=H100"]) == 0


@pytest.mark.parametrize("name", ["a,b.jsonl", "rows (1).jsonl", "it's.jsonl"])
def test_the_rows_of_a_probe_have_any_name(shelf, monkeypatch, name):
    def ask(argv):
        given = compose([word for word in argv[1:] if word.startswith("data.")]).config.data.validation
        raise UserError(Problem("here", f"asked on {given}"))

    monkeypatch.setattr(evaluate, "run_command", ask)
    with pytest.raises(UserError) as refused:
        catalogue.main([str(shelf / "decoder"), "task=chat", "--probe", name, "hardware=H100"])
    assert f"not evaluated: asked on {name}" in str(refused.value)


def test_a_signal_ends_the_probe_and_not_one_model_alone(shelf, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "run_command", lambda argv: EXIT_PREEMPTED)
    words = [str(shelf / "decoder"), "task=chat", "--probe", "rows.jsonl", "hardware=H100"]
    with pytest.raises(DstuneError, match=rf"stopped while {shelf / 'decoder'} was evaluated"):
        catalogue.main(words)
    assert evaluate.main([str(shelf / "decoder")]) == EXIT_FAILED
