"""What of an export needs no trained run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstune.checkpoint.shards import cut
from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.inference import export_command
from dstune.protocols import METHODS
from tests.support.generation import saved_run
from tests.support.tiny import save_decoder


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


@pytest.mark.parametrize(
    ("method", "title"),
    [
        *(("lora", "A LoRA"), ("qlora", "A LoRA"), ("ia3", "An IA3"), ("vera", "A VeRA"), ("oft", "An OFT")),
        *(("prompt", "A prompt-tuning"), ("prefix", "A prefix-tuning"), ("p_tuning", "A P-tuning")),
    ],
)
def test_the_card_names_the_kind_of_adapter(tmp_path, monkeypatch, method, title):
    from dstune.checkpoint.card import Export, _sections
    from tests.support.configs import run_config

    def opening() -> str:
        config = run_config(method=METHODS[method].Config())
        return next(_sections(tmp_path, Export(tmp_path, config, {}, adapter=True))).split("\n\n")[1]

    assert opening().startswith(f"{title} adapter of")
    monkeypatch.setattr(METHODS[method], "adapter_name", "")
    assert f" {method} adapter of" in opening()


def test_arguments_of_the_template_are_evaluated_as_they_were_trained(tmp_path):
    from dstune.checkpoint.record import recorded_overrides

    given = {"enable_thinking": False, "tone": "it's warm", "levels": [1, None]}
    task = {"name": "chat", "chat_template_kwargs": given}
    (tmp_path / "dstune.json").write_text(json.dumps({"task": task, "data": {"format": "auto"}}))
    found = compose([*recorded_overrides(tmp_path, []), "model.path=sample://smollm2", "data.train=x.jsonl"])
    assert found.config.task.chat_template_kwargs == given


def test_an_export_is_read_with_and_without_the_plugin_of_its_rows(tmp_path, monkeypatch):
    from dstune.checkpoint.record import recorded_overrides
    from dstune.core import plugins

    monkeypatch.chdir(Path(__file__).parents[2] / "examples" / "plugins")
    data = {"format": "star_rating", "shape": "text_label"}
    (tmp_path / "dstune.json").write_text(json.dumps({"task": {"name": "ordinal"}, "data": data}))
    with pytest.raises(UserError, match="there is no such task"):
        recorded_overrides(tmp_path, [])
    both = ["plugins=[./ordinal.py,./star_rating.py]"]
    assert recorded_overrides(tmp_path, both) == ["task=ordinal", "data.format='star_rating'"]
    assert recorded_overrides(tmp_path, ["plugins=[./ordinal.py]"]) == ["task=ordinal", "data.format='text_label'"]
    plugins.activate([])


def test_the_verb_is_light_to_import():
    program = (
        "import sys, dstune.checkpoint.export; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_a_rollback_refuses_what_it_would_not_do():
    with pytest.raises(UserError) as refused:
        export_command.main(["models:/film@champion", "--rollback", "--merge", "--out", "x", "--register", "models:/y"])
    assert [problem.where for problem in refused.value.problems] == ["--out", "--merge", "--register"]


@pytest.mark.parametrize("size", ["500", "0", "0GB", "5 GB", "-1GB"])
def test_a_shard_has_a_size_with_a_unit(tmp_path, size):
    run_dir = saved_run(tmp_path, save_decoder(tmp_path / "decoder"), "task=chat", "method=full")
    with pytest.raises(UserError, match=f"--max-shard-size={size}: must be a whole number"):
        export_command.main([str(run_dir), f"--max-shard-size={size}"])
    assert not list(run_dir.glob("export*"))


def test_cut_reads_across_pieces():
    pieces = [torch.arange(0, 3), torch.arange(3, 4), torch.arange(4, 9)]
    for start in range(9):
        for count in range(1, 9 - start + 1):
            assert cut(pieces, start, count).tolist() == list(range(start, start + count))
    with pytest.raises(AssertionError, match="1 elements early"):
        cut(pieces, 7, 3)


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, ["temperature", "top_p"]),
        ({"length_penalty": 2.0, "output_scores": True}, ["length_penalty", "output_scores"]),
        ({"temperature": 0.6, "do_sample": True, "repetition_penalty": 1.1}, []),
    ],
)
def test_generation_settings_without_effect_are_left_out_and_change_nothing_else(tmp_path, caplog, settings, left_out):
    from transformers import GenerationConfig

    from dstune.checkpoint import store
    from dstune.checkpoint.export import export_checkpoint

    base = save_decoder(tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps({"max_length": 40, **settings}))
    run_dir = saved_run(tmp_path, base, "task=chat", "method=full")
    saved = GenerationConfig.from_pretrained(export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "out"))
    assert bool(saved.do_sample) == settings.get("do_sample", False)
    kept = {name: value for name, value in settings.items() if name not in left_out}
    assert {name: getattr(saved, name) for name in kept} == kept and saved.max_length == 40
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("dstune.checkpoint")]
    assert len(messages) == bool(left_out) and all(name in messages[0] for name in left_out)


def test_trained_parameters_without_a_place_in_the_export_are_refused(tmp_path):
    from dstune.checkpoint import store
    from dstune.checkpoint.export import export_checkpoint

    run_dir = saved_run(tmp_path, save_decoder(tmp_path / "base"), "task=chat", "method=full")
    checkpoint = store.newest(run_dir)
    file = checkpoint / "mp_rank_00_model_states.pt"
    state = torch.load(file)
    name = "model.layers.0.self_attn.q_proj"
    state["module"][f"{name}.inner.weight"] = state["module"].pop(f"{name}.weight")
    state["module"]["lm_head.weight"], state["module"]["counter"] = torch.zeros(1), torch.zeros(1)
    state["buffer_names"] = ["counter"]
    torch.save(state, file)
    with pytest.raises(UserError) as refused:
        export_checkpoint(run_dir, checkpoint, tmp_path / "out")
    (problem,) = refused.value.problems
    assert problem.where == "method" and problem.reason.endswith(f": {name}.inner.weight")
