"""Prompts from files and answers into files: order, kills, bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstune.inference import generate
from dstune.inference.answers_file import AnswersFile
from dstune.inference.writer import Writer
from tests.support.generation import answers, expected, refusal
from tests.support.tiny import save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("generate") / "decoder")


def test_prompts_of_files(decoder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\n\nw2 w3\n")
    rows = answers(capsys, decoder, "--file", tmp_path / "p.txt", "--max-new-tokens", 4)
    assert [row["prompt"] for row in rows] == ["w1", "w2 w3"]
    conversation = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    lines = [json.dumps({"prompt": "w1"}), json.dumps({"messages": conversation})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = answers(capsys, decoder, "--file", tmp_path / "p.jsonl", "--max-new-tokens", 4)
    assert [row["prompt"] for row in rows] == ["w1", conversation]
    assert rows[0]["answer"] == expected(decoder, "w1", count=4)


def test_answers_into_a_file(decoder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\nw2\nw3\n")
    command = [str(decoder), "--input", str(tmp_path / "p.txt"), "--max-new-tokens", "4", "--batch-size", "2"]
    assert generate.main([*command, "--output", str(tmp_path / "a.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["w1", "w2", "w3"]
    assert rows == answers(capsys.readouterr() and capsys, *command)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.")] == ["a.jsonl"]
    assert "exists already" in refusal(*command, "--output", tmp_path / "a.jsonl")


def test_a_table_is_no_list_of_prompts(decoder, tmp_path):
    (tmp_path / "p.csv").write_text("review,stars\ngood,5\n")
    assert "which column is the prompt" in refusal(str(decoder), "--input", tmp_path / "p.csv")


def test_a_killed_command_goes_on(decoder, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("\n".join(f"w{number}" for number in range(7)))
    sampled = ["--temperature", "1.2", "--seed", "3", "--max-new-tokens", "6", "--batch-size", "2"]
    command = [str(decoder), "--input", str(tmp_path / "p.txt"), *sampled, "--output"]
    assert generate.main([*command, str(tmp_path / "whole.jsonl")]) == 0
    real, batches = Writer.answer, []

    def killed(writer, requests, number=0):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(number)
        return real(writer, requests, number)

    monkeypatch.setattr(Writer, "answer", killed)
    part = tmp_path / "a.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        generate.main([*command, str(tmp_path / "a.jsonl")])
    assert not (tmp_path / "a.jsonl").exists()
    with part.open("a") as stream:
        stream.write('{"prompt": "w4", "answ')  # torn in the middle of a row
    assert "other settings" in refusal(*command, tmp_path / "a.jsonl", "--top-p", 0.5)
    batches.clear()
    monkeypatch.setattr(Writer, "answer", real)
    assert generate.main([*command, str(tmp_path / "a.jsonl")]) == 0
    assert "4 of 7 answers are there already" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("more", [{"tools": [{"name": "now"}]}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_a_begun_file_is_of_other_requests(decoder, tmp_path, monkeypatch, more):
    def killed(writer, requests, number=0):
        raise MemoryError

    monkeypatch.setattr(Writer, "answer", killed)
    rows = tmp_path / "p.jsonl"
    command = [str(decoder), "--input", str(rows), "--output", str(tmp_path / "a.jsonl")]
    row = {"messages": [{"role": "user", "content": "w1"}]}
    rows.write_text(json.dumps(row))
    with pytest.raises(MemoryError):
        generate.main(command)
    rows.write_text(json.dumps(row | more))
    assert "was begun with other rows" in refusal(*command)


def test_only_whole_batches_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    begun = AnswersFile(path, {"model": "m"}, 2)
    begun.append([{"n": 0}, {"n": 1}])
    begun.append([{"n": 2}])
    again = AnswersFile(path, {"model": "m"}, 2)
    assert again.done == 2
    again.append([{"n": 2}, {"n": 3}])
    again.finish()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert AnswersFile(path, {"model": "other"}, 2, force=True).done == 0


def test_bad_rows_are_named_by_file_and_line(decoder, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        '{"prompt": "w1"}',
        "{torn",
        '{"text": "w"}',
        "[1]",
        '{"messages": [{"role": "assistant", "content": "w"}]}',
        '{"prompt": " "}',
    ]
    path.write_text("\n".join(rows))
    text = refusal(decoder, "--file", path)
    assert all(f"{path}:{line}" in text for line in (2, 3, 4, 5, 6)) and f"{path}:1" not in text
    assert "cannot be read: No such file" in refusal(decoder, "--file", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "no prompts" in refusal(decoder, "--file", tmp_path / "empty.txt")
    assert "the prompt is empty" in refusal(decoder, "--prompt", " ")
