"""The flags of `dstune record`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from dstune.core import files
from dstune.core.api_client import Address, check_address
from dstune.core.arguments import VerbParser
from dstune.core.errors import Problem, UserError

DESCRIPTION = """\
Keep what a server with OpenAI's API knows: fine-tuning jobs with their hyperparameters, training and validation files, models, and
the answers of models to your prompts. FOLDER/manifest.json lists everything, and what the server does not give. A recording that
was killed goes on with the same command, and asks for nothing twice. Only you can read the folder.
Exit codes: 0 done, 1 the server gave no answer, 2 the server refuses the key or a flag is wrong, 75 interrupted or out of budget.
"""
AZURE_VERSION = re.compile(r"v1|\d{4}-\d{2}-\d{2}(-preview)?")
KINDS = ("secrets", "personal_data")


def make_parser() -> VerbParser:
    parser = VerbParser("dstune record", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the recording is, or will be")
    parser.add_argument("--server", metavar="URL", help="up to /v1; of Azure: https://NAME.openai.azure.com")
    parser.add_argument("--azure", metavar="VERSION", help="Azure's paths and header; its api-version, or v1")
    parser.add_argument("--dry-run", action="store_true", help="say what there is and what it takes; write nothing")
    add_connection(parser)
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--prompts", action="append", default=[], metavar="FILE", help="rows, logs or a list of prompts, as data.train"
    )
    answers.add_argument(
        "--prompts-of", action="append", default=[], choices=("training", "validation"), help="files of recorded jobs"
    )
    answers.add_argument(
        "--models", action="append", default=[], metavar="NAME", help="models to ask [the fine-tuned ones]"
    )
    answers.add_argument("--temperature", type=float, default=0.0)
    answers.add_argument("--seed", type=int, default=0)
    answers.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer")
    answers.add_argument("--logprobs", type=int, default=0, metavar="N", help="alternatives of each token; -1: none")
    answers.add_argument("--at-once", type=int, default=4, metavar="N", help="requests at a time")
    answers.add_argument(
        "--budget-tokens", type=int, metavar="N", help="stop asking once the server has counted so many"
    )
    answers.add_argument("--input-price", type=float, metavar="P", help="of a million tokens, for the estimate")
    answers.add_argument("--output-price", type=float, metavar="P", help="of a million tokens, for the estimate")
    words = parser.add_argument_group("words of your users")
    words.add_argument(
        "--redact", action="append", default=[], choices=KINDS, help="mask what data.clean finds (the extra `clean`)"
    )
    words.add_argument("--user-column", action="append", default=[], metavar="NAME", help="column that names the user")
    words.add_argument("--delete-user", metavar="ID", help="delete a user's rows and answers; nothing is asked")
    return parser


def add_connection(parser: argparse._ActionsContainer) -> None:
    """Add the flags of a connection to a server."""
    parser.add_argument("--key-variable", metavar="NAME", help="variable with the key [OPENAI_API_KEY]")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="file with the key, which only you can read")
    parser.add_argument("--attempts", type=int, default=8, metavar="N", help="of a request, with growing pauses")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="without a byte from the server")


def connection_problems(arguments: argparse.Namespace) -> list[Problem]:
    """Return what is wrong with the flags of a connection."""
    problems: list[Problem] = []
    if arguments.attempts < 1:
        problems.append(Problem("--attempts", "expected at least 1", "--attempts 1", str(arguments.attempts)))
    if not arguments.seconds > 0:
        problems.append(Problem("--seconds", "expected more than 0", "--seconds 300", f"{arguments.seconds:g}"))
    if arguments.key_file is not None and arguments.key_variable is not None:
        problems.append(Problem("--key-file", "the key is in a file or in a variable", "leave out --key-variable"))
    return problems


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError with every invalid flag."""
    problems = connection_problems(arguments)
    least = {"max_tokens": 1, "at_once": 1, "budget_tokens": 1, "temperature": 0, "logprobs": -1}
    least |= {"input_price": 0, "output_price": 0}
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= bound:
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem(flag, f"expected at least {bound}", f"{flag} {bound}", f"{value:g}"))
    if arguments.logprobs > 20:
        problems.append(Problem("--logprobs", "expected 20 at most", "--logprobs 20", str(arguments.logprobs)))
    if arguments.azure is not None and not AZURE_VERSION.fullmatch(arguments.azure):
        problems.append(Problem("--azure", "is no api-version", "--azure v1, or a date as 2024-10-21", arguments.azure))
    if (arguments.input_price is None) != (arguments.output_price is None):
        problems.append(
            Problem("--input-price", "prompts and answers have a price", "--input-price P --output-price P")
        )
    if arguments.delete_user is None and arguments.server is None:
        fix = "--server https://api.openai.com/v1"
        problems.append(Problem("--server", "this is missing", fix))
    if arguments.azure and (arguments.prompts or arguments.prompts_of) and not arguments.models:
        reason = "Azure asks deployments, which its jobs do not name"
        problems.append(Problem("--models", reason, "--models DEPLOYMENT"))
    if problems:
        raise UserError(problems)


def address_of(arguments: argparse.Namespace) -> Address:
    """Return the server's address with the key. Raises UserError."""
    url, query, header = check_address("--server", arguments.server), {}, "authorization"
    azure = getattr(arguments, "azure", None)
    if azure:
        header = "api-key"
        url = url.removesuffix("/v1").removesuffix("/openai") + "/openai"
        if azure == "v1":
            url += "/v1"
        else:
            query = {"api-version": azure}
    return Address(
        url,
        read_key(arguments.key_file, arguments.key_variable, "AZURE_OPENAI_API_KEY" if azure else "OPENAI_API_KEY"),
        header,
        query,
        arguments.attempts,
        arguments.seconds,
        flag="--server",
        fix="check the address and the key; the same command goes on",
    )


def read_key(file: Path | None, variable: str | None, default: str, flag: str = "--key") -> str:
    """Return the key in `file`, in the environment's `variable` or, if neither is named, in its variable `default`, which may be
    unset. flag: the beginning of the flags that name them. Raises UserError."""
    if file is not None:
        try:
            key = files.read_own(file).decode().strip()
        except PermissionError:
            raise UserError(Problem(f"{flag}-file", "others can read it", f"chmod 600 {file}", str(file))) from None
        except (OSError, ValueError) as error:
            raise UserError(Problem(f"{flag}-file", str(error), "another file", str(file))) from None
    else:
        key = os.environ.get(variable or default, "").strip()
        if not key and variable:
            raise UserError(Problem(f"{flag}-variable", "this variable is empty", f"export {variable}=...", variable))
    if re.search(r"[^\x21-\x7e]", key):
        raise UserError(
            Problem(f"{flag}-file", "the key has characters that no key has", "one line with the key alone")
        )
    return key
