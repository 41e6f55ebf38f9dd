"""`dstune synthesize`: the same rows however often it is killed, and filters that leave out what they name."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstune.core import api_client
from dstune.core.api_client import ServerUnreachable
from dstune.core.errors import UserError
from dstune.data.clean.held_out import HeldOutTexts
from dstune.synthesize.command import main
from dstune.synthesize.requests import passages
from tests.support.teacher_double import Double, serving, words_of


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(api_client, "FIRST_PAUSE", 0.001)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def synthesize(kind: str, url: str, source: str, output: Path, *more: str) -> tuple[int, list[dict], list[dict]]:
    """Exit code, rows, what was left out."""
    argv = [kind, "--input", source, "--output", str(output), "--teacher", url, "--model", "double", *more]
    code = main(argv)
    return code, lines(output / "rows.jsonl"), lines(output / "left_out.jsonl")


@pytest.mark.ci
def test_killed_three_times_it_has_the_same_500_rows(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}"} for n in range(500)])
    double = Double(delay=0.01)
    with serving(double) as url:
        code, rows, _ = synthesize("answers", url, source, tmp_path / "whole", "--at-once", "4")
        assert code == 0 and len(rows) == 500
        flags = ["--input", source, "--teacher", url, "--model", "double", "--at-once", "4"]
        command = [sys.executable, "-m", "dstune", "synthesize", "answers", *flags, "--output", str(tmp_path / "cut")]
        journal = tmp_path / "cut" / "answers.jsonl"
        for least in (60, 200, 350):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while not (journal.exists() and journal.read_bytes().count(b"\n") >= least):
                assert process.poll() is None
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with journal.open("ab") as stream:
            stream.write(b'{"key": "499/0", "te')  # a line that a kill cut off
        asked = len(double.bodies)
        assert subprocess.run(command, check=False).returncode == 0
    assert len(double.bodies) - asked < 160, "what was answered is not asked again"
    for name in ("rows.jsonl", "left_out.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows[7] == {
        "messages": [
            {"role": "user", "content": "question 7"},
            {"role": "assistant", "content": rows[7]["messages"][1]["content"]},
        ],
        "synthetic": {
            "model": "double-1",
            "version": "fp_7",
            "input": f"{source}:8",
            "item": 7,
            "samples": [0],
            "seeds": rows[7]["synthetic"]["seeds"],
            "scores": {},
        },
    }
    assert len({row["synthetic"]["seeds"][0] for row in rows}) == 500
    assert "500 synthetic rows" in (tmp_path / "cut" / "card.md").read_text()


def test_each_filter_leaves_out_its_planted_rows(tmp_path):
    planted = {
        "refuse": "I'm sorry, but I can't help with that.",
        "german": "Das ist ein Satz in deutscher Sprache, damit die Sprache sicher erkannt werden kann.",
        "held": "the committee met on the third of may to decide about the bridge over the river",
        "long": "this goes on and on ...",
        "wrong": "The answer is 5.",
        "empty": " ",
    }
    plain = "The committee of the town has decided that question number {} should be answered in a long sentence."

    def answer(body: dict) -> str:
        prompt = body["messages"][-1]["content"]
        return planted.get(prompt.split()[0], plain.format(prompt.split()[-1]) + " It is 4.")

    prompts = [f"plain {n}" for n in range(6)] + [f"{name} {n}" for n in range(2) for name in planted] + ["plain 3"]
    prompts += ["What did they decide"]
    source = write(tmp_path / "prompts.jsonl", [{"prompt": prompt, "answer": "4"} for prompt in prompts])
    held_out = write(
        tmp_path / "test.jsonl", [{"text": "On monday " + planted["held"]}, {"question": "what did they decide?"}]
    )
    flags = ["--languages", "en", "--held-out", held_out, "--grade", "number=0.5"]
    with serving(Double(answer)) as url:
        code, rows, left_out = synthesize("answers", url, source, tmp_path / "out", *flags)
    reasons: dict[str, set[str]] = {}
    for row in left_out:
        asked = row["messages"][0]["content"] if "messages" in row else row["input"]
        reasons.setdefault(row["reason"], set()).add(asked)
    assert code == 0
    assert [row["messages"][0]["content"] for row in rows] == [f"plain {n}" for n in range(6)]
    assert all(row["synthetic"]["scores"]["number"] == 1.0 for row in rows)
    assert reasons.pop("refusal") == {"refuse 0", "refuse 1"}
    assert reasons.pop("language de") == {"german 0", "german 1"}
    assert reasons.pop("contamination") == {"held 0", "held 1", "What did they decide"}
    assert reasons.pop("number 0 below 0.5") == {"wrong 0", "wrong 1"}
    assert reasons.pop("duplicate") == {"plain 3"}
    assert len(reasons.pop("cut off")) == len(reasons.pop("the answer is empty")) == 2
    assert not reasons
    assert "| rows with text of" in (card := (tmp_path / "out" / "card.md").read_text())
    assert "test.jsonl | 0 |" in card and "| number too low | 2 |" in card


def test_near_copies_and_disagreeing_samples_are_left_out(tmp_path):
    def answer(body: dict) -> str:
        prompt = body["messages"][-1]["content"]
        if prompt.startswith("near"):
            return f"A rather long answer that differs in a single letter from the other one, {prompt[-1]}."
        return "It is 4." if prompt.startswith("sure") or body["seed"] % 2 else f"It is {body['seed']}."

    source = write(tmp_path / "a.jsonl", [{"prompt": "near a"}, {"prompt": "near b"}])
    with serving(Double(answer)) as url:
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "near", "--near", "0.9")
        assert [row["messages"][0]["content"] for row in rows] == ["near a"]
        assert [row["reason"] for row in left_out] == ["near duplicate"]
        source = write(tmp_path / "b.jsonl", [{"prompt": "sure"}, *({"prompt": f"unsure {n}"} for n in range(8))])
        flags = ["--samples", "5", "--agreement", "0.9"]
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "agree", *flags)
    assert "sure" in [row["messages"][0]["content"] for row in rows] and len(rows) < 5
    assert all(row["synthetic"]["scores"]["agreement"] >= 0.9 for row in rows)


def test_pairs_are_the_best_and_the_worst_answer(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"q {n}"} for n in range(3)])
    texts = {0: "short", 1: "a longer answer", 2: "the longest answer of all of them"}
    double = Double(lambda body: texts[body["seed"] % 3] + f" {body['seed']}")
    with serving(double) as url:
        flags = ["--samples", "6", "--reward-url", url, "--reward-model", "judge"]
        code, rows, left_out = synthesize("preferences", url, source, tmp_path / "out", *flags)
    assert code == 0 and len(rows) + len(left_out) == 3
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert len(chosen) > len(rejected)
        assert row["synthetic"]["scores"] == {"chosen": len(chosen), "rejected": len(rejected)}
        assert len(row["synthetic"]["seeds"]) == 2


def test_questions_have_their_passage_and_instructions_are_new(tmp_path):
    text = "\n\n".join(f"Paragraph {n} says something. " + "word " * 200 for n in range(5))
    source = write(tmp_path / "docs.jsonl", [{"text": text}])

    def answer(body: dict) -> str:
        asked = body["messages"][-1]["content"]
        if "Here are instructions" in asked:
            return f'Sure: {{"instruction": "Do {body["seed"]}", "answer": "Done {body["seed"]}"}}'
        number = asked.rpartition("Paragraph ")[2][0]
        return f'```json\n[{{"question": "What says paragraph {number}?", "answer": "Something {number}."}}]\n```'

    with serving(Double(answer)) as url:
        _, rows, _ = synthesize("questions", url, source, tmp_path / "questions")
        assert len(rows) >= 3
        for row in rows:
            source_of_row = row["source"]
            start = source_of_row["start"]
            assert text[start : start + len(source_of_row["text"])] == source_of_row["text"]
        own = write(tmp_path / "own.jsonl", [{"prompt": f"Example {n}"} for n in range(6)])
        _, rows, _ = synthesize("instructions", url, own, tmp_path / "new", "--count", "20")
        assert len(rows) == 20 and all(row["messages"][0]["content"].startswith("Do ") for row in rows)
        with pytest.raises(UserError, match="lack"):
            synthesize("questions", url, own, tmp_path / "none")


def test_passages_cover_a_text():
    text = "first paragraph\n\n" + "x" * 50 + "\n\nlast one"
    found = list(passages(text, 20))
    assert all(text[start : start + len(part)] == part and len(part) <= 20 for start, part in found)
    assert "".join("".join(part.split()) for _, part in found) == "".join(text.split())


def test_a_teacher_that_is_away_is_asked_again(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"q {n}"} for n in range(20)])
    double = Double()
    with serving(double) as url:
        double.statuses = [503, 429, 500]
        code, rows, _ = synthesize("answers", url, source, tmp_path / "again")
        assert code == 0 and len(rows) == 20 and len(double.bodies) == 23
        port = int(url.split(":")[2].split("/")[0])

        def gone_after_eight(body: dict) -> str:
            if len(double.bodies) > 8:
                raise ConnectionError
            return words_of(body)

        double.bodies.clear()
        double.write = gone_after_eight
        flags = ["--attempts", "2", "--at-once", "2"]
        with pytest.raises(ServerUnreachable) as raised:
            synthesize("answers", url, source, tmp_path / "away", *flags)
    assert raised.value.exit_code == 1
    kept = lines(tmp_path / "away" / "rows.jsonl")
    assert 1 <= len(kept) <= 8
    with serving(Double(), port) as url:
        code, rows, _ = synthesize("answers", url, source, tmp_path / "away", *flags)
    assert code == 0 and rows == lines(tmp_path / "again" / "rows.jsonl") and rows[: len(kept)] != []


def test_what_it_refuses(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"q {n}"} for n in range(4)])
    double = Double()
    monkeypatch.setenv("MY_KEY", "secret-key")
    with serving(double) as url:
        out = tmp_path / "out"
        synthesize("answers", url, source, out, "--key-variable", "MY_KEY")
        assert double.keys == ["Bearer secret-key"] * 4
        assert not any(b"secret-key" in path.read_bytes() for path in out.iterdir())
        with pytest.raises(UserError, match="temperature changed"):
            synthesize("answers", url, source, out, "--temperature", "0")
        double.statuses = [401] * 8
        with pytest.raises(UserError, match="HTTP 401 not now"):
            synthesize("answers", url, source, tmp_path / "refused")
        for wrong in (
            ["--samples", "0"],
            ["--near", "0.5"],
            ["--agreement", "0.5"],
            ["--grade", "nothing"],
            ["--reward-least", "1"],
            ["--teacher", "http://example.com/v1"],
            ["--teacher", "https://user:word@example.com/v1"],
        ):
            with pytest.raises(UserError, match=wrong[0]):
                synthesize("answers", url, source, tmp_path / "wrong", *wrong)
        with pytest.raises(UserError, match="--grade"):
            synthesize("preferences", url, source, tmp_path / "wrong", "--samples", "2")


def test_a_budget_ends_it_and_more_goes_on(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"q {n}"} for n in range(30)])
    with serving(Double()) as url:
        flags = ["--at-once", "1"]
        code, rows, _ = synthesize("answers", url, source, tmp_path / "out", *flags, "--budget-tokens", "100")
        assert code == 75 and len(rows) == 10
        code, rows, _ = synthesize("answers", url, source, tmp_path / "out", *flags)
        assert code == 0 and len(rows) == 30


def test_a_run_refuses_more_synthetic_rows_than_allowed(tmp_path, monkeypatch):
    from dstune.config.compose import compose
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import load_tokenizer
    from tests.support.tiny import save_decoder

    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    own = [
        {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w1"}]} for n in range(9)
    ]
    rows = [{**row, "synthetic": {"model": "m"}} if n < 3 else row for n, row in enumerate(own)]
    source = write(tmp_path / "rows.jsonl", rows)
    model = save_decoder(tmp_path / "model")
    for share, refused in (("0.2", True), ("0.34", False)):
        overrides = ["data=files", f"data.train={source}", f"model.path={model}", f"data.max_synthetic_share={share}"]
        config = compose(overrides).config
        arguments = (config, load_tokenizer(config.model), RankEnv(0, 1, 0, 1, "test"), tmp_path / "cache")
        if refused:
            with pytest.raises(UserError, match="3 of 9 training rows are synthetic"):
                prepare(*arguments)
        else:
            assert prepare(*arguments).report["train"]["synthetic_rows"] == 3


def test_an_empty_held_out_text_is_in_no_prompt() -> None:
    """Rows of Alpaca have `"input": ""`, and a rewritten text has an empty prompt."""
    held_out = HeldOutTexts([["", "?!", "two words"]], 8, "--held-out")
    assert held_out.repeated_in(["", "Two words!"]).tolist() == [False, True]
    assert not held_out.repeated_in(["Two words!"], are_answers=True).any()


def test_a_held_out_question_is_left_out_in_every_script_and_with_small_changes(tmp_path: Path) -> None:
    held_out = [
        "中国最长的河流是哪一条，它流经哪些省份？",
        "ประเทศไทยมีจังหวัดทั้งหมดกี่จังหวัด และจังหวัดใดใหญ่ที่สุด",
        "How many days does the planet Mercury need for one orbit of the Sun?",
        "Which treaty ended the war between the two kingdoms, and when was it signed?",
        "Solve the equation 3x + 5 = 20 for x.",
    ]
    leaks = [
        "中国最长的河流是哪一条？它流经哪些省份",
        "中国最长的河是哪一条，它流经哪些省份？",
        "ประเทศไทยมีจังหวัดทั้งหมดกี่จังหวัด จังหวัดใดใหญ่สุด",
        "how many days does the planet Mercury need for one orbit of the sun",
        "How many days does the planet Mercury require for one orbit of the Sun?",
        "Which treaty finished the war between the two kingdoms - and when was it signed?",
        "Solve the equation 3x+5=20 for x",
        "Please answer briefly. 中国最长的河流是哪一条，它流经哪些省份？ 请用两句话回答。",
    ]
    others = [
        "法国最高的山峰叫什么名字，它有多少米高？",
        "Solve the equation 3x - 5 = 20 for x.",
        "Solve the equation 3x + 5 = 23 for x.",
        "How does a planet form around a young star?",
    ]
    source = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in leaks + others])
    test = write(tmp_path / "test.jsonl", [{"question": text, "answer": "yes"} for text in held_out])
    with serving(Double()) as url:
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "out", "--held-out", test)
    assert [row["messages"][0]["content"] for row in left_out] == leaks
    assert {row["reason"] for row in left_out} == {"contamination"}
    assert [row["messages"][0]["content"] for row in rows] == others


def test_a_held_out_instruction_with_an_input_is_one_question(tmp_path: Path) -> None:
    row = {"instruction": "Name the tense.", "input": "She has gone home.", "output": "present perfect"}
    test = write(tmp_path / "test.jsonl", [row])
    source = write(tmp_path / "prompts.jsonl", [row, row | {"input": "They will have left."}])
    with serving(Double()) as url:
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "out", "--held-out", test)
    assert [row["messages"][0]["content"].partition("\n\n")[2] for row in left_out] == ["She has gone home."]
    assert len(rows) == 1


def test_signs_and_numbers_tell_questions_apart(tmp_path: Path) -> None:
    prompts = ["x - 1 = 0", "x + 1 = 0", "x+1=0", "Is 5 > 3?", "Is 5 < 3?", "well-known", "well known"]
    source = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    with serving(Double(lambda body: "It depends.")) as url:
        for near in ([], ["--near", "0.8"]):
            _, _, left_out = synthesize("answers", url, source, tmp_path / f"out{len(near)}", *near)
            assert [row["messages"][0]["content"] for row in left_out] == ["x+1=0", "well known"]


def test_an_answer_that_a_content_filter_ended_is_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    double = Double()
    double.finish = lambda text: "content_filter" if len(double.bodies) == 1 else "stop"
    with serving(double) as url:
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "out", "--at-once", "1")
    assert [row["reason"] for row in left_out] == ["stopped by the server's content filter"] and len(rows) == 1


def test_lengths_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    from tests.support.tiny import save_decoder

    model = str(save_decoder(tmp_path / "model"))
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "w1", "max_length": 8}, {"prompt": "w2", "max_length": 8}])
    answers = {"w1": "w1 w2", "w2": " ".join(["w3"] * 50)}
    with serving(Double(lambda body: answers[body["messages"][-1]["content"]])) as url:
        flags = ["--grade", "brevity=0.5"]
        with pytest.raises(UserError, match="--tokenizer"):
            synthesize("answers", url, source, tmp_path / "refused", *flags)
        _, rows, left_out = synthesize("answers", url, source, tmp_path / "out", *flags, "--tokenizer", model)
    assert [row["synthetic"]["scores"]["brevity"] for row in rows] == [0.625]  # two words and the end token
    assert [row["reason"] for row in left_out] == ["brevity 0 below 0.5"]
    with pytest.raises(UserError, match="--tokenizer"), serving(Double()) as url:
        synthesize("answers", url, source, tmp_path / "none", *flags, "--tokenizer", str(tmp_path / "absent"))
