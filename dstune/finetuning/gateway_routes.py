"""The fine-tuning API of `dstune serve`, and the jobs that it runs."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.protocols import Routes, routes

if TYPE_CHECKING:
    from dstune.finetuning.jobs.build import Parts
    from dstune.finetuning.service import FineTuning
    from dstune.finetuning.settings import ApiSettings
    from dstune.serve.gateway.app import Gateway, Route

MODULES = ("cryptography", "python_multipart", "rapidfuzz")
"""Modules of the extra `api`."""
BEGINNINGS = (
    *("files", "uploads", "fine_tuning", "batches"),
    *("webhook_endpoints", "webhook_event_types", "organization", "secrets"),
)


@routes
class FineTuningRoutes(Routes):
    name = "finetuning"
    title = "the fine-tuning API"
    flags_without_models = ("--no-inference", "--jobs only")
    closed: ClassVar[Mapping[str, str]] = {f"/v1/{name}": "--fine-tuning" for name in BEGINNINGS}

    def __init__(self) -> None:
        self._api: FineTuning | None = None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--no-inference", action="store_true", help="serve the fine-tuning API alone; no MODEL is named then"
        )
        parser.add_argument(
            "--fine-tuning",
            action="store_true",
            help="serve the fine-tuning API beside the models (files, jobs, batches)",
        )
        parser.add_argument(
            "--presets",
            type=Path,
            metavar="FILE",
            help="models that may be fine-tuned (default: models.yaml in --state)",
        )
        parser.add_argument(
            "--jobs",
            choices=("here", "elsewhere", "only"),
            default="here",
            help="run fine-tuning jobs beside the server (default), leave them to another process, or do nothing else",
        )
        parser.add_argument(
            "--allow-webhook",
            action="append",
            default=[],
            metavar="HOST[:PORT]",
            help="receiver of webhooks in the own network; http://HOST:PORT one without TLS",
        )
        parser.add_argument(
            "--files", metavar="URL", help="store of uploaded files, such as s3://BUCKET/FOLDER (default DIR)"
        )
        parser.add_argument(
            "--max-file-bytes", type=int, default=512_000_000, metavar="N", help="of an upload (512 MB)"
        )
        parser.add_argument(
            "--max-project-bytes",
            type=int,
            default=2_500_000_000_000,
            metavar="N",
            help="of a project's files and jobs (2.5 TB)",
        )

    def is_served(self, arguments: argparse.Namespace) -> bool:
        return bool(arguments.fine_tuning or arguments.no_inference)

    def replaces_models(self, arguments: argparse.Namespace) -> bool:
        return bool(arguments.no_inference or arguments.jobs == "only")

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        for flag in ("--max-file-bytes", "--max-project-bytes"):
            value = getattr(arguments, flag[2:].replace("-", "_"))
            if value < 1:
                yield Problem(flag, "must be at least 1", value=str(value))
        if not (self.is_served(arguments) or arguments.jobs == "only"):
            value_by_flag = {
                "--presets": arguments.presets,
                "--files": arguments.files,
                "--allow-webhook": " ".join(arguments.allow_webhook),
            }
            reason = "the fine-tuning API, which uses it, is not served"
            for flag, value in value_by_flag.items():
                if value:
                    yield Problem(flag, reason, "--fine-tuning", str(value))
        for word in arguments.models if self.is_served(arguments) else ():
            name, equals, path = word.partition("=")
            if equals and name.startswith("ft:"):
                reason = "names that begin with ft: are those of models that jobs make"
                fix = f"NAME={path} --alias {name}=NAME"
                yield Problem("MODEL", reason, fix, word)
        if arguments.jobs == "elsewhere" and not self.is_served(arguments):
            yield Problem("--jobs", "no jobs are created without the API", "--fine-tuning", arguments.jobs)

    def run_instead(self, arguments: argparse.Namespace, state: Path) -> int | None:
        """Run jobs without a gateway until SIGTERM (`--jobs only`); the jobs continue without this process."""
        if arguments.jobs != "only":
            return None
        _require_extra()
        from dstune.finetuning.service import FineTuning
        from dstune.serve.state import open_database

        database = open_database(state, arguments.store, create=True)
        api = FineTuning(database, state, settings(arguments), parts(arguments, state))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: api.jobs.end())
        print("looking after fine-tuning jobs", flush=True)
        api.jobs.run()
        database.close()
        return EXIT_DONE

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        _require_extra()
        self._state, self._settings, self._parts = state, settings(arguments), parts(arguments, state)

    def routes(self, gateway: Gateway) -> Sequence[Route]:
        from dstune.finetuning.routes import routes as routes_of
        from dstune.finetuning.service import FineTuning

        self._api = FineTuning(gateway.database, self._state, self._settings, self._parts)
        return routes_of(self._api)

    def attach(self, gateway: Gateway) -> None:
        assert self._api is not None
        self._api.attach(gateway)

    def on_listening(self) -> None:
        assert self._api is not None
        self._api.start()

    async def on_drained(self) -> None:
        if self._api is not None:
            await self._api.stop()


def parts(arguments: argparse.Namespace, state: Path) -> Parts:
    """Return the components of jobs. Raises UserError if `--presets` is not a file."""
    from dstune.finetuning.jobs.build import Parts
    from dstune.finetuning.jobs.presets import FILE

    if arguments.presets and not arguments.presets.is_file():
        raise UserError(Problem("--presets", "there is no such file", value=str(arguments.presets)))
    return Parts(arguments.presets or state / FILE, runs=arguments.jobs != "elsewhere")


def settings(arguments: argparse.Namespace) -> ApiSettings:
    """Return the limits of the API."""
    from dstune.finetuning.settings import ApiSettings

    return ApiSettings(
        file_bytes=arguments.max_file_bytes,
        project_bytes=arguments.max_project_bytes,
        store=arguments.files or "",
        webhook_hosts=frozenset(host.lower() for host in arguments.allow_webhook),
    )


def _require_extra() -> None:
    from dstune.serve.extra import require_modules

    require_modules("api", MODULES)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would print what clients send
