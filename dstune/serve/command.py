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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, DstuneError, Problem, UserError
from dstune.serve import extra
from dstune.serve.state import STATE, opened_database, state_folder

if TYPE_CHECKING:
    from dstune.serve.engines.base import Engine
    from dstune.serve.finetuning.jobs.build import Parts
    from dstune.serve.finetuning.settings import ApiSettings
    from dstune.serve.fleet import Fleet
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.recording import Recorder
    from dstune.serve.gateway.settings import Settings
    from dstune.serve.guard.audit import Audit
    from dstune.serve.guard.engine import Guarding
    from dstune.serve.source import Source
    from dstune.serve.store.database import Database
    from dstune.serve.store.keys import Keys

ENGINES = ("local", "vllm", "llama.cpp", "remote")
log = logging.getLogger("dstune.serve")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PREFIX = "serve."


class ServeFailed(DstuneError):
    """The server could not start, for a reason that is not the user's mistake."""


def main(argv: list[str]) -> int:
    """`dstune serve MODEL [NAME=MODEL ...]`. Raises UserError, Refused; returns the exit code."""
    own, engine_arguments = _split(argv)
    arguments = _parser().parse_args(own)
    arguments.engine_arguments = engine_arguments
    if arguments.guard_only:
        arguments.guard = arguments.guard or "default"
    _check(arguments)
    extra.require()
    if _fine_tunes(arguments) or arguments.jobs == "only":
        extra.require_api()
    from dstune.serve.server import run

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would print what clients send
    state = state_folder(arguments.state, create=True)
    if arguments.jobs == "only":
        return _run_jobs(arguments, state)
    sources = _sources(arguments, state)
    runtime = Path(tempfile.mkdtemp(prefix="dstune-serve-"))
    try:
        return run(_run(arguments, state, runtime, sources))
    except asyncio.CancelledError:  # SIGTERM while the engines were starting
        return EXIT_DONE
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The verb's own words, and those behind `--`, which are the engine's. `serve.engine.python=X` is `--engine-python X`."""
    at = argv.index("--") if "--" in argv else len(argv)
    words: list[str] = []
    for word in argv[:at]:
        key, equals, value = word.partition("=")
        if equals and key.startswith(PREFIX):
            words += [f"--{key.removeprefix(PREFIX).replace('.', '-').replace('_', '-')}", value]
        else:
            words.append(word)
    return words, argv[at + 1 :]


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="dstune serve",
        description="Trained models behind an OpenAI-compatible API. Words behind `--` are arguments of the engine.",
    )
    for add in (_add_models, _add_address, _add_engine, _add_store, _add_guard, _add_limits):
        add(parser)
    return parser


def _add_models(parser: VerbParser) -> None:
    """What is served."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL|NAME=MODEL",
        help="runs, exports, folders or hub ids; adapters share their base",
    )
    parser.add_argument(
        "--no-inference", action="store_true", help="serve the fine-tuning API alone; no MODEL is named then"
    )
    parser.add_argument(
        "--fine-tuning", action="store_true", help="serve the fine-tuning API beside the models (files, jobs, batches)"
    )
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="models that may be fine-tuned (default: models.yaml in --state)"
    )
    parser.add_argument(
        "--jobs",
        choices=("here", "elsewhere", "only"),
        default="here",
        help="run fine-tuning jobs beside the server (default), leave them to another process, or do nothing else",
    )


