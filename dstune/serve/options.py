"""The command line of `dstune serve`: its options, what they require, and the check of their combinations."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dstune.core.arguments import VerbParser
from dstune.core.errors import Problem, UserError
from dstune.core.network import LOOPBACK
from dstune.protocols import ENGINES, ROUTES, EngineKind, Routes
from dstune.serve.state import STATE

PREFIX = "serve."
MOST_BODY_BYTES = 48 << 20
"""Engines read 64 MiB, and a key may hold as much in memory at once."""


def parsed(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Returns the options, with the words after `--` as `engine_arguments`, the chosen engine as
    `engine_kind` and all registered routes as `services`. `check` validates their combination."""
    words, engine_arguments = _split(argv)
    services = [service() for service in ROUTES.classes().values()]
    arguments = _parser(services).parse_args(words)
    arguments.engine_arguments, arguments.services = engine_arguments, services
    arguments.engine_kind = ENGINES[arguments.engine]()
    return arguments


def served(arguments: argparse.Namespace) -> list[Routes]:
    """Return the additional routes that this server opens."""
    return [service for service in arguments.services if service.is_served(arguments)]


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the verb's own words and the engine's words after `--`. `serve.engine.python=X` is
    `--engine-python X`."""
    at = argv.index("--") if "--" in argv else len(argv)
    words: list[str] = []
    for word in argv[:at]:
        key, equals, value = word.partition("=")
        if equals and key.startswith(PREFIX):
            words += [f"--{key.removeprefix(PREFIX).replace('.', '-').replace('_', '-')}", value]
        else:
            words.append(word)
    return words, argv[at + 1 :]


def _parser(services: list[Routes]) -> VerbParser:
    parser = VerbParser(
        prog="dstune serve",
        description="Trained models behind an OpenAI-compatible API. Words behind `--` are arguments of the engine.",
    )
    for add in (_add_models, _add_address, _add_engine, _add_store, _add_log, _add_limits):
        add(parser)
    for service in services:
        try:
            service.add_options(parser)
        except argparse.ArgumentError as error:  # between two plugins, or a plugin and dstune
            reason = f"an option of the routes {service.name!r} is there already"
            raise UserError(Problem(type(service).__module__, reason, "rename it", str(error.argument_name))) from None
    return parser


def _add_models(parser: VerbParser) -> None:
    """Add the options for the models to serve."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL|NAME=MODEL",
        help="runs, exports, folders or hub ids; adapters share their base",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another name of a served or fine-tuned model; may be repeated",
    )


