"""The flags of `dstune synthesize`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dstune.core.api_client import Address, check_address
from dstune.core.arguments import VerbParser
from dstune.core.errors import Problem, UserError
from dstune.synthesize.requests import KINDS

DESCRIPTION = """\
Let a served model write rows, filter them, and write down where each came from. OUTPUT/rows.jsonl has the rows, left_out.jsonl the
others with the reason, card.md what was done. A synthesis that was killed goes on with the same command.
Exit codes: 0 done, 1 the teacher gave no answer, 75 the budget is used up (finished rows are there in both cases).
"""


def make_parser() -> VerbParser:
    parser = VerbParser("dstune synthesize", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("kind", choices=[*KINDS], help="what to write")
    parser.add_argument("--input", required=True, metavar="FILE", help="prompts, texts or example rows, as data.train")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--teacher", required=True, metavar="URL", help="an OpenAI-compatible address, up to /v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable with the key",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="how many items to ask about; all of the input when not given"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers of each request (preferences: 2 or more)"
    )
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="a system message of the requests; rows do not have it"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of an answer; one that is cut off is left out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="requests at a time")
    parser.add_argument(
        "--attempts", type=int, default=6, metavar="N", help="how often a request is asked, with growing pauses"
    )
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="for one answer")
    parser.add_argument(
        "--budget-tokens", type=int, metavar="N", help="stop asking once the teacher has counted so many"
    )
    filters = parser.add_argument_group("filters, in this order")
    filters.add_argument("--keep-refusals", action="store_true", help="refusals are left out otherwise")
    filters.add_argument(
        "--languages", metavar="en,de", help="leave out answers in other languages (the extra `clean`)"
    )
    filters.add_argument(
        "--held-out", action="append", default=[], metavar="FILE", help="leave out rows with text of these"
    )
    filters.add_argument(
        "--grade", action="append", default=[], metavar="NAME[=LEAST]", help="a reward, and its least score"
    )
    filters.add_argument(
        "--tokenizer", metavar="PATH", help="of the model to be trained, for rewards that count tokens (brevity)"
    )
    filters.add_argument("--reward-url", metavar="URL", help="a reward model behind `dstune serve`, up to /v1")
    filters.add_argument("--reward-model", metavar="NAME", help="its name there")
    filters.add_argument("--reward-least", type=float, metavar="SCORE")
    filters.add_argument(
        "--agreement", type=float, metavar="SHARE", help="of a request's samples that agree, at least; one stays"
    )
    filters.add_argument(
        "--near",
        type=float,
        metavar="SHARE",
        help="leave out rows so alike, 0.8 to 1 (the extra `clean`)",
    )
    return parser


def address_of(arguments: argparse.Namespace, flag: str, url: str) -> Address:
    """Return the address that `flag` names, with the key. Raises UserError."""
    return Address(
        check_address(flag, url),
        os.environ.get(arguments.key_variable, ""),
        attempts=arguments.attempts,
        seconds=arguments.seconds,
        flag=flag,
        fix=f"check {flag}, the model's name and the variable with the key",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError with every invalid option or combination."""
    problems: list[Problem] = []

    def at_least(flag: str, value: float | None, least: float) -> None:
        if value is not None and value < least:
            problems.append(Problem(flag, f"expected at least {least:g}", f"{flag} {least:g}", f"{value:g}"))

    kind = KINDS[arguments.kind]
    at_least("--count", arguments.count, 1)
    at_least("--samples", arguments.samples, 1)
    at_least("--max-tokens", arguments.max_tokens, 1)
    at_least("--at-once", arguments.at_once, 1)
    at_least("--attempts", arguments.attempts, 1)
    at_least("--budget-tokens", arguments.budget_tokens, 1)
    at_least("--temperature", arguments.temperature, 0.0)
    if not arguments.seconds > 0:
        problems.append(Problem("--seconds", "expected more than 0", "--seconds 300", f"{arguments.seconds:g}"))
    for flag, url in (("--teacher", arguments.teacher), ("--reward-url", arguments.reward_url)):
        if url is not None:
            try:
                check_address(flag, url)
            except UserError as error:
                problems += error.problems
    if (arguments.reward_url is None) != (arguments.reward_model is None):
        problems.append(
            Problem("--reward-url", "a reward model has an address and a name", "give --reward-url and --reward-model")
        )
    if arguments.reward_least is not None and arguments.reward_url is None:
        problems.append(Problem("--reward-least", "no reward model is given", "--reward-url URL --reward-model NAME"))
    if kind.compares and arguments.samples < 2:
        problems.append(Problem("--samples", "a pair is made of two answers", "--samples 4", str(arguments.samples)))
    if kind.compares and not (arguments.grade or arguments.reward_url):
        reason = "nothing tells which of two answers is the better one"
        problems.append(Problem("--grade", reason, "--grade NAME, or --reward-url URL --reward-model NAME"))
    if arguments.agreement is not None:
        if not 0 < arguments.agreement <= 1:
            problems.append(
                Problem("--agreement", "expected a share above 0", "--agreement 0.5", f"{arguments.agreement:g}")
            )
        if arguments.samples < 2 or kind.name != "answers":
            reason = "several answers to the same prompt are compared"
            problems.append(
                Problem("--agreement", reason, "dstune synthesize answers --samples 5", f"{arguments.agreement:g}")
            )
    if arguments.near is not None and not 0.8 <= arguments.near <= 1:
        problems.append(Problem("--near", "expected 0.8 to 1", "--near 0.9", f"{arguments.near:g}"))
    if problems:
        raise UserError(problems)
