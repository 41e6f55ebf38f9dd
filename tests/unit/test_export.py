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


def test_cut_reads_across_pieces():
    pieces = [torch.arange(0, 3), torch.arange(3, 4), torch.arange(4, 9)]
    for start in range(9):
        for count in range(1, 9 - start + 1):
            assert cut(pieces, start, count).tolist() == list(range(start, start + count))
    with pytest.raises(AssertionError, match="1 elements early"):
        cut(pieces, 7, 3)