def _add_address(parser: VerbParser) -> None:
    """Where it listens."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="to listen on (default 8000; 0 takes a free one)"
    )


def _add_engine(parser: VerbParser) -> None:
    """What computes."""
    parser.add_argument("--engine", choices=ENGINES, default="local", help="what computes (default local)")
    parser.add_argument("--engine-python", metavar="FILE", help="the Python that has vLLM, or the program llama-server")
    parser.add_argument("--engine-url", metavar="URL", help="of a server that runs already (engines vllm and remote)")
    parser.add_argument("--engine-key-env", metavar="NAME", help="environment variable with the key of that server")
    parser.add_argument(
        "--allow-engine",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="server that --engine-url may name; http://HOST:PORT one without TLS",
    )
    parser.add_argument("--base-name", default="", metavar="NAME", help="under which the base of adapters is served")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="number format to compute in")
    parser.add_argument("--check", action="store_true", help="hold the models against their training, and end")
    parser.add_argument("--require-proof", action="store_true", help="refuse models that cannot be held against it")


def _add_store(parser: VerbParser) -> None:
    """What is kept, and who may reach the server or be reached by it."""
    parser.add_argument("--state", type=Path, default=Path(STATE), metavar="DIR", help=f"keys, logs (default {STATE})")
    parser.add_argument("--store", metavar="URL", help="database, such as postgresql://USER@HOST/NAME (default SQLite)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="host name to answer under")
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="site whose pages may call it"
    )
    parser.add_argument(
        "--adapter-root", action="append", default=[], metavar="DIR", help="adapters below it may be added by an admin"
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
    parser.add_argument("--max-file-bytes", type=int, default=512_000_000, metavar="N", help="of an upload (512 MB)")
    parser.add_argument(
        "--max-project-bytes", type=int, default=2_500_000_000_000, metavar="N", help="of a project's files (2.5 TB)"
    )


def _add_guard(parser: VerbParser) -> None:
    """What looks at requests, and what is written down of them."""
    parser.add_argument("--guard", metavar="FILE", help="policies to check requests and answers by; `default` has one")
    parser.add_argument("--guard-model", metavar="DIR", help="calibrated export that finds prompt attacks")
    parser.add_argument("--guard-only", action="store_true", help="serve /v2/guard alone; no MODEL is named then")
    parser.add_argument("--log-requests", action="store_true", help="keep requests and answers, personal data masked")
    parser.add_argument("--log-days", type=float, default=30.0, metavar="N", help="and for so long (default 30)")


def _add_limits(parser: VerbParser) -> None:
    """How much at once, and for how long."""
    parser.add_argument("--max-concurrent", type=int, default=64, metavar="N", help="requests at once (default 64)")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that wait (default 256)")
    parser.add_argument("--max-sequences", type=int, default=16, metavar="N", help="answers at once, engine local (16)")
    parser.add_argument(
        "--max-cached-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="of all answers together, engine local (65536)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine local (default: cores - 1)")
    parser.add_argument(
        "--drain-delay", type=float, default=0.0, metavar="S", help="from SIGTERM to the last new request"
    )
    parser.add_argument("--drain-seconds", type=int, default=30, metavar="S", help="for running requests (default 30)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _fine_tunes(arguments: argparse.Namespace) -> bool:
    """Whether the fine-tuning API is served."""
    return bool(arguments.fine_tuning or arguments.no_inference)


def _without_models(arguments: argparse.Namespace) -> bool:
    return bool(arguments.no_inference or arguments.guard_only)


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError with all that is wrong."""
    problems = []
    least = {
        "max_concurrent": 1,
        "max_queue": 0,
        "max_sequences": 1,
        "max_cached_tokens": 64,
        "threads": 0,
        "max_file_bytes": 1,
        "max_project_bytes": 1,
    }
    for name, bound in (*least.items(), ("port", 0), ("drain_delay", 0), ("drain_seconds", 0), ("log_days", 0)):
        if not getattr(arguments, name) >= bound:  # NaN is not
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem(flag, f"must be at least {bound}", value=str(getattr(arguments, name))))
    if arguments.port > 65535:
        problems.append(Problem("--port", "must be at most 65535", value=str(arguments.port)))
    if arguments.guard_model and not arguments.guard:
        problems.append(Problem("--guard-model", "needs policies", "--guard default", arguments.guard_model))
    if _without_models(arguments) or arguments.jobs == "only":
        if arguments.models:
            reason = "no model is served with --no-inference, --guard-only or --jobs only"
            problems.append(Problem("MODEL", reason, "leave one of them out", " ".join(arguments.models)))
        if arguments.check:
            problems.append(Problem("--check", "there is no model to hold against its training", "leave it out"))
    elif not arguments.models:
        problems.append(Problem("MODEL", "this is missing", "dstune serve RUN, --no-inference or --guard-only"))
    if not (_fine_tunes(arguments) or arguments.jobs == "only"):
        own = {
            "presets": arguments.presets,
            "files": arguments.files,
            "allow-webhook": " ".join(arguments.allow_webhook),
        }
        reason = "the fine-tuning API, which uses it, is not served"
        problems += [Problem(f"--{name}", reason, "--fine-tuning", str(value)) for name, value in own.items() if value]
    if arguments.jobs == "elsewhere" and not _fine_tunes(arguments):
        problems.append(Problem("--jobs", "no jobs are created without the API", "--fine-tuning", arguments.jobs))
    if arguments.engine == "vllm" and not (arguments.engine_python or arguments.engine_url):
        reason = "vLLM cannot be installed beside dstune; name the Python of its own environment, or a running server"
        problems.append(Problem("--engine-python", reason, "--engine-python /opt/vllm/bin/python, or --engine-url URL"))
    if arguments.engine == "remote" and not arguments.engine_url:
        problems.append(Problem("--engine-url", "this is missing", "--engine-url https://HOST/v1"))
    problems += [
        Problem(flag, reason, value=value if isinstance(value, str) else " ".join(value))
        for flag, value, acts, reason in _of_engine(arguments)
        if value and not acts
    ]
    if arguments.host not in LOOPBACK and not arguments.allow_host:
        reason = "under which host names clients call the server has to be said where others can reach it"
        problems.append(Problem("--allow-host", reason, f"--allow-host {socket.gethostname()}"))
    if problems:
        raise UserError(problems)


