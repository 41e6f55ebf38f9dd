"""Represents a run as an object: its metrics, its result, and its model."""

from __future__ import annotations

import html
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import METRICS_BYTES, parse_json, read_file

MAX_METRICS = 8
"""Metrics in the table that a notebook shows."""


class Run:
    """A run, read from the files of its directory whenever it is asked, so that it may still be training.

    Returned by `dstune.train` and `dstune.load_run`.
    """

    def __init__(self, path: str | Path):
        """Raises UserError: `path` is not the directory of a run."""
        from dstune.launch.rundir import run_directory

        self.dir: Path = run_directory(Path(path))
        """The run directory."""

    def __fspath__(self) -> str:
        return str(self.dir)

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r}, status={self.status!r})"

    @property
    def status(self) -> str:
        """`running`, `pending`, `completed`, `stopped`, `preempted`, `failed` or `dead`, as `dstune status` reports it."""
        from dstune.launch.manage import status_of

        return status_of(self.dir).state

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping for each row of `metrics.jsonl`, in order: `pandas.DataFrame(run.metrics)` makes a table of them.

        Training steps have `loss`, `lr`, `grad_norm`, ...; evaluations have `eval/NAME`.

        Raises UserError if the file cannot be read.
        """
        rows, file = [], self.dir / "metrics.jsonl"
        try:
            lines = read_file(file, METRICS_BYTES).splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            fix = "give a run whose files you may read"
            raise UserError(Problem(str(file), f"cannot be read: {error.strerror}", fix)) from None
        for line in lines:
            with suppress(ValueError):  # a running process may be writing the last line
                rows.append(parse_json(line))
        return [row for row in rows if isinstance(row, dict)]

    @property
    def result(self) -> dict[str, Any]:
        """The content of `result.json`: status, steps, metrics before and after training, checkpoint, export. Empty until the run
        ends."""
        from dstune.launch.records import read_result

        return read_result(self.dir) or {}

    @property
    def config(self) -> Any:
        """The configuration of the run (`dstune.config.schema.RunConfig`), for example `run.config.trainer.seed`."""
        from dstune.config.run_file import read_run

        return read_run(self.dir / "run.yaml").config

    def report(self) -> Report:
        """Write `report.html` anew and return it; a notebook shows the page."""
        from dstune.report.page import REPORT_FILE, write

        write([self.dir], self.dir / REPORT_FILE)
        return Report(self.dir / REPORT_FILE)

    def predict(
        self, rows: Any, *overrides: str, checkpoint: str | int = "last", **options: Any
    ) -> list[dict[str, Any]]:
        """Run `dstune.predict` with this run; the model stays in memory between calls."""
        return self._models.predict(rows, overrides, checkpoint=checkpoint, **options)

    def generate(self, prompt: Any, *, checkpoint: str | int = "last", **options: Any) -> Any:
        """Run `dstune.generate` with this run; the model stays in memory between calls."""
        return self._models.generate(prompt, checkpoint=checkpoint, **options)

    def evaluate(self, *overrides: str, split: str = "validation", checkpoint: str | int = "last") -> dict[str, Any]:
        """Run `dstune.evaluate` with this run."""
        from dstune.api.models import evaluate

        return evaluate(self.dir, *overrides, split=split, checkpoint=checkpoint)

    def export(self, path: str | Path, **options: Any) -> Path:
        """Run `dstune.export` with this run; `options` are those of `dstune.export`."""
        from dstune.api.models import export

        return export(self.dir, path, **options)

    def resume(self, *overrides: str, progress: bool = True) -> Run:
        """Continue the run from its newest checkpoint, for example longer: `run.resume("trainer.epochs=3")`.

        Blocks until the run has ended, as `dstune.train` does, and raises what it raises.
        """
        from dstune.api.launching import resume

        self._models.forget()
        return Run(resume(self.dir, *overrides, progress=progress))

    @cached_property
    def _models(self) -> Any:
        from dstune.api.models import Loaded

        return Loaded(self.dir)

    def _repr_html_(self) -> str:
        """Return a short table, for notebooks."""
        result = self.result
        metrics_before, metrics_after = result.get("eval_initial") or {}, result.get("eval_final") or {}
        names = [name for name, value in metrics_after.items() if isinstance(value, (int, float))][:MAX_METRICS]
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{_number(metrics_before.get(name))}</td><td>{_number(metrics_after[name])}</td></tr>"
            for name in names
        ]
        head = f"<b>{html.escape(str(self.dir))}</b>: {html.escape(self.status)}"
        if "steps" in result:
            head += f", {result['steps']} steps"
        table = f"<table><tr><th></th><th>before</th><th>after</th></tr>{''.join(rows)}</table>" if rows else ""
        return f"<div>{head}{table}</div>"


class Report:
    """A report page; a notebook shows it in a frame."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        # In a folder that others write to, the page may no longer be dstune's: without an origin, it cannot reach the notebook.
        return f'<iframe sandbox="allow-scripts" srcdoc="{page}" width="100%" height="700" frameborder="0"></iframe>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def load_run(path: str | Path, *, trust: Sequence[str] = ()) -> Run:
    """Return the run in the directory `path`, whoever started it: `dstune.load_run("runs/sentiment/2026-01-31_10-00-00")`.

    trust: keys of its `run.yaml` to accept although you have not signed them, such as `["model.trust_remote_code"]`. These are keys
        that run code or contact other machines (docs/security.md).

    Raises:
        UserError: `path` is not the directory of a run, or `trust` names a key that no run has.
    """
    from dstune.api.launching import refuse_lone

    refuse_lone(trust=trust)
    run = Run(path)
    if trust:
        from dstune.config.run_file import read_run_content
        from dstune.config.trust import believe, check_keys

        check_keys(trust, read_run_content(run.dir / "run.yaml"))
        believe(trust, run.dir)
    return run
