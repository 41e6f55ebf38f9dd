"""Weights & Biases behind a wall: whatever happens to it, training goes on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.config.convert import to_dict
from dstune.config.schema import RunConfig, WandbMode
from dstune.tracking.jsonl import plain

INIT_TIMEOUT_SECONDS = 60.0
FINISH_TIMEOUT_SECONDS = 300.0
"""How long an unreachable server may hold up the end of a run; what is not uploaded stays in the run directory."""

Row = Mapping[str, float | int | str]


class WandbSink:
    """One W&B run for one run directory, the same one after a resume (its id is kept in `wandb-id`).

    Never prompts, never raises: the first exception is reported through `warn` and ends the sink. Files stay inside the
    run directory; console capture, git, code, machine and system data are off.
    """

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None]):
        self._warn = warn
        self._run: Any = None
        self._first_step = 0
        self._guard(lambda: self._start(config, run_dir))

    def log(self, step: int, metrics: Row) -> None:
        """Rows of one step become one row of the W&B run."""
        if self._is_new(step):
            self._guard(lambda: self._run.log(plain(metrics), step=step))

    def samples(self, step: int, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
        if self._is_new(step):
            self._guard(lambda: self._log_table(step, rows, columns))

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.summary.update(plain(values)))

    def finish(self, status: str) -> None:
        """Close the W&B run; `status` is that of result.json."""
        if self._run is not None:
            self._guard(lambda: self._finish(status))
            self._run = None

    def _is_new(self, step: int) -> bool:
        # A resumed run repeats the steps between its checkpoint and its end, bit for bit; the server has them already.
        return self._run is not None and step >= self._first_step

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            self._warn(f"warning: W&B is off for the rest of this run: {type(error).__name__}: {_first_line(error)}")

    def _start(self, config: RunConfig, run_dir: Path) -> None:
        # W&B reads these once, at import: no crash reports to its makers, no lines of its own on the console, and no
        # staging area in the home directory.
        os.environ.update(WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")
        os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir / "wandb" / "cache"))
        (run_dir / "wandb").mkdir(exist_ok=True)
        import wandb

        mode = config.tracking.wandb.mode
        if mode is WandbMode.online:
            reason = "no W&B key found (WANDB_API_KEY or `wandb login`)"
            try:
                if _has_credentials(wandb):
                    self._run = _start_run(wandb, config, run_dir, WandbMode.online)
                    self._first_step = self._run.step
                    return
            except wandb.errors.CommError as error:
                reason = f"W&B's server does not answer ({_first_line(error)})"
                wandb.teardown()  # its service still holds the id of the run that did not start
            self._warn(
                f"warning: {reason}: this run is tracked offline;"
                f" upload it later with `wandb sync {run_dir / 'wandb'}/offline-run-*`"
            )
        self._run = _start_run(wandb, config, run_dir, WandbMode.offline)

    def _log_table(self, step: int, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
        import wandb

        data = [[str(row.get(column, "")) for column in columns] for row in rows]
        self._run.log({"samples": wandb.Table(columns=list(columns), data=data)}, step=step)

    def _finish(self, status: str) -> None:
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status in ("completed", "stopped") else 1)


def _start_run(wandb: Any, config: RunConfig, run_dir: Path, mode: WandbMode) -> Any:
    return wandb.init(
        id=_run_id(run_dir),
        project=config.tracking.project,
        entity=config.tracking.wandb.entity,
        group=config.tracking.group,
        tags=list(config.tracking.tags),
        name=config.run.name,
        config=without_secrets(to_dict(config)),
        # An offline run cannot ask the server whether it exists; `wandb sync` joins equal ids.
        resume="allow" if mode is WandbMode.online else None,
        settings=wandb.Settings(
            mode=mode.value,
            root_dir=str(run_dir),
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT_SECONDS,
            finish_timeout=FINISH_TIMEOUT_SECONDS,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )


def without_secrets(config: Any) -> Any:
    """`config` without the values that are taken from the environment: they may be keys."""
    if isinstance(config, Mapping):
        return {key: without_secrets(value) for key, value in config.items() if not _from_environment(value)}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value) for value in config if not _from_environment(value)]
    return config


def _from_environment(value: Any) -> bool:
    return isinstance(value, str) and "${oc.env" in value


def _has_credentials(wandb: Any) -> bool:
    """Whether W&B would find a key by itself: environment, netrc file or its settings files. Asks nobody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    return bool(settings.api_key or wbauth.read_netrc_auth(host=settings.base_url))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
