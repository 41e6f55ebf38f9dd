"""The verb `dstune serve`: trained models behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import EXIT_DONE, DstuneError, Problem, UserError
from dstune.serve import extra, options
from dstune.serve.options import fine_tunes, without_models
from dstune.serve.state import opened_database, state_folder

if TYPE_CHECKING:
    from dstune.finetuning.jobs.build import Parts
    from dstune.finetuning.settings import ApiSettings
    from dstune.guard.audit import Audit
    from dstune.guard.engine import Guarding
    from dstune.serve.engines.base import Engine
    from dstune.serve.fleet import Fleet
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.recording import Recorder
    from dstune.serve.gateway.settings import Settings
    from dstune.serve.source import Source
    from dstune.serve.store.database import Database
    from dstune.serve.store.keys import Keys

log = logging.getLogger("dstune.serve")


class ServeFailed(DstuneError):
    """The server could not start, for a reason that is not the user's mistake."""


def main(argv: list[str]) -> int:
    """`dstune serve MODEL [NAME=MODEL ...]`. Raises UserError, Refused; returns the exit code."""
    arguments = options.parsed(argv)
    options.check(arguments)
    extra.require()
    if fine_tunes(arguments) or arguments.jobs == "only":
        extra.require_api()
    from dstune.serve.server import allow_open_files, run

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would print what clients send
    state = state_folder(arguments.state, create=True)
    if arguments.jobs == "only":
        return _run_jobs(arguments, state)
    sources = _sources(arguments, state)
    runtime = Path(tempfile.mkdtemp(prefix="dstune-serve-"))
    try:
        allow_open_files()
        return run(_run(arguments, state, runtime, sources))
    except asyncio.CancelledError:  # SIGTERM while the engines were starting
        return EXIT_DONE
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _sources(arguments: argparse.Namespace, state: Path) -> list[Source]:
    """The models by name; runs without an export of their newest checkpoint, or without a reference, get one."""
    from dstune.serve import source
    from dstune.serve.prepare import prepare

    found = []
    for name, path in source.of_words(arguments.models):
        folder = prepare(Path(path), state) if source.needs_preparation(path) else None
        found.append(source.resolve(name, path, folder, trust_remote_code=arguments.trust_remote_code))
    return source.with_neutral_labels(found, arguments.neutral_label)


def _engine_of(arguments: argparse.Namespace, state: Path, runtime: Path) -> Callable[[Source, str], Engine]:
    from dstune.serve.engines.base import Limits

    limits = Limits(
        max_sequences=arguments.max_sequences,
        max_cached_tokens=arguments.max_cached_tokens,
        threads=arguments.threads,
        drain_seconds=arguments.drain_seconds,
    )
    place: dict[str, Any] = {"state_dir": state, "runtime_dir": runtime, "limits": limits}
    key = os.environ.get(arguments.engine_key_env or "", "")
    if arguments.engine == "vllm":
        from dstune.serve.engines.remote import check_address
        from dstune.serve.engines.vllm import VllmEngine

        if arguments.engine_url:
            check_address(arguments.engine_url, arguments.allow_engine)
        return partial(
            VllmEngine,
            **place,
            python=arguments.engine_python,
            address=arguments.engine_url,
            key=key,
            arguments=arguments.engine_arguments,
            number_format=arguments.dtype or "",
        )
    if arguments.engine == "llama.cpp":
        from dstune.serve.engines.llama_cpp import LlamaCppEngine

        return partial(LlamaCppEngine, **place, program=arguments.engine_python, arguments=arguments.engine_arguments)
    if arguments.engine == "remote":
        from dstune.serve.engines.remote import RemoteEngine, check_address

        check_address(arguments.engine_url, arguments.allow_engine)
        return partial(RemoteEngine, **place, address=arguments.engine_url, key=key)
    from dstune.serve.engines.local.engine import LocalEngine

    return partial(LocalEngine, **place, number_format=arguments.dtype or "")


