"""`dstune init DATA`: the task of the rows, the model of the machine, and a file that composes to what it says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.printed_commands import printed

from dstune import cli
from dstune.config.compose import compose
from dstune.config.plain_file import expand
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.launch import machine
from dstune.launch.machine import Here
from dstune.launch.starter import main
from dstune.planning.fillers import fillers
from dstune.planning.hardware import Cluster, known_device

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "messages": ([{"messages": TURNS}], {"task.name": "chat"}),
    "alpaca": ([{"instruction": "Add", "input": "1 1", "output": "2"}], {"task.name": "chat"}),
    "preference": ([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}], {"task.name": "preference", "task.loss.name": "dpo"}),
    "feedback": (
        [{"prompt": "Hi", "completion": "Hello", "label": True}],
        {"task.name": "preference", "task.loss.name": "kto"},
    ),
    "text": ([{"text": "Once upon a time"}], {"task.name": "causal_lm"}),
    "labels": (
        [{"text": "a film", "label": "good"}, {"text": "b", "label": "bad"}],
        {"task.name": "classification", "task.multi_label": False},
    ),
    "several labels": ([{"text": "a film", "labels": ["good", "long"]}], {"task.multi_label": True}),
    "numbers": ([{"text": "a film", "label": 0.5}], {"task.regression": True}),
    "tags": ([{"tokens": ["Ada", "met"], "tags": ["B-PER", "O"]}], {"task.name": "token_classification"}),
    "questions": (
        [{"question": "Who?", "context": "Ada met", "answers": {"text": ["Ada"], "answer_start": [0]}}],
        {"task.name": "question_answering"},
    ),
    "translation": ([{"source": "a", "target": "b"}], {"task.name": "seq2seq"}),
    "vectors": ([{"anchor": "a", "positive": "b"}], {"task.name": "embedding"}),
    "own names": (
        [{"id": i, "review text": f"film number {i}", "stars": str(i % 3)} for i in range(30)],
        {"task.name": "classification", "data.columns": {"text": "review text", "label": "stars"}},
    ),
    "two texts": (
        [{"customer": f"my order {i} is late", "agent": f"we look into order {i} at once"} for i in range(30)],
        {"task.name": "chat", "data.columns": {"prompt": "customer", "completion": "agent"}},
    ),
    "question and answer": ([{"question": "How are you?", "answer": "I am well."}], {"task.name": "chat"}),
    "instruction and response": ([{"instruction": "Add 1 and 1", "response": "2"}], {"task.name": "chat"}),
    "query and passage": ([{"query": "who is Ada", "passage": "Ada was a mathematician"}], {"task.name": "embedding"}),
    "text and summary": ([{"text": "a long story", "summary": "a story"}], {"task.name": "seq2seq"}),
    "article and highlights": ([{"article": "a long story", "highlights": "a story"}], {"task.name": "seq2seq"}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return name


def on(monkeypatch: pytest.MonkeyPatch, device: str, devices: int = 1) -> None:
    found = known_device(device)
    assert found is not None
    monkeypatch.setattr(machine, "here", lambda config: Here(Cluster(found, devices, host_gib=64.0), found.memory_gib))


def composed(file: str = "my.yaml") -> RunConfig:
    config = compose(expand([file])).config
    validate(config)
    return config


def value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_the_task_of_the_rows(folder: Path, kind: str, capsys):
    rows, expected = ROWS[kind]
    assert cli.main(["init", write_rows(rows)]) == 0
    config = composed()
    assert {key: value(config, key) for key in expected} == expected
    assert config.data.train == "rows.jsonl"
    assert config.run.name == "rows"
    assert "dstune train my.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "model", "method"),
    [
        ("NVIDIA H100 80GB HBM3", "Qwen/Qwen3-8B", "lora"),
        ("NVIDIA GeForce RTX 4090", "Qwen/Qwen3-8B", "lora"),
        ("NVIDIA GeForce RTX 3060", "Qwen/Qwen3-4B", "lora"),
    ],
)
def test_the_largest_model_that_fits_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, model: str, method: str
):
    on(monkeypatch, device)
    assert main([write_rows([{"messages": TURNS}] * 40)]) == 0
    config = composed()
    assert (config.model.path, config.method.name) == (model, method)


@pytest.mark.parametrize(("devices", "rows_of_pass"), [(1, 4), (2, 4), (4, 2), (8, 1)])
def test_no_device_computes_micro_batches_for_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, devices: int, rows_of_pass: int
):
    """8 rows of a step in micro-batches of 4 would leave half of 4 devices, and most of 8, with fillers."""
    on(monkeypatch, "NVIDIA H100 80GB HBM3", devices)
    assert main([write_rows([{"messages": TURNS}] * 16)]) == 0
    config = composed()
    assert (config.trainer.global_batch_size, config.trainer.rows) == (8, rows_of_pass)
    assert list(fillers(config, devices)) == []
    assert main([write_rows([{"messages": TURNS}] * 16), "trainer.micro_batch_size=4", "--force"]) == 0
    assert composed().trainer.rows == 4, "what the user says is kept"


def test_without_a_gpu_a_packaged_model(folder: Path):
    main([write_rows([{"messages": TURNS}])])
    assert composed().model.path == "sample://smollm2"
    main([write_rows(ROWS["labels"][0]), "--force"])
    assert composed().model.path == "sample://minilm"


def test_rows_with_images_get_a_model_that_sees(folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}
    file = write_rows([{"messages": [seen, TURNS[1]], "images": ["a.png"]}])
    main([file])
    assert composed().model.path == "HuggingFaceTB/SmolVLM-256M-Instruct"
    on(monkeypatch, "NVIDIA GeForce RTX 4090")
    main([file, "--force"])
    assert composed().model.path == "Qwen/Qwen3-VL-2B-Instruct"
    main([file, "model=smollm2", "--force"])
    assert composed().model.path == "sample://smollm2"


def test_rows_that_are_compared_get_larger_steps(folder: Path):
    main([write_rows([{"anchor": "a", "positive": "b"}])])
    assert composed().trainer.global_batch_size == 32


def test_the_fix_names_a_free_file(folder: Path):
    file = write_rows([{"messages": TURNS}])
    for name in ("my.yaml", "my-2.yaml"):
        Path(name).write_text("mine")
    with pytest.raises(UserError, match=r"--output my-3\.yaml"):
        main([file])


def test_lengths_and_numbers_of_rows_decide(folder: Path):
    main([write_rows([{"text": "word " * 400}] * 30)])
    few = composed()
    assert (few.data.max_length, few.data.packing, few.trainer.epochs, few.trainer.global_batch_size) == (
        1024,
        False,
        3,
        8,
    )
    main([write_rows([{"text": f"word {i}"} for i in range(6000)]), "--force"])
    many = composed()
    assert (many.data.max_length, many.data.packing, many.trainer.epochs, many.trainer.global_batch_size) == (
        256,
        True,
        2,
        32,
    )


def test_what_the_user_says_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, "NVIDIA GeForce RTX 4090")
    words = ["task=classification", "data.columns={text: story, label: kind}", "model=bert_base", "optimizer.lr=3e-5"]
    main([write_rows([{"story": "a b", "kind": "x"}, {"story": "c", "kind": "y"}]), *words, "--output", "other.yml"])
    config = composed("other.yml")
    assert (config.task.name, config.model.path, config.optimizer.lr) == (
        "classification",
        "google-bert/bert-base-uncased",
        3e-5,
    )
    assert config.data.columns == {"text": "story", "label": "kind"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["none.jsonl"], "no such file"),
        (["empty.jsonl"], "empty"),
        (["numbers.jsonl"], "no task reads the columns a, b"),
        (["rows.jsonl", "task=loar"], "there is no such task"),
        (["rows.jsonl", "task=classification"], "task=classification needs"),
        (["rows.jsonl", "optimizer.lr=-1"], "must be"),
        (["rows.jsonl", "--output", "my.txt"], "must end in .yaml"),
        (["rows.jsonl", "--output", "there.yaml"], "exists already"),
        (["rows.jsonl", "--output", "no/my.yaml"], "cannot be written"),
    ],
)
def test_refusals_write_nothing(folder: Path, words: list[str], reason: str):
    write_rows([{"messages": TURNS}])
    write_rows([], "empty.jsonl")
    write_rows([{"a": 1, "b": 2}], "numbers.jsonl")
    Path("there.yaml").write_text("mine")
    with pytest.raises(UserError) as caught:
        main(words)
    assert reason in str(caught.value)
    assert not Path("my.yaml").exists() and Path("there.yaml").read_text() == "mine"


def test_names_of_strangers_stay_in_their_comment(folder: Path):
    hostile = "x\nmodel: evil\n# \x1b[31m"
    name = "a\nmodel: evil.jsonl"
    main([write_rows([{"text": "a b", "label": "c", hostile: "d"}, {"text": "b", "label": "e", hostile: "f"}], name)])
    config = composed()
    assert config.model.path == "sample://minilm"
    assert config.data.train == name
    assert "\x1b" not in Path("my.yaml").read_text()


def test_init_plugin_is_another_thing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["init", "plugin", "metric", "mine.py"]) == 0
    assert Path("mine.py").is_file()


def test_help(capsys: pytest.CaptureFixture[str]):
    check: Callable[[list[str]], int] = cli.main
    with pytest.raises(SystemExit):
        check(["init", "--help"])
    assert "init plugin KIND" in capsys.readouterr().out


def test_what_is_wrong_with_the_rows_is_said(folder: Path, capsys):
    rows = [{"text": f"film {i}", "label": "good" if i % 20 else "bad", "year": 1990} for i in range(40)]
    file = write_rows([*rows, {"text": "film", "label": None, "year": 1990}, {"text": 3, "label": "good", "year": 1}])
    with Path(file).open("a") as stream:
        stream.write("{not json\n")
    assert main([file]) == 0
    out = capsys.readouterr().out
    assert "cannot be read; rows.jsonl:" in out
    assert "not read: year" in out
    assert "rows have no label" in out
    assert "rows have label 'good'" in out


GUESSED = [{"customer mail": f"my order {i} is late", "reply": f"we look into order {i} at once"} for i in range(30)]


def test_a_guess_says_what_the_rows_may_be_for_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]):
    file = write_rows(GUESSED)
    assert main([file, "trainer.epochs=2"]) == 0
    assert "# a guess: 'reply' answers 'customer mail'" in Path("my.yaml").read_text()
    out = capsys.readouterr().out
    commands = [words for words in printed(out) if words[0] == "init"]
    assert len(commands) == 2
    read = []
    for words in commands:
        assert cli.main(words) == 0  # over the file that it wrote
        config = composed()
        read.append((config.task.name, dict(config.data.columns)))
        assert config.trainer.epochs == 2
    assert read == [
        ("chat", {"prompt": "reply", "completion": "customer mail"}),
        ("embedding", {"anchor": "customer mail", "positive": "reply"}),
    ]


def test_a_terminal_is_asked_what_the_rows_are_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The third of three readings, after an answer that is none of them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("9\n3\n"))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert main([write_rows(GUESSED)]) == 0
    assert composed().task.name == "embedding"
    assert "a guess" not in Path("my.yaml").read_text()
    out = capsys.readouterr().out
    assert out.count("[1-3, default 1]") == 2 and "init" not in out


@pytest.mark.parametrize("kind", ["messages", "labels", "question and answer", "text"])
def test_rows_that_leave_no_doubt_ask_nothing(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    assert main([write_rows(ROWS[kind][0])]) == 0
    assert "guess" not in capsys.readouterr().out + Path("my.yaml").read_text()
