"""The verb `dstune generate`: writes text with a run, a checkpoint, an export, an adapter or any model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstune.config.schema import ModelConfig
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.data.images.places import COLUMN, for_hash
from dstune.inference.answers_file import AnswersFile, add_flags, answers_file
from dstune.inference.conversation import converse
from dstune.inference.prompts import Request, check_adapters, read_file
from dstune.inference.voices import BASE, OWN, open_speaker
from dstune.inference.writer import Answer, Sampling, Writer


def main(argv: list[str]) -> int:
    """Run `dstune generate RUN|CHECKPOINT|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    arguments = _parser().parse_args(argv)
    adapters = _check(arguments)
    has_prompts = bool(arguments.prompt) or arguments.input is not None
    is_interactive = not has_prompts and sys.stdin.isatty() and not arguments.json and arguments.output is None
    # Bad input is refused before a model is loaded.
    requests = [] if is_interactive else _read_requests(arguments)
    check_adapters(requests, [*adapters, OWN, BASE])
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    output = _open_answers_file(arguments, requests, sampling, adapters) if arguments.output else None
    model = ModelConfig(
        path=arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    with open_speaker(model, arguments.checkpoint, adapters) as speaker:
        writer = Writer(speaker, sampling, plain=arguments.plain, system=arguments.system)
        check_adapters(requests, writer.names)
        if is_interactive:
            converse(writer)
        elif output is not None:
            _write_all(writer, requests, output, arguments.batch_size)
        else:
            _print_all(writer, requests, arguments.batch_size, as_json=arguments.json)
    return EXIT_DONE


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="dstune generate",
        description="Text from a run, an export or a model; without prompts, a conversation in the terminal.",
    )
    parser.add_argument(
        "model", metavar="RUN|CHECKPOINT|EXPORT|MODEL", help="run directory, folder, hub id or sample://NAME"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--input",
        "--file",
        type=Path,
        metavar="FILE",
        help="prompts: a .jsonl file with `prompt` or `messages` in each row, or a text file with one prompt per line",
    )
    add_flags(parser, "answers", 8)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="name a LoRA run or export (may be given several times); `adapter` in a row, or /adapter NAME, chooses it",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message in front of each conversation")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (default 256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of total probability P",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling with a temperature")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer")
    parser.add_argument("--plain", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: prompt, answer, tokens, ended")
    return parser


def _check(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the path of each adapter by name. Raises UserError with everything that is wrong with the flags."""
    problems = []
    for flag, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("temperature", 0)):
        value = getattr(arguments, flag)
        if not value >= least:  # also refuses NaN
            problems.append(Problem(f"--{flag.replace('_', '-')}", f"must be at least {least}", value=str(value)))
    if not 0 < arguments.top_p <= 1:
        problems.append(Problem("--top-p", "must be more than 0 and at most 1", value=str(arguments.top_p)))
    if not arguments.temperature and (arguments.top_p != 1 or arguments.top_k):
        problems.append(
            Problem("--temperature", "--top-p and --top-k need a temperature above 0", "--temperature 0.7", "0")
        )
    adapters: dict[str, str] = {}
    for text in arguments.adapter:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or not name.replace("-", "_").isidentifier():
            problems.append(Problem("--adapter", "is not NAME=PATH", "--adapter mine=runs/mine", text))
        elif name in adapters or name in (BASE, OWN):
            problems.append(Problem("--adapter", "this name is taken", "give it another name", text))
        adapters[name] = path
    if problems:
        raise UserError(problems)
    return adapters


def _read_requests(arguments: argparse.Namespace) -> list[Request]:
    """Return the prompts of the flags and the file, else of standard input. Raises UserError with every empty one."""
    requests = [Request(text, f"--prompt {number}") for number, text in enumerate(arguments.prompt, 1)]
    if arguments.input is not None:
        requests += read_file(arguments.input)
    elif not requests:
        requests = [Request(sys.stdin.read().rstrip("\n"), "stdin")]
    empty = [request.where for request in requests if not request.text.strip() and not request.messages]
    if empty:
        raise UserError(Problem(where, "the prompt is empty", "give --prompt TEXT or --input FILE") for where in empty)
    return requests


def _open_answers_file(
    arguments: argparse.Namespace, requests: list[Request], sampling: Sampling, adapters: dict[str, str]
) -> AnswersFile:
    """Open `--output`. Its identity covers everything that the answers depend on, so that the same command continues it."""
    import xxhash

    from dstune.checkpoint import store

    newest = store.newest(Path(arguments.model))
    parts = [
        [
            request.text,
            request.messages,
            request.adapter,
            # Only those in use, so that the identity of a file without them stays what it was.
            *filter(None, (request.tools, request.arguments, _image_digests(request))),
        ]
        for request in requests
    ]
    text = json.dumps(parts)
    identity = {
        "model": [arguments.model, arguments.revision, arguments.checkpoint, newest.name if newest else None],
        "adapters": adapters,
        "prompts": xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass")),
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "speech": [arguments.plain, arguments.system],
    }
    return answers_file(arguments.output, identity, arguments.batch_size, force=arguments.force)


def _image_digests(request: Request) -> list[Any]:
    """Return what identifies the images of a request."""
    return list(for_hash({COLUMN: request.images})[COLUMN]) if request.images else []


def _answer_row(writer: Writer, request: Request, answer: Answer) -> dict[str, Any]:
    row = {"prompt": request.messages or request.text, "answer": answer.text, "tokens": answer.tokens}
    adapter = {"adapter": request.adapter or writer.active} if len(writer.names) > 1 else {}
    return {**row, "ended": answer.ended, **adapter}


def _write_all(writer: Writer, requests: list[Request], output: AnswersFile, batch_size: int) -> None:
    if output.done:
        print(f"dstune: {output.done} of {len(requests)} answers are there already", file=sys.stderr)
    for start in range(output.done, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        answers = writer.answer(batch, start // batch_size)
        output.append([_answer_row(writer, request, answer) for request, answer in zip(batch, answers, strict=True)])
        print(f"dstune: {start + len(batch)} of {len(requests)} answers", file=sys.stderr, flush=True)
    output.finish()
    print(output.written)


def _print_all(writer: Writer, requests: list[Request], batch_size: int, *, as_json: bool) -> None:
    if sys.stdout.isatty() and not as_json:
        for request in requests:
            if len(requests) > 1:
                print(f"> {request.text}", flush=True)
            writer.stream(request, lambda piece: print(piece, end="", flush=True))
            print()
        return
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for request, answer in zip(batch, writer.answer(batch, start // batch_size), strict=True):
            if as_json:
                print(json.dumps(_answer_row(writer, request, answer), ensure_ascii=False), flush=True)
                continue
            if len(requests) > 1:
                print(f"> {request.text}")
            print(answer.text, flush=True)
