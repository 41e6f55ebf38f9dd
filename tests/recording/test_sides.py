"""`dstune compare` of runs, models and servers: which prompts count, how sides are asked, what a judge's verdicts are worth."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import dstune
from dstune.core.errors import UserError
from dstune.data.run_rows import read_run_parts
from dstune.recording.command import main as record
from dstune.recording.compare import main
from tests.support.hosted_double import Hosted, serving
from tests.support.served_runs import save_run
from tests.support.tiny import save_decoder, save_encoder, write_labelled

WIDE = ["--margin", "0.3"]
OLD_NAME = "ft:gpt-4o-2024-08-06:acme::0"


def row(question: str, answer: str, **further: object) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **further}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def answering(hosted: Hosted, text_of: Callable[[dict], str]) -> Hosted:
    def answer(body: dict) -> dict:
        completion = hosted.complete(body)
        completion["choices"][0]["message"]["content"] = text_of(body)
        return completion

    hosted.answer = answer
    return hosted


def asked(hosted: Hosted) -> list[str]:
    return [json.loads(name)[1][0]["content"] for name in hosted.requests if name.startswith("[")]


def result(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def recording(tmp_path, monkeypatch) -> Path:
    """Of a model that answers `right N` to 60 prompts; 20 further prompts are rows of its training file."""
    hosted = answering(Hosted(jobs=1), lambda body: f"right {body['messages'][0]['content'].split()[-1]}")
    rows = [row(f"question {n}", f"right {n}", user=f"user-{n}") for n in range(100, 160)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
    with serving(hosted) as url:
        flags = ["--server", f"{url}/v1", "--prompts-of", "training", "--prompts", prompts, "--max-tokens", "5"]
        assert record([str(tmp_path / "recording"), *flags]) == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    return tmp_path / "recording"


def test_a_server_is_asked_the_recorded_prompts_once_under_the_old_name(recording, tmp_path, monkeypatch, capsys):
    hosted = answering(Hosted(jobs=0), lambda body: f"right {body['messages'][0]['content'].split()[-1]}")
    hosted.models = [{"id": OLD_NAME, "object": "model"}, {"id": "another", "object": "model"}]
    monkeypatch.setenv("NEW_KEY", hosted.key)
    bodies: list[dict] = []
    right, hosted.answer = hosted.answer, lambda body: bodies.append(body) or right(body)
    with serving(hosted) as url:
        words = [str(recording), f"{url}/v1", "--output", str(tmp_path / "out"), "--new-key-variable", "NEW_KEY", *WIDE]
        assert main(words) == 0
        assert sorted(asked(hosted)) == [f"question {n}" for n in range(100, 160)]
        assert {body["model"] for body in bodies} == {OLD_NAME}
        assert {body["max_completion_tokens"] for body in bodies} == {5}  # as the recording was asked
        assert main(words) == 0
        assert len(bodies) == 60  # nothing twice
        with pytest.raises(UserError, match="another value of: model"):
            main([*words, "--new-model", "another"])
        hosted.models = hosted.models[1:] * 2 + [{"id": "third", "object": "model"}]
        with pytest.raises(UserError, match="which model of the server") as refused:
            main([*words, "--output", str(tmp_path / "other")])
        assert "another, third" in str(refused.value.problems[0].fix)
    out = capsys.readouterr().out
    assert "20 prompts are left out: a model was trained on them" in out and "60 prompts are compared" in out
    assert "what NEW was trained on is not known" in out
    assert result(tmp_path / "out")["new"] == OLD_NAME
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.is_dir() or hosted.key.encode() not in path.read_bytes()


def test_a_server_that_answers_worse_is_worse(recording, tmp_path, monkeypatch):
    hosted = answering(Hosted(jobs=0), lambda body: "wrong")
    monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
    with serving(hosted) as url:
        words = [str(recording), f"{url}/v1", "--new-model", "mine", "--output", str(tmp_path / "out")]
        assert main(words) == 1
    assert result(tmp_path / "out")["verdict"] == "worse"


def test_prompts_that_the_old_model_did_not_answer_decide_nothing(tmp_path, monkeypatch, capsys):
    """A server's errors are no wrong answers: beside them, any new model would pass."""
    right = lambda body: f"right {body['messages'][0]['content'].split()[-1]}"  # noqa: E731
    prompts = write_rows(tmp_path / "prompts.jsonl", [row(f"question {n}", f"right {n}") for n in range(60)])

    def recorded(folder: Path, failing: int, text_of: Callable[[dict], str]) -> str:
        hosted = answering(Hosted(jobs=1), text_of)
        answer = hosted.answer

        def answer_or_fail(body: dict) -> dict:
            fails = int(body["messages"][0]["content"].split()[-1]) < failing
            return {"error": {"message": "the model is away"}} if fails else answer(body)

        hosted.answer = answer_or_fail
        monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
        with serving(hosted) as url:
            words = ["--server", f"{url}/v1", "--prompts", prompts, "--models", "old", "--max-tokens", "5"]
            assert record([str(folder), *words]) == 0
        return str(folder)

    wrong = recorded(tmp_path / "new", 0, lambda body: "wrong")
    half = recorded(tmp_path / "half", 30, right)
    assert main([half, wrong, "--output", str(tmp_path / "out"), *WIDE]) == 1
    assert result(tmp_path / "out")["verdict"] == "worse"
    assert "30 prompts are left out: OLD has no answer to them" in capsys.readouterr().out
    nothing = recorded(tmp_path / "nothing", 60, right)
    with pytest.raises(UserError, match="the model is away"):
        main([nothing, wrong, "--output", str(tmp_path / "other"), *WIDE])
    assert main([half, nothing, "--output", str(tmp_path / "third"), *WIDE]) == 1
    assert result(tmp_path / "third")["gates"][0]["candidate"] == 0


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    rows = [row(f"w{n % 10} w{n // 10} w3", f"w{n % 7}") for n in range(100)]
    data = Path(write_rows(folder / "chat.jsonl", rows))
    return save_run(folder / "run", save_decoder(folder / "base"), data, "task=chat", "method=lora", "method.rank=4")