def _add_address(parser: VerbParser) -> None:
    """Add the options for the address to listen on."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="to listen on (default 8000; 0 takes a free one)"
    )


def _add_engine(parser: VerbParser) -> None:
    """Add the options for the engine."""
    parser.add_argument("--engine", choices=list(ENGINES), default="local", help="what computes (default local)")
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
    parser.add_argument(
        "--neutral-label",
        action="append",
        default=[],
        metavar="NAME=LABEL",
        help="label of a classifier that /v1/moderations does not flag; may be repeated",
    )
    parser.add_argument(
        "--check", action="store_true", help="check models against their training, and what else is served; end"
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="hold language models that no run has trained against transformers, in fp32",
    )
    parser.add_argument("--require-proof", action="store_true", help="refuse models that cannot be held against it")


def _add_store(parser: VerbParser) -> None:
    """Add the options for stored state, and for network access to and from the server."""
    parser.add_argument("--state", type=Path, metavar="DIR", help=f"keys, logs (default {STATE})")
    parser.add_argument("--store", metavar="URL", help="database, such as postgresql://USER@HOST/NAME (default SQLite)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="host name to answer under")
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="site whose pages may call it"
    )
    parser.add_argument(
        "--adapter-root", action="append", default=[], metavar="DIR", help="adapters below it may be added by an admin"
    )


def _add_log(parser: VerbParser) -> None:
    """Add the options for logging requests."""
    parser.add_argument("--log-requests", action="store_true", help="keep requests and answers, personal data masked")
    parser.add_argument("--log-days", type=float, default=30.0, metavar="N", help="and for so long (default 30)")


def _add_limits(parser: VerbParser) -> None:
    """Add the options for concurrency limits and timeouts."""
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
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=8 << 20,
        metavar="N",
        help="of a request's JSON (8388608; base64 makes an image a third larger)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine local (default: cores - 1)")
    parser.add_argument(
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="S",
        help="from SIGTERM to the last new request, for load balancers to see /readyz (default 0)",
    )
    parser.add_argument("--drain-seconds", type=int, default=30, metavar="S", help="for running requests (default 30)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def without_models(arguments: argparse.Namespace) -> bool:
    return any(service.replaces_models(arguments) for service in arguments.services)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError with every problem of the options."""
    problems = []
    least = {
        "max_concurrent": 1,
        "max_queue": 0,
        "max_sequences": 1,
        "max_cached_tokens": 64,
        "max_body_bytes": 1024,
        "threads": 0,
    }
    for name, bound in (*least.items(), ("port", 0), ("drain_delay", 0), ("drain_seconds", 0), ("log_days", 0)):
        if not getattr(arguments, name) >= bound:  # false for NaN too
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem(flag, f"must be at least {bound}", value=str(getattr(arguments, name))))
    for name, most in (("port", 65535), ("max_body_bytes", MOST_BODY_BYTES)):
        if (value := getattr(arguments, name)) > most:
            problems.append(Problem(f"--{name.replace('_', '-')}", f"must be at most {most}", value=str(value)))
    flags_without_models = [flag for service in arguments.services for flag in service.flags_without_models]
    if without_models(arguments):
        if arguments.models:
            reason = f"no model is served with {' or '.join(flags_without_models)}"
            problems.append(Problem("MODEL", reason, "leave one of them out", " ".join(arguments.models)))
        if arguments.check and not any(service.checks_itself for service in served(arguments)):
            problems.append(Problem("--check", "there is no model to hold against its training", "leave it out"))
    elif not arguments.models:
        problems.append(Problem("MODEL", "this is missing", " or ".join(["dstune serve RUN", *flags_without_models])))
    for service in arguments.services:
        problems += service.check(arguments)
    problems += arguments.engine_kind.check(arguments)
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
    """Yield the options that some engines would ignore: the flag, its value, whether the chosen engine uses it, and why not."""
    kind: EngineKind = arguments.engine_kind
    address, key = arguments.engine_url or "", arguments.engine_key_env or ""
    started = "--engine-python" in kind.options and not address
    reason = f"the engines {_engines_with('--engine-url')} have an address"
    yield "--engine-url", address, "--engine-url" in kind.options, reason
    reason = f"{_engines_with('--engine-python')} are started by it, where --engine-url names no server that runs"
    yield "--engine-python", arguments.engine_python or "", started, reason
    acts = "--" in kind.options and (started or "--engine-python" not in kind.options)
    yield "--", arguments.engine_arguments, acts, "this engine takes no arguments"
    yield "--engine-key-env", key, bool(address), "it is of the server that --engine-url names"
    yield "--engine-key-env", key, key in os.environ, "there is no such variable"
    yield "--allow-engine", arguments.allow_engine, bool(address), "it allows what --engine-url names"
    used = kind.options.union(*(service.options_used(arguments) for service in arguments.services))
    for flag, default in (("--max-sequences", 16), ("--max-cached-tokens", 65536), ("--threads", 0)):
        value = getattr(arguments, flag[2:].replace("-", "_"))
        yield flag, "" if value == default else str(value), flag in used, f"it is of the engine {_engines_with(flag)}"
    flag = "--neutral-label"
    yield flag, arguments.neutral_label, flag in used, f"the engine {_engines_with(flag)} moderates"
    yield "--dtype", arguments.dtype or "", "--dtype" in used, f"the engine {kind.name} chooses it by itself"


def _engines_with(flag: str) -> str:
    return " and ".join(name for name, kind in ENGINES.classes().items() if flag in kind.options)
