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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import EXIT_DONE, DstuneError, Problem, UserError
from dstune.protocols import EngineKind, Routes
from dstune.serve import extra, options
from dstune.serve.options import without_models
from dstune.serve.state import open_database, state_folder

if TYPE_CHECKING:
    from dstune.serve.engines.base import Engine
    from dstune.serve.fleet import Fleet
    from dstune.serve.gateway.recording import Recorder
    from dstune.serve.gateway.settings import Settings
    from dstune.serve.source import Source
    from dstune.serve.store.database import Database
    from dstune.serve.store.keys import Keys

log = logging.getLogger("dstune.serve")


class ServeFailed(DstuneError):
    """The server could not start, for a reason that is not a user's mistake."""


def main(argv: list[str]) -> int:
    """Run `dstune serve MODEL [NAME=MODEL ...]` and return the exit code. Raises UserError, Refused."""
    arguments = options.parsed(argv)
    options.check(arguments)
    extra.require()
    from dstune.serve.server import allow_open_files, run

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    state = state_folder(arguments.state, create=True)
    for service in arguments.services:
        if (code := service.run_instead(arguments, state)) is not None:
            return code
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
    """Return the models to serve. A run whose newest checkpoint has no export, or no reference, gets one first."""
    from dstune.serve import source
    from dstune.serve.prepare import prepare, prove_base

    aliases = source.parse_aliases(arguments.alias)
    sources = []
    for name, path in source.parse_models(arguments.models):
        folder = prepare(Path(path), state) if source.needs_preparation(path) else None
        made = source.resolve(name, path, folder, trust_remote_code=arguments.trust_remote_code)
        sources.append(prove_base(made, state) if arguments.prove else made)
    open_ended = bool(options.served(arguments)) or bool(arguments.adapter_root)
    source.check_aliases(aliases, [made.name for made in sources], open_ended=open_ended)
    return source.with_neutral_labels(sources, arguments.neutral_label)


def _engine_of(arguments: argparse.Namespace, state: Path, runtime: Path) -> Callable[[Source, str], Engine]:
    from dstune.serve.engines.base import Limits

    limits = Limits(
        max_sequences=arguments.max_sequences,
        max_cached_tokens=arguments.max_cached_tokens,
        threads=arguments.threads,
        drain_seconds=arguments.drain_seconds,
    )
    key = os.environ.get(arguments.engine_key_env or "", "")
    kind: EngineKind = arguments.engine_kind
    return kind.engine_factory(arguments, key, state_dir=state, runtime_dir=runtime, limits=limits)


async def _run(arguments: argparse.Namespace, state: Path, runtime: Path, sources: list[Source]) -> int:
    from dstune.serve.engines.base import EngineDown
    from dstune.serve.fleet import Fleet

    fleet = Fleet(
        _engine_of(arguments, state, runtime),
        one_template=arguments.engine_kind.one_template,
        require_proof=arguments.require_proof,
        base_name=arguments.base_name,
        drain_seconds=arguments.drain_seconds,
        may_be_empty=without_models(arguments),
    )
    starting = asyncio.current_task()
    assert starting is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, starting.cancel)
    opened = None if arguments.check else _Opened.open(arguments, state)
    services = [service for service in options.served(arguments) if opened is not None or service.checks_itself]
    try:
        for service in services:  # first, since they may refuse
            service.open(arguments, state, runtime)
        for service in services:
            await service.before_models()
        if opened is None:
            await fleet.start(sources)
            for name, model in fleet.models.items():
                print(f"{name}: {model.proof}", flush=True)
            for line in (line for service in services for line in service.notes()):
                print(line, flush=True)
            return EXIT_DONE
        await _serve(arguments, state, fleet, sources, services, opened)
    except EngineDown as error:
        raise ServeFailed(str(error)) from error
    finally:
        await fleet.stop()
        for service in services:
            await service.close()
    return EXIT_DONE


@dataclass
class _Opened:
    """Resources that may be refused; they are opened before models are loaded, which takes minutes."""

    database: Database
    recorder: Recorder
    listening: socket.socket
    """Bound, but not listening yet."""

    @staticmethod
    def open(arguments: argparse.Namespace, state: Path) -> _Opened:
        """Open the database, the request log and the socket. Raises UserError."""
        from dstune.serve.gateway.recording import Recorder

        listening = _bind(arguments.host, arguments.port)
        database = open_database(state, arguments.store, create=True)
        recorder = Recorder(database, _request_log(arguments, state), logs=arguments.log_requests)
        return _Opened(database, recorder, listening)


