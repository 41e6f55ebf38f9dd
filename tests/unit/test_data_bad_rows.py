"""Every message about a row or a file that cannot be used: docs/data.md, the code, and a case for each hold together."""

from __future__ import annotations

import ast
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.data_helpers import CHATML, byte_tokenizer, data_run, prepared, write_jsonl
from unit.templates import FIRST_OF_TWO, THINKING_PROMPT

from dstune.config.compose import compose
from dstune.config.data_schema import OnBadRow, SplitConfig
from dstune.config.validate import validate
from dstune.core.errors import Problem, UserError
from dstune.protocols.task import TaskConfig
from tests.support.bad_rows import (
    CHAT,
    FILES,
    GOOD,
    JUDGED,
    LABELLED,
    LAST_IS_LOUD,
    NOTHING_MARKED,
    REFUSING,
    REWRITING,
    ROWS,
)

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
NOTHING_HELD_OUT = SplitConfig(validation=0.0)
FIRST_GOOD = {
    "token_classification": {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
    "question_answering": {"question": "q", "context": "a b", "answers": [{"text": "a", "answer_start": 0}]},
    "chat": GOOD,
    "causal_lm": {"text": "a"},
    "classification": LABELLED,
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "embedding": {"anchor": "a", "positive": "b"},
}


def documented(section: str) -> list[str]:
    """The messages of a table of the guide."""
    inside = GUIDE.split(f"<!-- {section}", 1)[1].split(f"<!-- /{section} -->", 1)[0]
    return [line.split("`")[1] for line in inside.splitlines() if line.startswith("| `")]


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)


def first_good(task: TaskConfig, given: Any) -> Any:
    if isinstance(given, dict) and "input_ids" in given:
        return {"input_ids": [1, 2]}
    return {"prompt": "a", "completion": "b", "label": True} if task is JUDGED else FIRST_GOOD[task.name]


def write(folder: Path, task: TaskConfig, given: Any) -> tuple[Path, Path | None]:
    """Training and validation file of a case."""
    path = folder / "rows.jsonl"
    if isinstance(given, pa.Table):
        path = folder / "rows.parquet"
        pq.write_table(given, path)
    elif isinstance(given, list):
        write_jsonl(path, given)
    elif isinstance(given, dict) and any("." in name for name in given):
        ((name, content),) = given.items()
        written = folder / name
        written.write_bytes(content if isinstance(content, bytes) else content.encode())
        if name == "held-out.jsonl":
            return write_jsonl(path, [LABELLED, {"text": "b", "label": "y"}]), written
        path = written
    else:
        rows = [first_good(task, given), given]
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path, None


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(message: str) -> Any:
    if "refuses" in message:
        return byte_tokenizer(REFUSING + byte_tokenizer().chat_template)
    if "rewrites turns" in message:
        return byte_tokenizer(REWRITING)
    if "rewrites earlier" in message:
        return byte_tokenizer(LAST_IS_LOUD)
    if "does not print all messages" in message:
        return byte_tokenizer(FIRST_OF_TWO)
    if "than a server would prompt with" in message:
        return byte_tokenizer(THINKING_PROMPT)
    if "does not print its" in message:
        return byte_tokenizer(CHATML.replace("message['content']", "(message['content'] | replace('again', ''))"))
    if "put together" in message:
        return byte_tokenizer(PARTS)
    if message == "no trainable token":
        return byte_tokenizer(NOTHING_MARKED)
    return byte_tokenizer()


def problems_of(folder: Path, message: str, task: TaskConfig, given: Any, **data: Any) -> list[Problem]:
    train, validation = write(folder, task, given)
    more: dict[str, Any] = {"validation": str(validation)} if validation else {"split": NOTHING_HELD_OUT}
    if isinstance(given, dict) and "input_ids" in given:
        more["format"] = "tokens"
    config = data_run(train, task=task, **more, **data)
    with pytest.raises(UserError) as caught:
        prepared(config, tokenizer_of(message), folder / "cache")
    return caught.value.problems


def unprinted(case: Any) -> bool:
    """No fault of the row: the template prints none of such a field."""
    return ", which this row has; " in case[0]


OF_ROWS, OF_TEMPLATE = [case for case in ROWS if not unprinted(case)], [case for case in ROWS if unprinted(case)]


@pytest.mark.parametrize(("message", "task", "given"), OF_TEMPLATE, ids=[case[0] for case in OF_TEMPLATE])
def test_a_row_with_a_field_that_the_template_drops_has_the_documented_message_where_it_is_skipped(
    tmp_path, message, task, given
):
    (problem,) = problems_of(tmp_path, message, task, given)
    assert problem.where == "model.chat_template"
    config = data_run(tmp_path / "rows.jsonl", task=task, split=NOTHING_HELD_OUT, on_bad_row=OnBadRow.skip)
    report = prepared(config, tokenizer_of(message), tmp_path / "cache").report["train"]
    assert report["bad_rows"] == 1
    (example,) = report["examples"]["bad_rows"]
    assert pattern(message).fullmatch(example["text"]), example
    assert example["place"] == f"{tmp_path / 'rows.jsonl'}:2"