def held_out_rows(run: Path) -> int:
    return len(read_run_parts(run, fix="")[1]["validation"])


def test_a_run_answers_as_generate_does(recording, chat_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(recording), str(chat_run), "--output", str(out)]) == 1  # an untrained model is worse
    records = [
        json.loads(line) for path in (out / "new" / "answers").iterdir() for line in path.read_text().splitlines()
    ]
    assert len(records) == 60 and result(out)["verdict"] == "worse"
    prompts = [each["messages"] for each in records[:4]]
    answers = [each["answer"]["content"] for each in records[:4]]
    assert answers == dstune.generate(str(chat_run), prompts, max_new_tokens=5, batch_size=4)
    assert main([str(recording), str(chat_run), "--output", str(out)]) == 1  # from what is written down


def test_two_runs_are_compared_on_held_out_rows_that_neither_trained_on(chat_run, tmp_path, capsys):
    rows = [json.loads(line) for line in (chat_run.parent / "chat.jsonl").read_text().splitlines()]
    other_data = Path(write_rows(tmp_path / "other.jsonl", [*rows[:50], *(row(f"w{n} w1", "w2") for n in range(20))]))
    other = save_run(
        tmp_path / "other", chat_run.parent / "base", other_data, "task=chat", "data.split.validation=0", seed=1
    )
    words = [str(chat_run), str(other), "--max-tokens", "4", "--output", str(tmp_path / "out"), "--margin", "0.9"]
    main(words)
    out = capsys.readouterr().out
    left_out, compared = (
        int(re.search(rf"(\d+) prompts {text}", out)[1])
        for text in ("are left out", "are compared")  # type: ignore[index]
    )
    held_out = {each["messages"][0]["content"] for each in rows}
    assert left_out > 0 and compared >= 5 and left_out + compared == held_out_rows(chat_run)
    answered = [
        json.loads(line) for path in (tmp_path / "out/old/answers").iterdir() for line in path.read_text().splitlines()
    ]
    questions = {each["messages"][0]["content"] for each in answered}
    assert len(questions) == compared and questions <= held_out
    assert "not known" not in out


def test_training_rows_of_a_run_are_left_out_and_changed_files_are_refused(chat_run, tmp_path, capsys):
    rows = [json.loads(line) for line in (chat_run.parent / "chat.jsonl").read_text().splitlines()]
    data = Path(write_rows(tmp_path / "data.jsonl", rows))
    run = save_run(
        tmp_path / "run", chat_run.parent / "base", data, "task=chat", "data.split.validation=0", "method=lora"
    )
    spaced = [row(f"  {each['messages'][0]['content'].upper()} ", "x") for each in rows[:10]]
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [*rows[10:20], *spaced, *(row(f"new {n}", "w1") for n in range(8))]
    )
    words = [
        str(run),
        str(run),
        "--prompts",
        prompts,
        "--max-tokens",
        "2",
        "--output",
        str(tmp_path / "out"),
        "--margin",
        "0.9",
    ]
    main(words)
    out = capsys.readouterr().out
    assert "20 prompts are left out" in out and "8 prompts are compared" in out
    (run / "data_report.json").write_text(json.dumps({"files": {"data.train": [[str(data), "0" * 32]]}}))
    with pytest.raises(UserError, match="the file changed since") as refused:
        main(words)
    assert "--trained-on FILE" in refused.value.problems[0].fix
    assert main([*words, "--trained-on", str(data)]) in (0, 1)
    assert "20 prompts are left out" in capsys.readouterr().out


