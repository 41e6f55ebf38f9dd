"""`dstune models --probe`: untuned models asked on held-out rows, the best first."""

from __future__ import annotations

import json

import pytest
from support.tiny import save_decoder, save_encoder, write_dialogues

from dstune import catalogue
from dstune.evaluation import command as evaluate


def test_models_are_ranked_by_what_they_say_of_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Of random models the more certain one is the worse one.
    sure = save_decoder(tmp_path / "sure", initializer_range=0.5)
    unsure = save_decoder(tmp_path / "unsure", initializer_range=0.02)
    save_encoder(tmp_path / "encoder")
    rows = write_dialogues(tmp_path / "rows.jsonl", 12)
    words = ["task=chat", "data.max_length=64", "trainer.precision=fp32", "launch.processes=1"]
    given = [str(sure), str(unsure), str(tmp_path / "encoder"), *words, "--probe", str(rows), "--rows", "8", "--json"]
    assert catalogue.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in found[:2]] == [str(unsure), str(sure)]
    assert found[0]["metric"] == "bits_per_byte" and 0 < found[0]["score"] < found[1]["score"]
    assert all(row["score"] is None and row["note"].startswith("not evaluated") for row in found[2:])
    assert str(tmp_path / "encoder") not in [row["path"] for row in found]
    again = [str(sure), *words, f"data.validation={rows}", "evaluate.max_rows=8", "data.packing=false", "--shots", "0"]
    assert evaluate.main([*again, "data.clean.leaks=false", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["prompted"][0]["metrics"]
    assert found[1]["score"] == pytest.approx(metrics["bits_per_byte"])
