"""The words of `dstune serve`: its options, what they ask for, and what is wrong with them together."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dstune.core.arguments import VerbParser
from dstune.core.errors import Problem, UserError
from dstune.core.network import LOOPBACK
from dstune.serve.state import STATE

ENGINES = ("local", "vllm", "llama.cpp", "remote")
PREFIX = "serve."


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options, with the words behind `--` as `engine_arguments`. `check` says what is wrong with them together."""
    own, engine_arguments = _split(argv)
    arguments = _parser().parse_args(own)
    arguments.engine_arguments = engine_arguments
    if arguments.guard_only:
        arguments.guard = arguments.guard or "default"
    return arguments


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
    parser.add_argument(
        "--neutral-label",
        action="append",
        default=[],
        metavar="NAME=LABEL",
        help="label of a classifier that /v1/moderations does not flag; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="check models against their training, and the guard; end")
    parser.add_argument("--require-proof", action="store_true", help="refuse models that cannot be held against it")


def _add_store(parser: VerbParser) -> None:
    """What is kept, and who may reach the server or be reached by it."""
    parser.add_argument("--state", type=Path, metavar="DIR", help=f"keys, logs (default {STATE})")
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
        "--max-project-bytes",
        type=int,
        default=2_500_000_000_000,
        metavar="N",
        help="of a project's files and jobs (2.5 TB)",
    )


def _add_guard(parser: VerbParser) -> None:
    """What looks at requests, and what is written down of them."""
    parser.add_argument(
        "--guard", metavar="FILE", help="policies to check by: a file, `rules` (needs no model) or `default`"
    )
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
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="S",
        help="from SIGTERM to the last new request, for load balancers to see /readyz (default 0)",
    )
    parser.add_argument("--drain-seconds", type=int, default=30, metavar="S", help="for running requests (default 30)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def fine_tunes(arguments: argparse.Namespace) -> bool:
    """Whether the fine-tuning API is served."""
    return bool(arguments.fine_tuning or arguments.no_inference)


def without_models(arguments: argparse.Namespace) -> bool:
    return bool(arguments.no_inference or arguments.guard_only)


def check(arguments: argparse.Namespace) -> None:
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
    if without_models(arguments) or arguments.jobs == "only":
        if arguments.models:
            reason = "no model is served with --no-inference, --guard-only or --jobs only"
            problems.append(Problem("MODEL", reason, "leave one of them out", " ".join(arguments.models)))
        if arguments.check and not arguments.guard_only:
            problems.append(Problem("--check", "there is no model to hold against its training", "leave it out"))
    elif not arguments.models:
        problems.append(Problem("MODEL", "this is missing", "dstune serve RUN, --no-inference or --guard-only"))
    if not (fine_tunes(arguments) or arguments.jobs == "only"):
        own = {
            "presets": arguments.presets,
            "files": arguments.files,
            "allow-webhook": " ".join(arguments.allow_webhook),
        }
        reason = "the fine-tuning API, which uses it, is not served"
        problems += [Problem(f"--{name}", reason, "--fine-tuning", str(value)) for name, value in own.items() if value]
    if arguments.jobs == "elsewhere" and not fine_tunes(arguments):
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
    yield "--neutral-label", arguments.neutral_label, engine == "local", "the engine local moderates"
    yield "--dtype", arguments.dtype or "", engine in ("local", "vllm"), f"the engine {engine} chooses it by itself"