async def _run(arguments: argparse.Namespace, state: Path, runtime: Path, sources: list[Source]) -> int:
    from dstune.serve.engines.base import EngineDown
    from dstune.serve.fleet import Fleet

    fleet = Fleet(
        _engine_of(arguments, state, runtime),
        one_template=arguments.engine == "vllm",
        require_proof=arguments.require_proof,
        base_name=arguments.base_name,
        drain_seconds=arguments.drain_seconds,
        may_be_empty=without_models(arguments),
    )
    starting = asyncio.current_task()
    assert starting is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, starting.cancel)
    opened = None if arguments.check else _Opened.of(arguments, state)
    guarding = _guarding(arguments, state, runtime)
    try:
        if guarding is not None:  # first, since it may refuse
            await guarding.start()
        await fleet.start(sources)
        if opened is None:
            for name, model in fleet.models.items():
                print(f"{name}: {model.proof}", flush=True)
            for line in guarding.lines() if guarding is not None else ():
                print(f"guard: {line}", flush=True)
            return EXIT_DONE
        await _serve(arguments, state, fleet, guarding, opened)
    except EngineDown as error:
        raise ServeFailed(str(error)) from error
    finally:
        await fleet.stop()
        if guarding is not None:
            await guarding.stop()
    return EXIT_DONE


def _guarding(arguments: argparse.Namespace, state: Path, runtime: Path) -> Guarding | None:
    """Raises UserError where the policies are wrong."""
    if not arguments.guard:
        return None
    from dstune.guard.engine import Guarding
    from dstune.guard.policy import read
    from dstune.serve.engines.base import Limits

    policies = read(arguments.guard, arguments.guard_model)
    if arguments.guard_only:
        policies.check_answers()
    return Guarding(policies, state, runtime, Limits(threads=arguments.threads, drain_seconds=5))


def guard_gateway(gateway: Gateway, guarding: Guarding, state: Path, log_days: float) -> Audit:
    """Put the guard in front of a gateway's engines, and its own routes among the gateway's."""
    from dstune.guard import lakera
    from dstune.guard.audit import Audit
    from dstune.guard.front import Guard

    audit = Audit(state / "guard", log_days)
    guard = Guard(guarding, audit, gateway.admission)
    gateway.guard_with(guard)
    gateway.add_routes(lakera.routes(guard))
    served = {path for model in gateway.fleet.models.values() for path in model.engine.routes}
    if unguarded := sorted(path for path in served if guarding.policies.of_route(path) is None):
        log.warning("the guard does not look at %s: no policy is named for them", ", ".join(unguarded))
    return audit


@dataclass
class _Opened:
    """What may be refused, opened before models are loaded, which takes minutes."""

    database: Database
    recorder: Recorder
    listening: socket.socket
    """Bound; nobody can connect yet."""

    @staticmethod
    def of(arguments: argparse.Namespace, state: Path) -> _Opened:
        """Raises UserError."""
        from dstune.serve.gateway.recording import Recorder

        listening = _bound(arguments.host, arguments.port)
        database = opened_database(state, arguments.store, create=True)
        return _Opened(database, Recorder(database, _request_log(arguments, state)), listening)


async def _serve(
    arguments: argparse.Namespace, state: Path, fleet: Fleet, guarding: Guarding | None, opened: _Opened
) -> None:
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.routes import COMMON, ROUTES
    from dstune.serve.server import Server, configured, drained

    database, recorder, listening = opened.database, opened.recorder, opened.listening
    routes, api = list(COMMON if without_models(arguments) else ROUTES), None
    if fine_tunes(arguments):
        from dstune.finetuning.routes import routes as routes_of
        from dstune.finetuning.service import FineTuning

        api = FineTuning(database, state, _api_settings(arguments), _parts(arguments, state))
        routes = [*routes_of(api), *routes]
    gateway = Gateway(fleet, database, _settings(arguments), recorder, routes)
    if api is not None:
        api.attach(gateway)
    audit = None
    if guarding is not None:
        audit = guard_gateway(gateway, guarding, state, arguments.log_days)
        for line in guarding.lines():
            log.info("guard: %s", line)
    port = listening.getsockname()[1]
    try:
        listening.listen(2048)
    except OSError as error:  # another one has been faster
        raise _cannot_listen(error, arguments.host, port) from None
    first_keys(gateway.keys, state)
    config = configured(gateway, timeout_keep_alive=75, timeout_graceful_shutdown=arguments.drain_seconds)
    recorder.start()
    if api is not None:
        api.start()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    served = [*fleet.models, *(["the fine-tuning API"] if api is not None else [])]
    served += ["the guard"] if guarding is not None else []
    place = "v2/guard" if arguments.guard_only else "v1"
    print(f"http://{host}:{port}/{place}  serves {', '.join(served)}", flush=True)
    page = "" if without_models(arguments) else f"; the chat page: http://{host}:{port}/"
    keys = [str(file) for file in (state / "key", state / "admin-key") if file.is_file()]
    print(f"keys: {', '.join(keys) or 'those of `dstune serve-keys add`'}{page}", flush=True)
    try:
        await drained(Server(config), gateway, arguments.drain_delay, [listening])
    finally:
        if api is not None:
            await api.stop()
        if audit is not None:
            audit.close()
        await recorder.stop()
        database.close()


