"""Weights & Biases: one W&B run per run directory, over any number of launches.

W&B cannot append to an offline run: a second launch writes a second file, and `wandb sync` replaces the run by the file that it
uploads last (wandb #5865). So an offline launch writes the complete run again from `metrics.jsonl`, and then removes the older
files. An online launch asks the server for its last step, and sends the rows that the server lacks.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

from dstune.config.convert import to_dict
from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import first_line
from dstune.protocols import Tracker, tracker
from dstune.protocols.launcher import PASS, SKIP, Check
from dstune.protocols.tracker import Row, TrackingConfig

INIT_TIMEOUT_SECONDS = 60.0
FINISH_TIMEOUT_SECONDS = 60.0
"""How long W&B's own service tries to reach a server; the tracker waits no longer than `FINISH_SECONDS` of log.py."""
FLUSH_SECONDS = 2.0
"""How often the service writes its file. The offline file of a killed run lacks so much, until the run is resumed."""
MAX_TAG_CHARACTERS = 64

OWN_IDENTITY = ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_DIR")
"""Variables that would make W&B continue another run, or write elsewhere: they are removed from the environment."""


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(frozen=True)
class WandbConfig:
    mode: WandbMode = setting(WandbMode.disabled, signed=lambda mode: mode == WandbMode.online.name)
    """`online` falls back to `offline` where no key is found; never prompts."""
    entity: str | None = setting(None, signed=True)
    """Account or team."""
    name: str | None = None
    """Name of the run in W&B; `run.name` when null."""
    id: str | None = setting(None, signed=True)
    """Id of the run in W&B; random when null."""