def _of_engine(arguments: argparse.Namespace) -> Iterator[tuple[str, str | list[str], bool, str]]:
    """Options that one engine or another would pass over: the flag, its value, whether it acts, and why it would not."""
    engine, address, key = arguments.engine, arguments.engine_url or "", arguments.engine_key_env or ""
    started = engine in ("vllm", "llama.cpp") and not address
    yield "--engine-url", address, engine in ("vllm", "remote"), "the engines vllm and remote have an address"
    reason = "vllm and llama.cpp are started by it, where --engine-url names no server that runs"
    yield "--engine-python", arguments.engine_python or "", started, reason
    yield "--", arguments.engine_arguments, started, "this engine takes no arguments"
    yield "--engine-key-env", key, bool(address), "it is of the server that --engine-url names"
    yield "--engine-key-env", key, key in os.environ, "there is no such variable"
    yield "--allow-engine", arguments.allow_engine, bool(address), "it allows what --engine-url names"
    for flag, default in (("--max-sequences", 16), ("--max-cached-tokens", 65536), ("--threads", 0)):
        value = getattr(arguments, flag[2:].replace("-", "_"))
        acts = engine == "local" or (flag == "--threads" and bool(arguments.guard))
        yield flag, "" if value == default else str(value), acts, "it is of the engine local"
    yield "--dtype", arguments.dtype or "", engine in ("local", "vllm"), f"the engine {engine} chooses it by itself"


def _sources(arguments: argparse.Namespace, state: Path) -> list[Source]:
    """The models by name; runs without an export of their newest checkpoint, or without a reference, get one."""
    from dstune.serve import source
    from dstune.serve.prepare import prepare

    found = []
    for name, path in source.of_words(arguments.models):
        folder = prepare(Path(path), state) if source.needs_preparation(path) else None
        found.append(source.resolve(name, path, folder, trust_remote_code=arguments.trust_remote_code))
    return found


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
        may_be_empty=_without_models(arguments),
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
    from dstune.serve.engines.base import Limits
    from dstune.serve.guard.engine import Guarding
    from dstune.serve.guard.policy import read

    limits = Limits(threads=arguments.threads, drain_seconds=5)
    return Guarding(read(arguments.guard, arguments.guard_model), state, runtime, limits)


def guard_gateway(gateway: Gateway, guarding: Guarding, state: Path, log_days: float) -> Audit:
    """Put the guard in front of a gateway's engines, and its own routes among the gateway's."""
    from dstune.serve.guard import lakera
    from dstune.serve.guard.audit import Audit
    from dstune.serve.guard.front import Guard

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
    routes, api = list(COMMON if _without_models(arguments) else ROUTES), None
    if _fine_tunes(arguments):
        from dstune.serve.finetuning.routes import routes as routes_of
        from dstune.serve.finetuning.service import FineTuning

        api = FineTuning(database, state, _api_settings(arguments), _parts(arguments, state))
        routes = [*routes_of(api), *routes]
    gateway = Gateway(fleet, database, _settings(arguments), recorder, routes)
    if api is not None:
        api.attach(gateway)
    audit = guard_gateway(gateway, guarding, state, arguments.log_days) if guarding is not None else None
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
    print(f"http://{host}:{port}/v1  serves {', '.join(served)}", flush=True)
    page = "" if _without_models(arguments) else f"; the chat page: http://{host}:{port}/"
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
    from dstune.serve.finetuning.jobs.build import Parts
    from dstune.serve.finetuning.jobs.presets import FILE

    if arguments.presets and not arguments.presets.is_file():
        raise UserError(Problem("--presets", "there is no such file", value=str(arguments.presets)))
    return Parts(arguments.presets or state / FILE, runs=arguments.jobs != "elsewhere")


def _run_jobs(arguments: argparse.Namespace, state: Path) -> int:
    """`--jobs only`: look after jobs until SIGTERM; they go on without this process."""
    from dstune.serve.finetuning.service import FineTuning

    database = opened_database(state, arguments.store, create=True)
    api = FineTuning(database, state, _api_settings(arguments), _parts(arguments, state))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: api.jobs.end())
    print("looking after fine-tuning jobs", flush=True)
    api.jobs.run()
    database.close()
    return EXIT_DONE


def _api_settings(arguments: argparse.Namespace) -> ApiSettings:
    from dstune.serve.finetuning.settings import ApiSettings

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
    """A key of a client and an admin's where there are none, printed once and kept in files of this user alone."""
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