def _parts(arguments: argparse.Namespace, state: Path) -> Parts:
    """Raises UserError where `--presets` names no file."""
    from dstune.finetuning.jobs.build import Parts
    from dstune.finetuning.jobs.presets import FILE

    if arguments.presets and not arguments.presets.is_file():
        raise UserError(Problem("--presets", "there is no such file", value=str(arguments.presets)))
    return Parts(arguments.presets or state / FILE, runs=arguments.jobs != "elsewhere")


def _run_jobs(arguments: argparse.Namespace, state: Path) -> int:
    """`--jobs only`: look after jobs until SIGTERM; they go on without this process."""
    from dstune.finetuning.service import FineTuning

    database = opened_database(state, arguments.store, create=True)
    api = FineTuning(database, state, _api_settings(arguments), _parts(arguments, state))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: api.jobs.end())
    print("looking after fine-tuning jobs", flush=True)
    api.jobs.run()
    database.close()
    return EXIT_DONE


def _api_settings(arguments: argparse.Namespace) -> ApiSettings:
    from dstune.finetuning.settings import ApiSettings

    return ApiSettings(
        file_bytes=arguments.max_file_bytes,
        project_bytes=arguments.max_project_bytes,
        store=arguments.files or "",
        webhook_hosts=frozenset(host.lower() for host in arguments.allow_webhook),
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    from dstune.serve.gateway.settings import Settings

    return Settings(
        hosts=Settings.hosts | {name.lower() for name in arguments.allow_host},
        origins=frozenset(origin.lower().rstrip("/") for origin in arguments.allow_origin),
        concurrent=arguments.max_concurrent,
        queue=arguments.max_queue,
        adapter_roots=tuple(arguments.adapter_root),
    )


def _request_log(arguments: argparse.Namespace, state: Path) -> Any:
    if not arguments.log_requests:
        return None
    from dstune.data.clean.sensitive import check_personal_data, find_personal_data, find_secrets, mask
    from dstune.serve.gateway.request_log import RequestLog

    check_personal_data()  # the extra `clean` is there

    def redact(text: str) -> str:
        masked = mask(text, find_secrets(text))
        return mask(masked, find_personal_data(masked))

    return RequestLog(state / "requests", redact, arguments.log_days)


def first_keys(keys: Keys, state: Path) -> None:
    """A key of a client and an admin's where there are none, kept in files of this user alone and printed to a terminal once."""
    names = {row.name for row in keys.all()}
    for name, file, admin in (("default", "key", False), ("admin", "admin-key", True)):
        if name in names or (admin and any(row.admin for row in keys.all())) or (not admin and names):
            continue
        key = keys.add(name, admin=admin)
        path = state / file
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"{key}\n")
        if sys.stdout.isatty():  # elsewhere it would stay in somebody's log
            print(f"{'admin key' if admin else 'key'}: {key}", flush=True)


def _bound(host: str, port: int) -> socket.socket:
    """Raises UserError where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise _cannot_listen(error, host, port) from None
    return listening


def _cannot_listen(error: OSError, host: str, port: int) -> UserError:
    return UserError(Problem("--port", f"cannot listen there: {error.strerror}", "--port N", f"{host}:{port}"))
