"""Refuse, before a cycle begins, runs that cannot learn from feedback, and gates or rows that cannot be judged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from dstune.config.data_schema import AUTOMATIC
from dstune.config.schema import RunConfig
from dstune.config.validate import answers_no_questions
from dstune.core.errors import Problem, UserError
from dstune.cycle.settings import CycleSettings, Gates
from dstune.data.images.places import COLUMN, is_place
from dstune.data.problems import RowError
from dstune.protocols import task_of
from dstune.serve.images import asks_about_images

Row = Mapping[str, Any]
IMAGES = "shows an image, which the log of requests does not keep and no gate looks at"


def check_task(config: RunConfig) -> None:
    """Check that the run's task can learn from feedback: from texts with one label, or conversations. Raises UserError if not."""
    task = task_of(config.task)
    has_one_label = "text_label" in task.formats and task.has_labels and not task.several_labels
    if not has_one_label and not (task.generates and "messages" in task.formats):
        reason = "its task learns from rows that feedback does not give: what clients say is one label, or an answer"
        fix = "a run of task=classification (one label a text) or task=chat"
        raise UserError(Problem("run", reason, fix, f"task={config.task.name}"))


def shows_images(row: Row) -> bool:
    """Return whether a row has a column of images, or a message with an image part."""
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    has_places = any(is_place(part) for content in contents if isinstance(content, list) for part in content)
    return bool(row.get(COLUMN)) or has_places or asks_about_images(row)


def check_gates(
    settings: CycleSettings,
    config: RunConfig,
    labels: Collection[str],
    parts: Mapping[str, Sequence[Row]],
) -> None:
    """Check that the gates can be judged. Raises UserError with every problem.

    labels: the model's labels. parts: rows of the first run by part.
    """
    problems = [*_problems_of_text_gates(settings.gates, config)]
    if any(map(shows_images, (row for rows in parts.values() for row in rows))):
        problems.append(Problem("run", f"a row of it {IMAGES}", "a run on text", str(settings.run)))
    for spec in settings.gates.tests:
        problems += _problems_of_rows("gates.tests", spec, lambda row: _fault_of_test(row, config, labels))
    for key, prompts in (("gates.safety", settings.gates.safety), ("gates.canaries", settings.gates.canaries)):
        if prompts is not None:
            problems += _problems_of_rows(key, prompts, _fault_of_prompt)
    if problems:
        raise UserError(problems)


def _problems_of_text_gates(gates: Gates, config: RunConfig) -> Iterator[Problem]:
    for name in ("probes", "memorised"):
        if getattr(gates, name) not in ((), None) and (reason := answers_no_questions(config)):
            yield Problem(f"gates.{name}", reason, f"leave gates.{name} out")


def _problems_of_rows(key: str, spec: str, fault_of: Callable[[Row], str]) -> Iterator[Problem]:
    """Yield a problem with the first row of a file that has a fault."""
    faults = [(place, fault) for place, row in rows_of_spec(spec) if (fault := fault_of(row))]
    if faults:
        place, fault = faults[0]
        more = f" ({len(faults) - 1} rows more have a fault)" if len(faults) > 1 else ""
        yield Problem(key, f"{place}: the row {fault}{more}", "leave the row out, or correct it", spec)


def _fault_of_test(row: Row, config: RunConfig, labels: Collection[str]) -> str:
    """Return why a row of a test set cannot be judged; empty if it can."""
    from dstune.data.rows import normalise, recognise

    if shows_images(row):
        return IMAGES
    try:
        normalised = normalise(row, recognise(row, {}, AUTOMATIC, config.task, "gates.tests"), {}, config.task)
    except (RowError, UserError) as error:
        return f"is no row of task={config.task.name}: {error}"
    if labels and normalised.get("label") not in labels:
        return f"has the label {normalised.get('label')!r}, which the model lacks"
    return ""


def _fault_of_prompt(row: Row) -> str:
    if shows_images(row):
        return IMAGES
    if not isinstance(row.get("pattern"), str) and "expected" not in row:
        return "has neither `expected` nor a `pattern`"
    return ""


def rows_of_spec(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the fields of each row in a file that the gates name. Raises UserError."""
    from dstune.data import sources

    for file in sources.expand(spec, "gates", split="test"):
        for raw in sources.read(file):
            if raw.fields is not None:
                yield raw.place, dict(raw.fields)
