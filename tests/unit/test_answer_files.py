"""Files of an export that decide answers: edited ones are refused, and accepted when the user says so."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from dstune.checkpoint.answer_files import changed_files, digest_files
from dstune.checkpoint.export import export_checkpoint, export_gguf, find_checkpoint
from dstune.checkpoint.gguf_header import metadata_digests
from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.inference.export_command import main
from dstune.inference.reference import CONVERSATIONS, add_reference, base_reference
from dstune.serve.engines.base import Engine, Limits
from dstune.serve.parity import Proof, Refused, prove
from dstune.serve.source import resolve
from tests.support.gguf_models import save_model
from tests.support.served_runs import save_run
from tests.support.tiny import save_decoder, write_dialogues


@dataclass
class AnswersAsReferred(Engine):
    """An engine that no row of a reference can fault."""

    name: ClassVar[str] = "stub"

    def __post_init__(self):
        self.dtype = "float32"

    def rows(self):
        folder = self.source.reference or self.source.folder
        return json.loads((folder / "reference.json").read_text())["rows"]

    async def prompt_ids(self, model, row):
        return next(own["prompt_ids"] for own in self.rows() if own["messages"] == row["messages"])

    async def logprobs(self, model, prompt, targets):
        row = next(own for own in self.rows() if own["prompt_ids"] == prompt and own["target_ids"] == targets)
        return row["base_logprobs" if model == "base" else "logprobs"]


def proof_of(folder: Path) -> Proof:
    source = resolve("m", str(folder))
    engine = AnswersAsReferred(source, "m", folder, folder, Limits())
    return asyncio.run(prove(engine, "m", source, "base" if source.adapter else None))


@dataclass(frozen=True)
class Made:
    run: Path
    export: Path


def make(folder: Path, *words: str) -> Made:
    chats = write_dialogues(folder / "chat.jsonl", 30)
    run = save_run(folder / "run", save_decoder(folder / "base"), chats, "task=chat", *words)
    out = run / "export"
    export_checkpoint(run, find_checkpoint(run, "last"), out)
    return Made(run, out)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Made:
    made = make(tmp_path_factory.mktemp("full"), "method=full")
    assert add_reference(made.export, made.run) == ""
    return made


@pytest.fixture
def export(full, tmp_path) -> Path:
    return Path(shutil.copytree(full.export, tmp_path / "export"))


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def swap_two_words(export: Path) -> None:
    tokenizer = json.loads((export / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (export / "tokenizer.json").write_text(json.dumps(tokenizer))


def default_system(export: Path) -> None:
    template = export / "chat_template.jinja"
    template.write_text("{% if not messages %}Obey.{% endif %}" + template.read_text())


EDITS = {
    "chat_template.jinja": default_system,
    "tokenizer.json": swap_two_words,
    "generation_config.json": lambda export: change_json(
        export / "generation_config.json", eos_token_id=7, temperature=1.5, do_sample=True
    ),
    "config.json": lambda export: change_json(export / "config.json", max_position_embeddings=7),
    "tokenizer_config.json": lambda export: change_json(export / "tokenizer_config.json", add_bos_token=True),
    "dstune.json": lambda export: change_json(export / "dstune.json", task={"name": "chat", "loss": "other"}),
    "chat_template.json": lambda export: (export / "chat_template.json").write_text("{}"),
    "modeling_other.py": lambda export: (export / "modeling_other.py").write_text(""),
    "additional_chat_templates/tool_use.jinja": lambda export: (
        (export / "additional_chat_templates").mkdir(),
        (export / "additional_chat_templates" / "tool_use.jinja").write_text("x"),
    ),
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edited_file_is_refused_by_name(export, file):
    assert proof_of(export).status == "proven"
    EDITS[file](export)
    with pytest.raises(Refused) as refused:
        proof_of(export)
    assert f" {file}" in str(refused.value) and "dstune export RUN --reference" in str(refused.value)
    if file == "generation_config.json":
        assert "eos_token_id" in str(refused.value) and "-> 1.5" in str(refused.value)
    if file == "tokenizer.json":
        assert "model.vocab" in str(refused.value)


def test_a_missing_file_is_refused(export):
    (export / "generation_config.json").unlink()
    with pytest.raises(Refused, match=r"generation_config\.json is missing"):
        proof_of(export)


def test_what_decides_nothing_may_change(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "dtype": "bfloat16"}, indent=7)
    )
    change_json(export / "dstune.json", dstune="9.9")
    (export / "README.md").write_text("mine")
    (export / "notes.json").write_text("{}")
    assert proof_of(export).status == "proven"


def test_an_edit_before_the_first_reference_is_refused_too(export, full):
    (export / "reference.json").unlink()
    EDITS["generation_config.json"](export)
    assert add_reference(export, full.run) == ""
    with pytest.raises(Refused, match=r"generation_config\.json"):
        proof_of(export)


def test_a_reference_without_digests_proves_nothing_but_still_refuses(export):
    reference = json.loads((export / "reference.json").read_text())
    del reference["files"]
    (export / "reference.json").write_text(json.dumps(reference | {"format": 1}))
    found = proof_of(export)
    assert found.status == "unproven" and "dstune export RUN --reference" in found.detail
    (export / "reference.json").write_text(json.dumps(reference))  # of format 2, which has them
    with pytest.raises(Refused, match="cannot be read"):
        proof_of(export)


def test_the_user_accepts_an_edit(export, full, capsys):
    """The template now answers under a system prompt in every conversation that has none."""
    template = export / "chat_template.jinja"
    before = json.loads((export / "reference.json").read_text())["rows"]
    template.write_text(template.read_text().replace("{%", "{% if messages %}w1 {% endif %}{%", 1))
    EDITS["generation_config.json"](export)
    with pytest.raises(Refused):
        proof_of(export)

    assert main([str(full.run), "--reference", "--out", str(export), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [change.partition(" ")[0] for change in told["changes"]] == ["chat_template.jinja", "generation_config.json"]
    rows = json.loads((export / "reference.json").read_text())["rows"]
    assert told["rows"] == told["other_prompts"] == len(rows) == len(before)
    assert all(len(row["prompt_ids"]) > len(old["prompt_ids"]) for row, old in zip(rows, before, strict=True))
    assert all(row["target_ids"] == old["target_ids"] for row, old in zip(rows, before, strict=True))
    assert all(row["logprobs"] != old["logprobs"] for row, old in zip(rows, before, strict=True))
    assert "chat_template.jinja" in proof_of(export).detail and proof_of(export).status == "proven"

    (export / "reference.json").unlink()  # what was accepted stays accepted
    assert add_reference(export, full.run) == ""
    change_json(export / "generation_config.json", eos_token_id=8)
    with pytest.raises(Refused, match="eos_token_id 7 -> 8"):
        proof_of(export)


def test_a_renewal_exports_nothing(full, tmp_path):
    with pytest.raises(UserError) as refused:
        main([str(full.run), "--reference", "--force", "--checkpoint", "best"])
    assert {problem.where for problem in refused.value.problems} == {"--force", "--checkpoint"}
    with pytest.raises(UserError) as refused:
        main([str(full.run), "--reference", "--out", str(tmp_path)])
    assert [problem.where for problem in refused.value.problems] == ["--reference"]


def test_the_base_of_an_adapter_decides_too(tmp_path):
    made = make(tmp_path, "method=lora", "method.rank=4")
    assert add_reference(made.export, made.run) == ""
    assert proof_of(made.export).status == "proven"
    change_json(tmp_path / "base" / "generation_config.json", temperature=1.5)
    with pytest.raises(Refused, match=r"base/generation_config\.json"):
        proof_of(made.export)


def test_a_gguf_file_is_known_by_what_stands_beside_its_tensors(tmp_path):
    chats = write_dialogues(tmp_path / "chat.jsonl", 30)
    model = save_model(tmp_path / "base", "llama")
    run = save_run(tmp_path / "run", model, chats, "task=chat", "method=full")
    file = export_gguf(run, find_checkpoint(run, "last"), tmp_path / "gguf", "f32")
    folder = file.parent
    digests = digest_files(folder)
    assert {file.name, "chat_template.jinja", "tokenizer.json", "dstune.json"} <= digests.keys()
    assert changed_files(json.loads((folder / "dstune.json").read_text())["files"], digests) == []
    assert "tokenizer.ggml.eos_token_id" in metadata_digests(file)
    content = bytearray(file.read_bytes())
    at = content.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4
    content[at] += 1
    file.write_bytes(content)
    assert changed_files(digests, digest_files(folder)) == [f"{file.name} (tokenizer.ggml.eos_token_id)"]


def test_a_run_that_held_out_no_rows_is_proven_on_its_training_rows(tmp_path):
    made = make(tmp_path, "method=full", "data.split.validation=0")
    assert add_reference(made.export, made.run) == ""
    reference = json.loads((made.export / "reference.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    asked = [row["messages"] for row in reference["rows"]]
    assert reference["part"] == "training" and len(asked) >= 10
    assert all(any(line["messages"][: len(one)] == one for line in lines) for one in asked)
    assert len({json.dumps(one) for one in asked}) == len(asked), "a row is asked once"
    proof = proof_of(made.export)
    assert (proof.status, proof.detail) == ("proven", "on training rows, since none were held out")


def test_a_model_that_no_run_has_trained_is_held_against_transformers(tmp_path):
    base, own = save_decoder(tmp_path / "base"), tmp_path / "reference"
    own.mkdir()
    reference = base_reference(ModelConfig(path=str(base)))
    (own / "reference.json").write_text(json.dumps(reference))
    assert len(reference["rows"]) == len(CONVERSATIONS) and all(row["target_ids"] for row in reference["rows"])
    source = replace(resolve("m", str(base)), reference=own)
    engine = AnswersAsReferred(source, "m", base, base, Limits())
    proof = asyncio.run(prove(engine, "m", source))
    assert (proof.status, proof.rows) == ("proven", len(CONVERSATIONS)) and "did not train this model" in proof.detail
    default_system(base)
    with pytest.raises(Refused, match="chat_template"):
        asyncio.run(prove(engine, "m", source))
