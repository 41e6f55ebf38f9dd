"""The methods against the ZeRO stages and what else restricts them: a table made from the rules themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dstune.config.names import default_classes
from dstune.config.schema import RunConfig
from dstune.config.validate import find_problems
from dstune.core.errors import Problem
from dstune.launch.first_rows import hardware_problems
from dstune.protocols import METHODS, TASKS

STAGES = (0, 1, 2, 3)


def example(method: str, task: str, stage: int) -> RunConfig:
    """Return a run of the method with everything else as it is when nothing is said; rows are not packed."""
    sections: dict[str, Any] = {section: cls() for section, cls in default_classes().items()}
    sections["data"] = replace(sections["data"], train="rows.jsonl", packing=False)
    sections["zero"] = replace(sections["zero"], stage=stage)
    sections |= {"task": TASKS.configs()[task](), "method": METHODS[method].example()}
    return RunConfig(**sections)


def tasks_of(method: str) -> list[str]:
    """Return the tasks that the method trains."""
    return [task for task in TASKS if not _about(find_problems(example(method, task, 2)), "method")]


def packs(method: str) -> bool:
    """Return whether the method trains packed rows, in the tasks that pack any."""
    for task in tasks_of(method):
        config = example(method, task, 2)
        packed = replace(config, data=replace(config.data, packing=True))
        if not _about(find_problems(packed), "data.packing"):
            return True
    return False


def checkpoints_activations(method: str) -> bool:
    config = example(method, tasks_of(method)[0], 2)
    config = replace(config, trainer=replace(config.trainer, activation_checkpointing=True))
    return not _about(find_problems(config), "trainer.activation_checkpointing")


def _about(problems: list[Problem], key: str) -> list[Problem]:
    return [problem for problem in problems if problem.where == key or problem.where.startswith(f"{key}.")]


def matrix_table() -> str:
    """Return the table in Markdown, with a note for each cell that is refused."""
    lines = [
        "| `method=` | ZeRO 0 | 1 | 2 | 3 | packed rows | activation checkpointing | `export --merge` | tasks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for method in METHODS:
        tasks = tasks_of(method)
        cells = [*_stages(method, tasks[0], notes)]
        cells += ["yes" if allowed else "no" for allowed in (packs(method), checkpoints_activations(method))]
        cells += [
            "yes" if METHODS[method].merges else "",
            "all" if len(tasks) == len(TASKS.configs()) else ", ".join(tasks),
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    for method, reason in METHODS.refused.items():
        lines.append(f"| `{method}` | {' | '.join([_note(f'no: {reason}', notes)] * len(STAGES))} | | | | |")
    notes = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *notes, ""])


def _stages(method: str, task: str, notes: list[str]) -> Iterator[str]:
    for stage in STAGES:
        config = example(method, task, stage)
        refused, on_cpu = find_problems(config), list(hardware_problems(config, 0))
        if refused:
            yield _note(f"no: {refused[0].reason}", notes)
        elif on_cpu:
            yield _note(f"GPU only: {on_cpu[0].reason}", notes)
        else:
            yield "yes"


def _note(text: str, notes: list[str]) -> str:
    """Return `no` with the number of its note below the table."""
    short, _, reason = text.partition(": ")
    if reason not in notes:
        notes.append(reason)
    return f"{short} ({notes.index(reason) + 1})"
