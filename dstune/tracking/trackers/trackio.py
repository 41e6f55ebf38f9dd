"""Trackio: a local database of runs with the API of W&B; `trackio show` displays it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dstune.config.convert import to_dict
from dstune.core.errors import Problem
from dstune.protocols import Tracker, tracker
from dstune.protocols.tracker import Row, TrackingConfig
from dstune.tracking.flat import flat, indented, numbers


@tracker
class Trackio(Tracker):
    """Writes metrics under their names in `metrics.jsonl`, answers as text, and the configuration."""

    name = "trackio"
    switch = (
        "Write the run into Trackio's database (needs `pip install '.[trackio]'` in a clone); `trackio show` draws it."
    )
    title = "Trackio"
    variables = ("TRACKIO_",)
    rebuilds = True

    @classmethod
    def missing(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        if find_spec("trackio") is None:
            reason = "the package trackio is not installed"
            yield Problem("tracking.trackio", reason, "pip install '.[trackio]' in a clone of dstune", "true")

    @classmethod
    def names(cls, tracking: TrackingConfig) -> Mapping[str, str | None]:
        return {"tracking.project": tracking.project, "tracking.group": tracking.group}

    def start(self, past: Iterator[Row]) -> None:
        import trackio

        tracking = self._config.tracking
        name = f"{self._run_dir.absolute().parent.name}/{self._run_dir.absolute().name}"
        # Every launch writes the complete run again: steps after the last checkpoint are repeated, and Trackio cannot remove
        # single steps.
        for earlier_run in _runs(trackio.Api(), tracking.project):
            if earlier_run.name == name:
                earlier_run.delete()
        settings = {key: value for key, value in flat(to_dict(self._config)).items() if value is not None}
        options = {"group": tracking.group, "config": settings, "embed": False}
        self._run = trackio.init(tracking.project, name=name, auto_log_gpu=False, auto_log_cpu=False, **options)
        self._markdown = trackio.Markdown
        for row in past:
            self.write(row)

    def location(self) -> str:
        return f"trackio show --project {shlex.quote(self._config.tracking.project)}"

    def write(self, row: Row) -> None:
        self._run.log(numbers(row.metrics), step=row.step)
        new_answers = [answer for answer in row.samples if answer["step"] == row.step]
        for number, answer in enumerate(new_answers):
            text = "\n\n".join(f"**{name}**\n\n{indented(str(answer[name]))}" for name in answer if name != "step")
            self._run.log({f"samples/{number}": self._markdown(text)}, step=row.step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write nothing: Trackio has no place for the result of a run, `result.json` has it."""

    def finish(self, status: str) -> None:
        self._run.finish()


def _runs(api: Any, project: str) -> list[Any]:
    """Return the runs of a project; empty if the project does not exist yet."""
    try:
        return list(api.runs(project))
    except ValueError:
        return []
