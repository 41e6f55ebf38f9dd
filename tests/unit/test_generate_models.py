"""From what `generate` answers: folders, exports, checkpoints, adapters; and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.inference.voices import voice_of
from dstune.tasks.seq2seq import Seq2Seq
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from tests.support.generation import answers, damage, expected, refusal, save_step, saved_run
from tests.support.tiny import save_decoder, save_encoder


class Tone(Enum):
    plain = "is plain"
    warm = "is warm"


@dataclass(frozen=True)
class ToneConfig(Seq2SeqConfig):
    tone: Tone = Tone.plain


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("generate") / "decoder")


def test_a_model_folder(decoder, capsys):
    rows = answers(capsys, decoder, "--prompt", "w1 w2", "--prompt", "w3", "--max-new-tokens", 8)
    assert [row["prompt"] for row in rows] == ["w1 w2", "w3"]
    assert [row["answer"] for row in rows] == [expected(decoder, "w1 w2"), expected(decoder, "w3")]
    assert all(1 <= row["tokens"] <= 8 for row in rows)


def test_plain_goes_on_with_the_text(decoder, capsys):
    (row,) = answers(capsys, decoder, "--plain", "--prompt", "w1 w2", "--max-new-tokens", 8)
    assert row["answer"] == expected(decoder, "w1 w2", chat=False) != expected(decoder, "w1 w2")


def test_a_run_is_answered_from_its_export(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    other = save_decoder(run_dir / "export", seed=7)
    (other / "dstune.json").write_text(json.dumps({"checkpoint": "step-00000003"}))
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(other, "w5") != expected(decoder, "w5")


def test_a_run_without_export_is_answered_from_its_checkpoint(decoder, tmp_path, capsys):
    from dstune.checkpoint.export import export_checkpoint

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert not (run_dir / "export").exists()
    folder = export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "out")
    assert row["answer"] == expected(folder, "w5") != expected(decoder, "w5")


def test_an_export_of_another_checkpoint_is_not_what_was_requested(decoder, tmp_path, capsys):
    from dstune.checkpoint import export
    from dstune.inference import export_command

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    newer = save_step(run_dir, decoder, 5, factor=-1)
    assert export_command.main([str(run_dir), "--checkpoint", "3"]) == 0  # after step 5 was saved
    last = export.export_checkpoint(run_dir, newer, tmp_path / "last")
    capsys.readouterr()
    flags = ["--prompt", "w5", "--max-new-tokens", 8]
    (row,) = answers(capsys, run_dir, *flags)
    assert row["answer"] == expected(last, "w5") != expected(run_dir / "export", "w5")
    (row,) = answers(capsys, run_dir, *flags, "--checkpoint", 3)
    assert row["answer"] == expected(run_dir / "export", "w5")
    scratch = tmp_path / "scratch"
    assert export.existing_or_new_export(run_dir, scratch, which="3") == run_dir / "export"
    (run_dir / "export" / "dstune.json").unlink()  # nothing says what it was made of
    assert export.existing_or_new_export(run_dir, scratch, which="3") == scratch / "export"


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(decoder, tmp_path, capsys):
    from dstune.inference import export_command

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    for step in (4, 5):
        name = damage(save_step(run_dir, decoder, step, factor=-1))
    with pytest.raises(UserError) as caught:
        export_command.main([str(run_dir)])
    (problem,) = caught.value.problems
    assert problem.where.endswith("step-00000005") and name in problem.reason
    assert not (run_dir / "export").exists()
    text = refusal(run_dir, "--prompt", "w1")
    assert name in text and problem.fix in text
    # The fix works as it stands: the newest whole one is step 3.
    program, verb, *arguments = problem.fix.split()
    assert (program, verb) == ("dstune", "export") and arguments[:3] == [str(run_dir), "--checkpoint", "3"]
    assert export_command.main(arguments) == 0
    damage(store.folder(run_dir) / "step-00000003")
    assert "no other checkpoint" in refusal(run_dir, "--prompt", "w1", "--checkpoint", 3)


def test_what_an_incomplete_save_left_is_no_checkpoint(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    whole = store.newest(run_dir)
    incomplete_reasons = whole.with_name("step-00000040.incomplete")
    incomplete_reasons.mkdir()
    text = refusal(incomplete_reasons, "--prompt", "w1")
    assert "is no whole checkpoint" in text and str(run_dir) in text
    text = refusal(decoder, "--prompt", "w1", "--adapter", f"mine={incomplete_reasons}")
    assert "--adapter mine" in text and "is no whole checkpoint" in text
    (row,) = answers(capsys, whole, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"]
    assert "is a checkpoint already" in refusal(whole, "--prompt", "w5", "--checkpoint", "best")
    assert "only a run has checkpoints" in refusal(decoder, "--prompt", "w5", "--checkpoint", 3)


def test_a_run_on_plain_text_goes_on_with_the_text(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=causal_lm", "method=full")
    shutil.copytree(decoder, run_dir / "export")
    (run_dir / "export" / "dstune.json").write_text(json.dumps({"checkpoint": "step-00000003"}))
    (run_dir / "export" / "config.json").touch()  # newer than the checkpoint
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(decoder, "w5", chat=False)


def test_an_adapter_is_put_on_its_base(decoder, tmp_path, capsys):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "merged")
    (row,) = answers(capsys, tmp_path / "adapter", "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(tmp_path / "merged", "w5") != expected(decoder, "w5")


def test_models_that_write_no_text(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    assert "is no language model" in refusal(encoder, "--prompt", "w1")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    overrides = [f"model.path={encoder}", "data=files", "data.train=x.jsonl", "task=classification", "method=full"]
    write_run(run_dir / "run.yaml", compose([*overrides, "data.packing=false"]))
    assert "writes no text" in refusal(run_dir, "--prompt", "w1")
    (encoder / "dstune.json").write_text(json.dumps({"task": {"name": "classification"}}))
    assert f"dstune predict {encoder}" in refusal(encoder, "--prompt", "w1")
    (encoder / "dstune.json").unlink()
    for kind in ("TokenClassification", "QuestionAnswering"):  # of other origin, known by its head
        config = json.loads((encoder / "config.json").read_text()) | {"architectures": [f"BertFor{kind}"]}
        (encoder / "config.json").write_text(json.dumps(config))
        assert "writes no text" in refusal(encoder, "--prompt", "w1")


def test_the_record_of_a_task_is_checked_and_typed(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(Seq2Seq, "Config", ToneConfig)
    folder = Path(shutil.copytree(decoder, tmp_path / "export"))
    record = folder / "dstune.json"
    task = {"name": "seq2seq", "prompt": "Say {source}", "tone": "warm"}
    record.write_text(json.dumps({"task": task}))
    voice = voice_of(folder, None)
    assert voice.task == ToneConfig(prompt="Say {source}", tone=Tone.warm)
    monkeypatch.setenv("SECRET", "s")
    for key, value in (("newer", 1), ("tone", "cold"), ("prompt", "${oc.env:SECRET} {source}")):
        record.write_text(json.dumps({"task": task | {key: value}}))
        with pytest.raises(UserError) as refused:
            voice_of(folder, None)
        assert refused.value.problems[0].where == f"{record}: task.{key}"


def test_a_model_that_is_not_there(tmp_path):
    assert "MODEL" in refusal(tmp_path / "nowhere", "--prompt", "w1")


def test_a_run_without_a_checkpoint(decoder, tmp_path):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    shutil.rmtree(store.folder(run_dir))
    assert "has saved none yet" in refusal(run_dir, "--prompt", "w1")