@pytest.mark.parametrize(("message", "task", "given"), OF_ROWS, ids=[case[0] for case in OF_ROWS])
def test_a_bad_row_has_the_documented_message(tmp_path, message, task, given):
    problem = problems_of(tmp_path, message, task, given)[0]
    assert pattern(message).fullmatch(problem.reason), problem.reason
    held_out = tmp_path / "held-out.jsonl"
    file = held_out if held_out.exists() else next(tmp_path.glob("rows.*"))
    first = held_out.exists() or isinstance(given, pa.Table) or given == [GOOD]
    assert problem.where == f"{file}:{1 if first else 2}"


def test_the_guide_lists_what_has_a_case_and_only_that():
    assert documented("messages") == [message for message, _, _ in ROWS]
    assert documented("files") == [message for message, _ in FILES]


def raised_in(file: Path) -> list[str]:
    """The texts of all RowError, RenderError and broken RawRow in a module, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = node.args[:1] if node.func.id in ("RowError", "RenderError") else node.args[3:4]
            if node.func.id in ("RowError", "RenderError", "RawRow") and arguments:
                found.append(_template(arguments[0]))
    return [text for text in found if text.strip("…")]


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    return "…"


def test_the_guide_lists_every_message_of_the_code():
    code = [text for file in sorted((ROOT / "dstune" / "data").glob("*.py")) for text in raised_in(file)]
    assert len(code) > 40
    listed = documented("messages")
    missing = [
        text
        for text in code
        if not any(pattern(message).fullmatch(text) or pattern(text).fullmatch(message) for message in listed)
    ]
    assert missing == []


@pytest.mark.parametrize(("message", "given"), FILES, ids=[message for message, _ in FILES])
@pytest.mark.parametrize("policy", OnBadRow)
def test_a_file_that_cannot_be_read_has_the_documented_message(tmp_path, monkeypatch, message, given, policy):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    files = dict(given) if isinstance(given, dict) else {"": given}
    named = files.pop("", next(iter(files), ""))
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            with zipfile.ZipFile(path, "w") as archive:
                for inner, text in content.items():
                    archive.writestr(inner, text)
        else:
            path.write_bytes(content)
    train = named if "//" in named or named == "nobody/nothing" else f"{tmp_path}/{named}"
    columns = {"prompt": "qestion", "completion": "reply"} if "no such column" in message else {}
    config = data_run(train, on_bad_row=policy, columns=columns, split=NOTHING_HELD_OUT)
    with pytest.raises(UserError) as caught:
        prepared(config, byte_tokenizer(), tmp_path / "cache")
    (problem,) = caught.value.problems
    assert pattern(message).fullmatch(problem.reason), problem.reason
    assert problem.fix
    if columns:
        assert (problem.where, problem.value) == ("data.columns.prompt", "qestion")
        (typed,) = shlex.split(problem.fix)
        assert compose([typed]).config.data.columns == {"prompt": "question", "completion": "reply"}
    if "trian" in named:
        assert problem.fix == f"data.train={tmp_path}/folder:train"


def test_the_commands_of_the_guide_compose():
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) >= 4
    for command in lines:
        assert command[:2] == ["dstune", "train"]
        validate(compose(command[2:]).config)


def test_rows_that_cannot_be_read_and_rows_that_the_template_refuses_are_listed_together(tmp_path, monkeypatch):
    bad, unread = chat_of("bad"), {"messages": [{"role": "usr", "content": "x"}]}
    tools = {**GOOD, "tools": [{"type": "function", "function": {"name": "f"}}]}
    rows = [bad, GOOD, unread, tools, *[unread] * 10]
    train = write_jsonl(tmp_path / "rows.jsonl", rows)
    validation = write_jsonl(tmp_path / "more.jsonl", [unread, chat_of("also bad")])
    tokenizer = byte_tokenizer(REFUSING + byte_tokenizer().chat_template)

    def problems() -> list[Problem]:
        with pytest.raises(UserError) as caught:
            prepared(data_run(train, task=CHAT, validation=str(validation)), tokenizer, tmp_path / "cache")
        return caught.value.problems

    *found, template = problems()
    assert (template.where, "1 row has" in template.reason) == ("model.chat_template", True)
    assert [problem.where for problem in found] == [f"{train}:{line}" for line in (3, *range(5, 14))]
    assert found[-1].reason.endswith("(and 4 more bad rows, 14 in all)")
    write_jsonl(train, [bad, GOOD, unread])
    places = [problem.where for problem in problems()]
    assert sorted(places) == [f"{validation}:1", f"{validation}:2", f"{train}:1", f"{train}:3"]
    monkeypatch.setattr("dstune.data.builder.ROWS_OF_BOTH_FAULTS", 4)
    assert [problem.where for problem in problems()] == [f"{train}:3", f"{validation}:1"]


def chat_of(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes"}]}
