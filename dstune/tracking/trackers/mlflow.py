"""MLflow: one run in a folder, a database or on a server, which every launch of a run directory continues."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstune.config.convert import format_value, to_dict
from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import Problem
from dstune.protocols import Tracker, tracker
from dstune.protocols.launcher import PASS, SKIP, Check
from dstune.protocols.tracker import Row, TrackingConfig
from dstune.tracking.flat import flat, numbers

MAX_PARAMETER_CHARACTERS = 500
"""Length of a parameter's value that every MLflow server of recent years accepts."""
PARAMETERS_PER_BATCH = 100
"""A limit of MLflow's API, for parameters and for tags."""
LAST_STEP = "dstune.step"
"""Name of the tag that holds the last step in the store."""
DATABRICKS = "databricks"
SCHEMES = ("file", "http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")
STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "pruned": "KILLED", "preempted": "KILLED", "failed": "FAILED"}


def absolute_store(uri: str) -> str:
    """Return the URI of a store as MLflow takes it: a folder becomes its absolute path."""
    return uri if "://" in uri or uri == DATABRICKS else str(Path(uri).absolute())


def experiment_of(project: str, uri: str) -> str:
    """Return the experiment's name for a project. On Databricks, experiments are paths in the workspace."""
    return f"/Shared/{project}" if uri.startswith(DATABRICKS) and not project.startswith("/") else project


@dataclass(frozen=True)
class MlflowConfig:
    uri: str | None = setting(None, signed=True)
    """Where MLflow keeps runs: a folder, `http://HOST:PORT`, `databricks` or a database; off when not given."""


@tracker
class Mlflow(Tracker):
    """Uses MLflow's client: unlike its fluent API, the client adds no tags about the program, the user or git."""

    Config = MlflowConfig
    name = "mlflow"
    title = "MLflow"
    variables = ("MLFLOW_", "DATABRICKS_")

    @classmethod
    def enabled(cls, tracking: TrackingConfig) -> bool:
        return tracking.mlflow.uri is not None

    @classmethod
    def check(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        uri = tracking.mlflow.uri
        if uri is not None and "://" in uri and not re.match(rf"({'|'.join(SCHEMES)})(\+\w+)?://", uri):
            fix = f"a folder, `databricks`, or {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
            yield Problem("tracking.mlflow.uri", "MLflow has no such store", fix, format_value(uri))

    @classmethod
    def missing(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        uri = tracking.mlflow.uri
        assert uri is not None
        if find_spec("mlflow") is None:
            fix = "pip install '.[mlflow]' in a clone of dstune"
            yield Problem("tracking.mlflow.uri", "the package mlflow is not installed", fix, format_value(uri))
        elif uri.startswith(("sqlite", "postgresql", "mysql", "mssql")) and find_spec("sqlalchemy") is None:
            reason = "mlflow-skinny, which is installed, cannot open a database"
            yield Problem("tracking.mlflow.uri", reason, "pip install mlflow, or give a folder", format_value(uri))

    @classmethod
    def probe(cls) -> Iterator[Check]:
        if find_spec("mlflow") is None:
            yield Check(
                "mlflow", SKIP, "the package mlflow is not installed", "pip install '.[mlflow]' in a clone of dstune"
            )
            return
        versions = ", ".join(
            f"{distribution.name} {distribution.version}"
            for distribution in distributions()
            if distribution.name in ("mlflow", "mlflow-skinny")
        )
        yield Check("mlflow", PASS, f"{versions}; never run on Databricks itself, see docs/registry.md")

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None], *, fresh: bool):
        super().__init__(config, run_dir, warn, fresh=fresh)
        self._id = run_dir / "mlflow-id"
        self._sent = -1

    def start(self, past: Iterator[Row]) -> None:
        uri = self._config.tracking.mlflow.uri
        assert uri is not None
        # MLflow reads these at import or at the first request: no telemetry; a folder may be a store (MLflow 3 wants this
        # stated); and requests give up before they delay the end of a run.
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=absolute_store(str(uri)))
        self._run = self._reopened_run() or self._create()
        files.write(self._id, self._run)
        for row in past:
            self.write(row)

    def location(self) -> str:
        """Return the run and its experiment, without the store's address, which may hold a password."""
        tracking = self._config.tracking
        return f"run {self._run} of experiment {experiment_of(str(tracking.project), str(tracking.mlflow.uri))}"

    def write(self, row: Row) -> None:
        """Write the row unless the store has it. The store has all steps up to `_sent`; a resumed run repeats them exactly."""
        from mlflow.entities import Metric, RunTag

        if row.step <= self._sent:
            return
        milliseconds = round(row.time * 1000)
        metrics = [Metric(name, value, milliseconds, row.step) for name, value in numbers(row.metrics).items()]
        self._client.log_batch(self._run, metrics=metrics, tags=[RunTag(LAST_STEP, str(row.step))])
        self._sent = row.step

    def summary(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(f"result.{name}", str(value)) for name, value in flat(values).items() if value is not None]
        self._client.log_batch(self._run, tags=tags[:PARAMETERS_PER_BATCH])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._run, STATUS[status])

    def _reopened_run(self) -> str | None:
        """Reopen the run of earlier launches and return its id; None if this store has no such run."""
        from mlflow.exceptions import MlflowException

        if not self._id.exists():
            return None
        try:
            run = self._client.get_run(files.read_plain(self._id).decode().strip())
            if self._fresh:  # training starts over, and the run has steps of the earlier attempt
                self._client.delete_run(run.info.run_id)
                return None
            self._client.update_run(run.info.run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        self._sent = int(run.data.tags.get(LAST_STEP, -1))
        return run.info.run_id

    def _create(self) -> str:
        from mlflow.entities import Param

        tracking = self._config.tracking
        name = experiment_of(str(tracking.project), str(tracking.mlflow.uri))
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        tags = {f"dstune.tag.{number}": tag for number, tag in enumerate(to_dict(tracking.tags))}
        if tracking.group is not None:
            tags["dstune.group"] = tracking.group
        if tracking.notes is not None:
            tags["mlflow.note.content"] = to_dict(tracking.notes)
        run = self._client.create_run(experiment, run_name=self._config.run.name, tags=tags).info.run_id
        settings = flat(to_dict(self._config))
        parameters = [Param(key, str(value)[:MAX_PARAMETER_CHARACTERS]) for key, value in settings.items()]
        for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
            self._client.log_batch(run, params=parameters[start : start + PARAMETERS_PER_BATCH])
        return run