@tracker
class Wandb(Tracker):
    """Sends metrics, answers and the configuration, and nothing about the console, git, code, program, machine or system.

    Files stay inside the run directory. The configuration is that of `run.yaml`: it has references to environment variables,
    never their values.
    """

    Config = WandbConfig
    name = "wandb"
    title = "W&B"
    variables = ("WANDB_",)

    @classmethod
    def enabled(cls, tracking: TrackingConfig) -> bool:
        return tracking.wandb.mode is not WandbMode.disabled

    @classmethod
    def names(cls, tracking: TrackingConfig) -> Mapping[str, str | None]:
        wandb = tracking.wandb
        return {"tracking.wandb.entity": wandb.entity, "tracking.wandb.name": wandb.name, "tracking.wandb.id": wandb.id}

    @classmethod
    def needs_variables(cls, tracking: TrackingConfig) -> bool:
        return tracking.wandb.mode is WandbMode.online

    @classmethod
    def without_effect(cls, tracking: TrackingConfig) -> Iterator[tuple[str, tuple[str, str]]]:
        for key in () if cls.enabled(tracking) else ("entity", "name", "id"):
            yield f"tracking.wandb.{key}", ("W&B is off", "tracking.wandb.mode=online")

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """Yield whether there is an API key, looking where a run would look."""
        if os.environ.get("WANDB_API_KEY"):
            yield Check("W&B", PASS, "a key in WANDB_API_KEY")
            return
        import netrc

        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
        file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
        try:
            has_key = file.is_file() and netrc.netrc(file).authenticators(host) is not None
        except (netrc.NetrcParseError, OSError):
            has_key = False
        if has_key:
            yield Check("W&B", PASS, f"a key for {host} in {file}")
        else:
            yield Check("W&B", SKIP, "not logged in; tracking.wandb.mode=offline needs no key", "wandb login")

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None], *, fresh: bool):
        super().__init__(config, run_dir, warn, fresh=fresh)
        self._folder = run_dir / "wandb"
        self._id = run_dir / "wandb-id"
        self._older: list[Path] = []
        self._run: Any = None
        self._next_step = 0

    def start(self, past: Iterator[Row]) -> None:
        self._folder.mkdir(exist_ok=True)
        self._older = list(self._folder.glob("offline-run-*"))
        if self._fresh and any(self._folder.glob("run-*")):
            self._id.unlink(missing_ok=True)  # training starts over, and the server has steps of the earlier attempt
        for name in OWN_IDENTITY:
            os.environ.pop(name, None)
        # W&B reads these once, at import: no crash reports to its makers, no lines on the console, and no staging area in the
        # home directory.
        os.environ.update(WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder))
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._folder / "cache"))
        import wandb

        ignore_working_directory(wandb)
        if self._config.tracking.wandb.mode is WandbMode.online:
            self._run = self._start_online(wandb)
        if self._run is None:
            self.rebuilds = True
            self._run = self._init(wandb, WandbMode.offline)
        self._next_step = self._run.starting_step  # `step` still says 0 here for a resumed run (wandb 0.31)
        # Charts show every metric over `step`, the optimizer step, instead of W&B's own `Step`.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for row in past:
            self.write(row)
        if self.rebuilds:
            self._remove_older()

    def location(self) -> str:
        if self.rebuilds:
            return f"offline; upload it with `wandb sync {shlex.quote(self._run.settings.sync_dir)}`"
        return str(self._run.url)

    def write(self, row: Row) -> None:
        """Write the row unless the server has it. It has all steps before `_next_step`; a resumed run repeats them exactly."""
        if row.step < self._next_step:
            return
        values = {"step": row.step, **row.metrics, "_timestamp": row.time}
        if row.samples:
            import wandb

            columns = list(row.samples[0])
            values["samples"] = wandb.Table(
                columns=columns, data=[[answer.get(column) for column in columns] for answer in row.samples]
            )
        self._run.log(values, step=row.step, commit=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self, status: str) -> None:
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status in ("completed", "stopped", "pruned") else 1)
        if not self.rebuilds:
            self._remove_older()  # the server has the complete run now

    def _start_online(self, wandb: Any) -> Any:
        """Return the run on the server. None if that fails: a warning then says why, and the run is tracked offline."""
        reason = "no W&B key found (WANDB_API_KEY or `wandb login`)"
        try:
            if _has_credentials(wandb):
                return self._init(wandb, WandbMode.online)
        except (wandb.errors.Error, OSError) as error:
            reason = f"W&B cannot be used ({first_line(error)})"
            wandb.teardown()  # W&B's service still holds the id of the run that did not start
        self._warn(f"warning: {reason}: this run is tracked offline")
        return None

    def _init(self, wandb: Any, mode: WandbMode) -> Any:
        tracking = self._config.tracking
        return wandb.init(
            id=self._run_id(),
            project=tracking.project,
            entity=tracking.wandb.entity,
            group=tracking.group,
            job_type="train",
            tags=[tag[:MAX_TAG_CHARACTERS] for tag in to_dict(tracking.tags)],
            name=tracking.wandb.name or self._config.run.name,
            notes=to_dict(tracking.notes),
            config=to_dict(self._config),
            resume="allow" if mode is WandbMode.online else None,
            settings=wandb.Settings(
                mode=mode.value,
                root_dir=str(self._folder.parent),
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
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )

    def _run_id(self) -> str:
        """Return the id of the W&B run, which the run directory keeps; draw one at the first launch."""
        chosen_id = self._config.tracking.wandb.id
        if chosen_id is not None or not self._id.exists():
            files.write(self._id, chosen_id or secrets.token_hex(8))
        return files.read_plain(self._id).decode().strip()

    def _remove_older(self) -> None:
        for folder in self._older:
            if folder != Path(self._run.settings.sync_dir):  # equal if a launch began within the same second
                shutil.rmtree(folder, ignore_errors=True)


def ignore_working_directory(wandb: Any) -> None:
    """Make W&B read its settings without `wandb/settings` of the working directory.

    The author of that file could choose the server that gets the user's key, and the proxy. `WANDB_BASE_URL` and the user's own
    settings file (`wandb login --host`) still count. W&B reads its settings once, and has no switch for this. Changing the working
    directory meanwhile is no way out: this runs in the tracker's thread, while the process trains.
    """
    nowhere = property(lambda settings: f"/nonexistent-{secrets.token_hex(8)}/settings")
    with mock.patch.object(wandb.Settings, "settings_workspace", nowhere):
        wandb.setup()


def _has_credentials(wandb: Any) -> bool:
    """Return whether W&B would find a key in the environment, the netrc file or its settings files. Never prompts."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    return bool(settings.api_key or wbauth.read_netrc_auth(host=settings.base_url))