def test_a_run_that_continued_another_one_was_trained_on_both(chat_run, tmp_path, capsys):
    first = dstune.export(chat_run, chat_run / "export", merge=True, reference=False, force=True)
    data = Path(write_rows(tmp_path / "second.jsonl", [row(f"w{n} w9", "w3") for n in range(10)]))
    second = save_run(tmp_path / "second", first, data, "task=chat", "data.split.validation=0", "method=lora")
    rows = [json.loads(line) for line in (chat_run.parent / "chat.jsonl").read_text().splitlines()]
    news = [row(f"new {n}", "w1") for n in range(8)]
    prompts = write_rows(tmp_path / "prompts.jsonl", [*rows, *news, row("w3 w9", "w3")])
    main([str(second), str(second), "--prompts", prompts, "--max-tokens", "2", "--output", str(tmp_path / "out")])
    trained = 100 - held_out_rows(chat_run) + 1  # by the first run, and one by the second
    assert f"{trained} prompts are left out" in capsys.readouterr().out


def test_classifiers_are_compared_by_their_labels(tmp_path, capsys):
    data, encoder = write_labelled(tmp_path / "labels.jsonl", 100), save_encoder(tmp_path / "encoder")
    words = ("task=classification", "method=full")
    runs = [
        save_run(tmp_path / name, encoder, data, *words, labels=("left", "right"), seed=seed)
        for seed, name in enumerate(("first", "second"))
    ]
    code = main([*map(str, runs), "--output", str(tmp_path / "out"), "--margin", "0.9"])
    assert code == 0, capsys.readouterr()
    found = result(tmp_path / "out")
    gate = found["gates"][0]
    assert gate["name"] == "classes: exact match" and gate["rows"] == 30
    rows = [
        json.loads(line) for path in (tmp_path / "out/old/answers").iterdir() for line in path.read_text().splitlines()
    ]
    predicted = dstune.predict(str(runs[0]), [each["messages"][0]["content"] for each in rows])
    assert [each["answer"]["content"] for each in rows] == [each["predicted"] for each in predicted]
    hits = [each["predicted"] == row["expected"]["content"] for each, row in zip(predicted, rows, strict=True)]
    assert gate["current"] == pytest.approx(sum(hits) / 30)


