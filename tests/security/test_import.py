"""`dstune import` of somebody's file: it stays data, whatever is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dstune.importing.convert import Experiment, convert
from dstune.importing.files import read, tool_of

PLAIN = {"base_model": "owner/name", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}], "sequence_len": 512}


def imported(tmp_path: Path, keys: dict[str, object], name: str = "their.yaml") -> Experiment:
    file = tmp_path / name
    file.write_text(yaml.safe_dump({**PLAIN, **keys}))
    raw = read(file)
    return convert(raw, tool_of(raw, "axolotl", str(file)), file)


INJECTED = "\ndefaults:\n  - override /launch: slurm\nlaunch:\n  setup: ['touch /tmp/owned']\n#"


@pytest.mark.parametrize(
    "keys",
    [
        {f"unknown{INJECTED}": 1},
        {"unknown": INJECTED},
        {"unknown\r\nlaunch: {name: slurm}": True},
        {"unknown\u2028launch: 1": True},
        {"chat_template": f"x{INJECTED}"},
        {"base_model": f"owner/name{INJECTED}"},
    ],
)
def test_no_key_or_value_leaves_its_place(keys: dict[str, object], tmp_path: Path) -> None:
    found = imported(tmp_path, keys)
    content = yaml.safe_load(found.text)
    assert "launch" not in content
    assert "slurm" not in str(content["defaults"])
    assert all(
        "launch" not in line for line in found.text.splitlines() if not line.startswith(("#", "  path:", "model"))
    )


def test_a_file_name_stays_in_its_comment(tmp_path: Path) -> None:
    found = imported(tmp_path, {}, name="a\nlaunch: {name: slurm}\n#.yaml")
    assert "launch" not in yaml.safe_load(found.text)


@pytest.mark.parametrize("text", ["${oc.env:HF_TOKEN}", "x-${oc.env:HF_TOKEN,none}", "${model.path}", "${oc.decode:1}"])
@pytest.mark.parametrize("key", ["base_model", "wandb_project", "output_dir", "hub_model_id"])
def test_references_are_not_carried_over(key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    found = imported(tmp_path, {key: text})
    assert "${" not in "\n".join(line for line in found.text.splitlines() if not line.startswith("#"))
    assert "hf_secret" not in found.text


def test_the_code_of_a_model_is_not_trusted_by_somebodys_file(tmp_path: Path) -> None:
    found = imported(tmp_path, {"trust_remote_code": True})
    assert "trust_remote_code" not in str(yaml.safe_load(found.text))
    assert "read it" in found.dropped["trust_remote_code"].reason
