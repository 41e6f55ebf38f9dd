"""The pages of docs/tasks/ say what a task reads, takes and reports, and what the plan of their command prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from support.printed_commands import check

from dstune.config.compose import compose
from dstune.config.documentation import documentation
from dstune.data.formats import recognise
from dstune.data.rows import normalise
from dstune.launch import plan
from dstune.protocols import task_of
from dstune.protocols.task import TaskConfig
from dstune.tasks.reinforcement.metrics import reinforcement_metrics

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((DOCS / "tasks").glob("*.md"))}
CHOICES = {"kto": ["task=preference", "task.loss=kto"]}
"""What chooses the task of a page that does not have the task's name."""
OF_ONE_TASK = sorted(PAGES.keys() - {"several"})


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def task_on(page: str) -> TaskConfig:
    example = ["task.rewards=[number]"] if page == "reinforcement" else []
    example += ["task.teacher=sample://smollm2"] if page == "distillation" else []
    chosen = CHOICES.get(page, [f"task={page}"])
    return compose([*chosen, *example, "model=smollm2", "data.train=rows.jsonl"]).config.task


def section(page: str, title: str) -> str:
    return PAGES[page].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_task_has_a_page_that_the_table_names() -> None:
    tasks = {file.stem for file in (DOCS.parent / "conf" / "task").glob("*.yaml")}
    assert PAGES.keys() == tasks | {"kto", "several"}
    assert set(re.findall(r"\(tasks/(\w+)\.md\)", (DOCS / "tasks.md").read_text(encoding="utf-8"))) == PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "environments.md").read_text(encoding="utf-8")
    for name, source in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(source, encoding="utf-8")  # what a recipe names as its plugin
    assert commands(page)
    for program, *words in commands(page):
        assert program == "dstune"
        check(words)


@pytest.mark.parametrize("page", OF_ONE_TASK)
def test_rows_are_read(page: str) -> None:
    task = task_on(page)
    rows = [json.loads(line) for block in blocks(page, "json") for line in block.splitlines()]
    assert len(rows) >= 2
    for row in rows:
        normalise(row, recognise(row, {}, "auto", task, "rows.jsonl:1"), {}, task)


@pytest.mark.parametrize("page", OF_ONE_TASK)
def test_keys_exist_for_the_task(page: str) -> None:
    keys = re.findall(
        r"`([a-z_]+(?:\.[a-z_]+)+)`", "\n".join(re.findall(r"^\| ([^|]*) \|", section(page, "Keys"), re.M))
    )
    assert len(keys) >= 4
    name = task_on(page).name
    known = {setting.key for setting in documentation() if not setting.group.startswith("task=")}
    known |= {setting.key for setting in documentation() if setting.group == f"task={name}"}
    assert [key for key in keys if key not in known] == []


@pytest.mark.parametrize("page", OF_ONE_TASK)
def test_metrics_of_the_task_are_explained(page: str) -> None:
    explained = set(re.findall(r"`([\w/]+)`", section(page, "Metrics")))
    assert [name for name in task_of(task_on(page)).metrics if name not in explained] == []


def test_metrics_of_a_rollout_are_explained() -> None:
    names = "reward_sum reward_deviations equal_groups length_sum shortest longest ended_length_sum entropy tool_calls"
    names += " failed_tool_calls clipped_low clipped_high kl absolute_difference largest_difference importance"
    sums = dict.fromkeys(names.split(), 1.0) | {"rewards/NAME/squares": 1.0, "rewards/NAME/failures": 0.0}
    sums |= dict.fromkeys(("completions", "rewarded", "groups", "ended", "tokens", "compared"), 2.0)
    sums |= {"replaced_groups": 1.0, "trained_without_signal": 1.0}
    sums |= {"rewards/NAME/sum": 1.0, "rewards/NAME/count": 2.0, "logged/NAME": 1.0}
    explained = []
    for name in re.findall(r"`([\w/]+)`", section("reinforcement", "Metrics")):
        explained.append(f"{explained[-1].rpartition('/')[0]}{name}" if name.startswith("/") else name)
    assert sorted(reinforcement_metrics(sums).keys() - set(explained)) == []


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page in ("chat", "embedding") else [pytest.mark.ci]) for page in OF_ONE_TASK],
)
def test_the_plan_prints_what_the_page_shows(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    plans = re.findall(r"```bash\ndstune plan ([^\n]*)\n```\n\n```text\n(.*?)\n```", PAGES[page], re.DOTALL)
    assert plans
    for words, shown in plans:
        assert plan.main(shlex.split(words)) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in shown.splitlines() if line not in printed] == []