def test_a_masked_recording_needs_the_original_prompts(tmp_path, monkeypatch, capsys):
    hosted = answering(Hosted(jobs=0), lambda body: "sent to ann@example.com")
    monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
    rows = [row(f"write to ann@example.com, number {n}", "sent to ann@example.com") for n in range(40)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    new = answering(Hosted(jobs=0, key=hosted.key), lambda body: "sent to ann@example.com")
    with serving(hosted) as url, serving(new) as new_url:
        flags = ["--server", f"{url}/v1", "--models", "m", "--redact", "personal_data", "--prompts", prompts]
        assert record([str(tmp_path / "recording"), *flags]) == 0
        words = [
            str(tmp_path / "recording"),
            f"{new_url}/v1",
            "--new-model",
            "m",
            "--output",
            str(tmp_path / "out"),
            *WIDE,
        ]
        with pytest.raises(UserError, match="40 prompts are masked in the recording"):
            main(words)
        assert not asked(new)
        assert main([*words, "--prompts", prompts]) == 0
        assert "ann@example.com" in asked(new)[0]
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"ann@example.com" not in content and b"EMAIL" in content


def judge(text_of: Callable[[dict], str]) -> Hosted:
    """A judge that is asked about the JSON object at the end of its message."""
    return answering(Hosted(jobs=0), lambda body: text_of(json.loads(body["messages"][0]["content"].splitlines()[-1])))


def prefers_right(pair: dict) -> str:
    return json.dumps({"result": float("right" in pair["second answer"])})


@pytest.fixture
def compared(recording, tmp_path, monkeypatch) -> Callable[..., dict]:
    """Compare the recording with a server whose answers are the texts of `new`, by a judge."""
    counter = iter(range(100))

    def run(new: Callable[[dict], str], judging: Hosted) -> dict:
        hosted, folder = answering(Hosted(jobs=0, key=judging.key), new), tmp_path / f"judged-{next(counter)}"
        monkeypatch.setenv("OPENAI_API_KEY", judging.key)
        with serving(hosted) as url, serving(judging) as judge_url:
            words = [str(recording), f"{url}/v1", "--new-model", "mine", "--output", str(folder), *WIDE]
            main([*words, "--judge", f"{judge_url}/v1", "--judge-model", "judge"])
        found = result(folder)
        return {gate["name"]: gate for gate in found["gates"]} | {"notes": found["notes"]}

    return run


def test_a_judge_that_prefers_a_position_prefers_no_model(compared):
    judging = judge(lambda pair: json.dumps({"result": 0}))
    gate = compared(lambda body: "wrong", judging)["judge: preferred"]
    assert (gate["current"], gate["candidate"], gate["rows"]) == (0.5, 0.5, 60)
    assert len(asked(judging)) == 120  # both positions of every pair


def test_a_judge_finds_the_worse_model(compared):
    judging = judge(prefers_right)
    # In the position of the second answer, `wrong` gets 0; `right` gets 1.
    found = compared(lambda body: "wrong", judging)["judge: preferred"]
    assert (found["current"], found["candidate"], found["verdict"]) == (1.0, 0.0, "worse")


def test_verdicts_that_fail_are_missing_and_not_zero(compared):
    def fails_often(pair: dict) -> str:
        number = int(pair["question"].split()[-1])
        if number % 3 == 0:
            return ["no JSON", '{"result": NaN}', '{"result": "much"}'][number % 9 // 3]
        return json.dumps({"result": 0.5})

    found = compared(lambda body: "also right", judge(fails_often))
    gate = found["judge: preferred"]
    assert (gate["rows"], gate["current"], gate["candidate"]) == (40, 0.5, 0.5)
    assert "the judge judge gave a verdict on 40 of 60 pairs of answers" in found["notes"]
    with pytest.raises(UserError, match=r"a verdict on 0 of 60 pairs.*model_grader_parse_error"):
        compared(lambda body: "also right", judge(lambda pair: "I prefer neither."))


def test_prompts_without_an_expected_answer_count_with_a_judge(tmp_path, monkeypatch):
    hosted, judging = answering(Hosted(jobs=0), lambda body: "right"), judge(prefers_right)
    monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {n}\n" for n in range(30)))
    with serving(hosted) as url, serving(judging) as judge_url:
        words = [f"{url}/v1", f"{url}/v1", "--old-model", "a", "--new-model", "b", "--prompts", str(prompts), *WIDE]
        words += ["--output", str(tmp_path / "out")]
        with pytest.raises(UserError, match="30 prompts have no expected answer"):
            main(words)
        assert main([*words, "--judge", f"{judge_url}/v1", "--judge-model", "judge"]) == 0
    (gate,) = result(tmp_path / "out")["gates"]
    assert (gate["name"], gate["rows"], gate["candidate"]) == ("judge: preferred", 30, 0.5)


def test_a_model_on_this_machine_can_judge(recording, chat_run, tmp_path):
    """A tiny model that was never trained to judge gives no JSON: it is refused rather than counted."""
    words = [str(recording), str(recording), "--output", str(tmp_path / "out"), "--judge", str(chat_run)]
    with pytest.raises(UserError, match="a verdict on 0 of 60 pairs"):
        main(words)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["http://example.com/v1", "{run}"], "in the clear"),
        (["{run}", "{run}", "--new-model", "x"], "no other name"),
        (["{run}", "{run}", "--judge", "http://127.0.0.1:1/v1"], "a judge on a server"),
        (["{run}", "{run}", "--judge-model", "x"], "a judge on a server"),
        (["{folder}", "{run}"], "is no recording, run or model"),
        (["{run}", "{run}", "--max-tokens", "0"], "expected at least 1"),
        (["http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1"], "neither side is a recording"),
    ],
)
def test_words_that_mean_nothing_are_refused(chat_run, tmp_path, words, match):
    (tmp_path / "empty").mkdir()
    places = {"run": chat_run, "folder": tmp_path / "empty"}
    with pytest.raises(UserError, match=match):
        main([*(word.format(**places) for word in words), "--output", str(tmp_path / "out")])


def test_prompts_with_tools_are_asked_by_a_server(chat_run, tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    prompts = write_rows(tmp_path / "prompts.jsonl", [row(f"new {n}", "w1", tools=[tool]) for n in range(9)])
    with pytest.raises(UserError, match="prompts have tools") as refused:
        main([str(chat_run), str(chat_run), "--prompts", prompts, "--output", str(tmp_path / "out")])
    assert f"dstune serve {chat_run}" in refused.value.problems[0].fix
