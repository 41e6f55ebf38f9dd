"""What an export has beside the weights, and the verb that makes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.inference import export_command
from tests.support.exports import load

# -- what is beside the weights --------------------------------------------------------------------------------------


def test_the_model_card(shelf):
    from huggingface_hub import ModelCard

    card = ModelCard.load(shelf.run("lora-2") / "export" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["dstune", "chat", "lora"]
    assert "base_model" not in data, "a folder of the user's own is no id on the hub"
    state = store.read_state(store.newest(shelf.run("lora-2")))
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {name: value for name, value in state["metrics"].items() if name != "targets"}
    for expected in (
        "AutoPeftModelForCausalLM",
        "| optimizer | adamw |",
        "`chat.jsonl`",
        "| method.rank | 4 |",
        "| train |",
        "torch ",
    ):
        assert expected in card.content
    assert str(shelf.folder) not in card.content, "paths of this machine are nobody else's business"


def test_the_code_of_the_model_card_runs(shelf, capsys):
    for name in ("full-2", "lora-2", "labels-2", "labels-lora-3"):
        folder = shelf.run(name) / "export"
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code = code.replace('"PATH"', repr(str(folder))).replace("max_new_tokens=256", "max_new_tokens=4")
        exec(compile(code, str(folder / "README.md"), "exec"), {})
    assert capsys.readouterr().out.count("\n") == 4


def test_a_sample_and_a_hub_id_are_named_in_the_card():
    from dataclasses import replace

    from dstune.checkpoint.card import _datasets, _hub_name, _licence
    from tests.support.configs import run_config

    assert _hub_name("sample://smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert _licence("sample://gemma3") == "gemma"
    assert _hub_name("org/name") == "org/name" and _hub_name("/home/me/model") is None
    config = run_config()
    for path, ids in (("org/rows:train_sft", ["org/rows"]), ("data/rows.jsonl", []), ("sample://chitchat", [])):
        assert _datasets(replace(config, data=replace(config.data, train=path))) == ids


def test_an_export_says_how_it_is_evaluated(shelf):
    from dstune.checkpoint.record import recorded_overrides

    chat = recorded_overrides(shelf.run("full-2") / "export", [])
    assert chat[0] == "task=chat" and "data.max_length=64" in chat and "data.packing=true" in chat
    assert any(text.startswith("task.template_date='20") for text in chat)
    labels = recorded_overrides(shelf.run("labels-2") / "export", [])
    assert labels[0] == "task=classification" and "task.labels=['left','right']" in labels
    assert recorded_overrides(shelf.run("labels-2") / "export", ["task=chat"])[0].startswith("data.")
    compose([*labels, "data.train=x.jsonl"])


def test_arguments_of_the_template_are_evaluated_as_they_were_trained(tmp_path):
    from dstune.checkpoint.record import recorded_overrides

    given = {"enable_thinking": False, "tone": "it's warm", "levels": [1, None]}
    task = {"name": "chat", "chat_template_kwargs": given}
    (tmp_path / "dstune.json").write_text(json.dumps({"task": task, "data": {"format": "auto"}}))
    found = compose([*recorded_overrides(tmp_path, []), "model.path=sample://smollm2", "data.train=x.jsonl"])
    assert found.config.task.chat_template_kwargs == given


def test_a_classifier_of_other_origin_is_evaluated_as_one(shelf, tmp_path):
    from dstune.checkpoint.record import recorded_overrides

    folder = shutil.copytree(shelf.run("labels-2") / "export", tmp_path / "copy")
    (folder / "dstune.json").unlink()
    assert recorded_overrides(folder, []) == ["task=classification"]
    assert recorded_overrides(shelf.model("full-2"), []) == []


def test_what_vllm_asks_for(shelf, tmp_path):
    from dstune.checkpoint.serving import vllm_problems

    for name in ("full-3", "lora-2", "tokens-full-3"):
        assert vllm_problems(shelf.run(name) / "export") == [], name
    (problem,) = vllm_problems(shelf.run("tokens-tied-1") / "export")
    assert "no low-rank matrices" in problem
    assert "trained as a whole" in vllm_problems(shelf.run("labels-lora-3") / "export")[0]
    broken = shutil.copytree(shelf.run("full-3") / "export", tmp_path / "broken")
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (broken / file).unlink()
    assert len(vllm_problems(broken)) == 4


# -- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_exports_a_named_step(shelf, tmp_path, capsys):
    run_dir, out = shelf.run("full-3"), tmp_path / "out"
    assert export_command.main([str(run_dir), "--checkpoint", "2", "--out", str(out), "--json"]) == 0
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    expected = {
        "export": str(out),
        "kind": "model",
        "checkpoint": str(checkpoint),
        "vllm_problems": [],
        "reference": True,
    }
    printed = capsys.readouterr()
    assert json.loads(printed.out) == expected, printed.err
    whole = shelf.whole("full-3", step=2)
    assert all(torch.equal(weight, whole[key]) for key, weight in load(out).named_parameters())


def test_the_verb_merges_beside_the_adapter(shelf, capsys):
    run_dir = shelf.run("lora-1")
    try:
        assert export_command.main([str(run_dir), "--merge"]) == 0
        assert (run_dir / "export-merged" / "config.json").exists()
        assert (run_dir / "export" / "adapter_config.json").exists()
        assert str(run_dir / "export-merged") in capsys.readouterr().out
    finally:
        shutil.rmtree(run_dir / "export-merged", ignore_errors=True)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        export_command.main(arguments)
    return str(caught.value)


def test_what_the_verb_refuses(shelf, tmp_path):
    run_dir = shelf.run("full-3")
    before = (run_dir / "export" / "config.json").stat().st_mtime_ns
    step = json.loads((run_dir / "export" / "dstune.json").read_text())["step"]
    assert f"exists already: the export of step {step}" in refusal([str(run_dir)])
    assert (run_dir / "export" / "config.json").stat().st_mtime_ns == before
    assert "no such run directory" in refusal([str(tmp_path / "nowhere")])
    assert "no run.yaml" in refusal([str(tmp_path)])
    assert "there are steps 2, 3" in refusal([str(run_dir), "--checkpoint", "7", "--out", str(tmp_path / "out")])
    assert "nothing to merge" in refusal([str(run_dir), "--merge"])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "no former export" in refusal([str(run_dir), "--out", str(precious), "--force"])
    assert (precious / "thesis.txt").exists()
    assert not list(tmp_path.glob("*.incomplete"))


def test_force_replaces_a_former_export(shelf, tmp_path):
    run_dir, out = shelf.run("full-2"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "leftover.safetensors").write_text("")
    assert export_command.main([str(run_dir), "--out", str(out), "--force"]) == 0
    assert not (out / "leftover.safetensors").exists()
    load(out)


def test_the_verb_is_light_to_import():
    program = (
        "import sys, dstune.checkpoint.export; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_a_rollback_refuses_what_it_would_not_do():
    with pytest.raises(UserError) as refused:
        export_command.main(["models:/film@champion", "--rollback", "--merge", "--out", "x", "--register", "models:/y"])
    assert [problem.where for problem in refused.value.problems] == ["--out", "--merge", "--register"]