async def _serve(
    arguments: argparse.Namespace,
    state: Path,
    fleet: Fleet,
    sources: list[Source],
    services: list[Routes],
    opened: _Opened,
) -> None:
    """Open the gateway, then load and prove the models, which takes minutes. Raises the first error that prevents serving."""
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.routes import COMMON, ROUTES
    from dstune.serve.server import Server, make_config, serve_until_signalled

    database, recorder, listening = opened.database, opened.recorder, opened.listening
    closed = {path: option for service in arguments.services for path, option in service.closed.items()}
    gateway = Gateway(fleet, database, _settings(arguments), recorder, closed=closed)
    for service in services:
        gateway.add_routes(service.routes(gateway))
    gateway.add_routes(COMMON if without_models(arguments) else ROUTES)
    for service in services:
        service.attach(gateway)
        for line in service.notes():
            log.info("%s", line)
    port = listening.getsockname()[1]
    try:
        listening.listen(2048)
    except OSError as error:  # another process took the address first
        raise _cannot_listen(error, arguments.host, port) from None
    first_keys(gateway.keys, state)
    config = make_config(gateway, timeout_keep_alive=75, timeout_graceful_shutdown=arguments.drain_seconds)
    recorder.start()
    for service in services:
        service.on_listening()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address, server = f"http://{host}:{port}", Server(config)
    starting = asyncio.create_task(fleet.start(sources))

    def end_or_announce(task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            server.should_exit = True
        else:
            _announce(arguments, state, address, fleet, services)

    if sources:
        log.info("%s answers; its models are loaded and proven now", address)
    starting.add_done_callback(end_or_announce)
    try:
        await serve_until_signalled(server, gateway, arguments.drain_delay, [listening])
    finally:
        failure = starting.exception() if starting.done() and not starting.cancelled() else None
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        for service in services:
            await service.on_drained()
        await recorder.stop()
        database.close()
    if failure is not None:
        raise failure


def _announce(arguments: argparse.Namespace, state: Path, address: str, fleet: Fleet, services: list[Routes]) -> None:
    """Print the served models and the address, for people and for programs that wait for this line."""
    names = [*fleet.models, *(service.title for service in services if service.title)]
    place = next((service.prefix for service in services if service.replaces_models(arguments)), "v1")
    print(f"{address}/{place}  serves {', '.join(names)}", flush=True)
    page = "" if without_models(arguments) else f"; the chat page: {address}/"
    keys = [str(file) for file in (state / "key", state / "admin-key") if file.is_file()]
    print(f"keys: {', '.join(keys) or 'those of `dstune serve-keys add`'}{page}", flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    from dstune.serve import source
    from dstune.serve.gateway.settings import Settings

    return Settings(
        hosts=Settings.hosts | {name.lower() for name in arguments.allow_host},
        origins=frozenset(origin.lower().rstrip("/") for origin in arguments.allow_origin),
        concurrent=arguments.max_concurrent,
        queue=arguments.max_queue,
        max_body_bytes=arguments.max_body_bytes,
        adapter_roots=tuple(arguments.adapter_root),
        aliases=dict(source.parse_aliases(arguments.alias)),
    )


def _request_log(arguments: argparse.Namespace, state: Path) -> Any:
    """Return the log of requests. A start without `--log-requests` opens the one of an earlier start too: its rows are
    deleted after `--log-days` and with their user all the same. None if there is none."""
    folder = state / "requests"
    if not arguments.log_requests and not folder.is_dir():
        return None
    from dstune.data.clean.sensitive import check_personal_data, find_personal_data, find_secrets, mask
    from dstune.serve.gateway.request_log import RequestLog

    if arguments.log_requests:
        check_personal_data()  # raises if the extra `clean` is missing

    def redact(text: str) -> str:
        masked = mask(text, find_secrets(text))
        return mask(masked, find_personal_data(masked))

    return RequestLog(folder, redact, arguments.log_days)


def first_keys(keys: Keys, state: Path) -> None:
    """Create one client key and one admin key if the database has none. They are written to files that only this user can read, and
    printed once to a terminal."""
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
        if sys.stdout.isatty():  # elsewhere it would end up in somebody's log
            print(f"{'admin key' if admin else 'key'}: {key}", flush=True)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Raises UserError if the address is taken."""
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
