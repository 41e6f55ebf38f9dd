"""`dstune evaluate MODEL --against EXPECTED`: compares two models and names what differs."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.schema import ModelConfig
from dstune.core.api_client import Address, ApiClient, check_address
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, Problem, UserError
from dstune.evaluation.against.difference import Difference, listed
from dstune.inference.bounds import BOUNDS, difference
from dstune.tracking.jsonl import json_text

if TYPE_CHECKING:
    from dstune.evaluation.against.scores import Row, Server
    from dstune.evaluation.against.sides import Side

KEY_VARIABLE = "DSTUNE_API_KEY"
"""Variable with the key of a compared server."""
TOKENIZATION = {"template", "bos", "bos_twice", "vocabulary", "vocabulary_shifted", "special_tokens_missing"}
"""Differences after which prompts become other tokens."""


@dataclass
class Comparison:
    """What the comparison of two models found."""

    model: str
    against: str
    precision: str = ""
    rows: int = 0
    difference: float | None = None
    """The largest difference of log-probabilities, as `inference.bounds` defines it."""
    bound: float | None = None
    tensors: int = 0
    differences: list[Difference] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)
    """What could not be compared, and why."""

    @property
    def same(self) -> bool:
        return not self.differences


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    flags = ("shots", "harness", "grader", "output")
    if others := [f"--{name}" for name in flags if getattr(arguments, name) not in (None, [])]:
        raise UserError(Problem(name, "--against compares two models", f"leave {name} out") for name in others)
    if arguments.overrides:
        reason = "a comparison of two models reads no configuration"
        fix = "--prompts FILE names the prompts; dstune evaluate MODEL data.validation=FILE measures them"
        raise UserError(Problem("--against", reason, fix, arguments.overrides[0]))
    if _is_url(arguments.target) and _is_url(arguments.against):
        reason = "two servers cannot be compared: neither shows its weights or tokenizer"
        raise UserError(Problem("--against", reason, "name the files of one of the two", arguments.against))


def main(arguments: argparse.Namespace, stage: Callable[[str], None]) -> int:
    """Compare the models and print what differs; return the exit code: 1 if something does. Raises UserError."""
    check(arguments)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        comparison = compare(arguments, Path(scratch), stage)
    if arguments.json:
        print(json_text(asdict(comparison) | {"same": comparison.same}))
    else:
        print(text_of(comparison))
    return EXIT_DONE if comparison.same else EXIT_FAILED


def compare(arguments: argparse.Namespace, scratch: Path, stage: Callable[[str], None]) -> Comparison:
    """Compare the models of a command line. Raises UserError."""
    from dstune.evaluation.against.scores import read_rows

    rows = read_rows(arguments.prompts)
    target, against = arguments.target, arguments.against
    if _is_url(target) or _is_url(against):
        flag, url, path = ("MODEL", target, against) if _is_url(target) else ("--against", against, target)
        server = _server(flag, url, arguments.served_model)
        stage(f"loading {path}")
        side = _open(path, "--against" if flag == "MODEL" else "MODEL", arguments, scratch)
        return _compare_server(server, side, rows, Comparison(target, against, side.precision))
    stage(f"loading {against}")
    expected = _open(against, "--against", arguments, scratch)
    stage(f"loading {target}")
    model = _open(target, "MODEL", arguments, scratch)
    return _compare_files(model, expected, rows, Comparison(target, against))


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _open(path: str, where: str, arguments: argparse.Namespace, scratch: Path) -> Side:
    from dstune.checkpoint.export import existing_or_new_export
    from dstune.config.registered import local_path
    from dstune.core.model_names import refuse_ambiguous_folder
    from dstune.evaluation.against.sides import open_side

    trusts = arguments.trust_remote_code
    folder = Path(path)
    if (folder / "run.yaml").is_file():
        which = arguments.checkpoint if where == "MODEL" else "last"
        export = existing_or_new_export(folder, scratch / where.strip("-"), which=which)
        return open_side(path, export, ModelConfig(path=str(export), trust_remote_code=trusts), where)
    refuse_ambiguous_folder(path, where, trusts_code=trusts)
    local = local_path(path, where)
    return open_side(path, Path(local), ModelConfig(path=local, trust_remote_code=trusts), where)


def _server(flag: str, url: str, name: str | None) -> Server:
    from dstune.evaluation.against.scores import Server

    address = Address(check_address(flag, url), os.environ.get(KEY_VARIABLE, ""), flag=flag, attempts=2)
    client = ApiClient(address)
    if name is None:
        answer = client.get("/models").get("data")
        names = (
            [str(entry.get("id")) for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
        )
        if len(names) != 1:
            reason = f"the server has {len(names)} models: {listed(names)}" if names else "the server lists no model"
            raise UserError(Problem("--served-model", reason, "--served-model NAME"))
        name = names[0]
    return Server(client, ApiClient(replace(address, url=address.url.removesuffix("/v1"))), name)


def _compare_files(model: Side, expected: Side, rows: Sequence[Row], comparison: Comparison) -> Comparison:
    from dstune.evaluation.against import scores
    from dstune.evaluation.against.files import compare_files
    from dstune.evaluation.against.sides import coarser
    from dstune.evaluation.against.weights import compare_weights

    comparison.precision = coarser(model.precision, expected.precision)
    comparison.tensors = len(expected.weights)
    found = [*compare_files(model, expected), *compare_weights(model, expected)]
    if model.gguf or expected.gguf:
        comparison.uncompared.append("generation settings: a GGUF file holds none")
    bound = scores.ALLOWED[comparison.precision]
    largest, other_tokens = 0.0, ""
    for row in rows:
        ids = scores.prompt_ids(expected.tokenizer, row)
        if ids is None or len(ids) < 2:
            continue
        if not other_tokens and scores.prompt_ids(model.tokenizer, row) != ids:
            other_tokens = f"{row.where or repr(row.text[:40])} becomes other tokens than with {expected.name}"
        if max(ids) >= model.module.get_input_embeddings().weight.shape[0]:
            largest = float("inf")
            continue
        values, wanted = scores.logprobs(model.module, ids), scores.logprobs(expected.module, ids)
        largest = _larger(largest, difference(values, wanted, comparison.precision))
        comparison.rows += 1
    comparison.difference, comparison.bound = largest, bound
    if other_tokens and not TOKENIZATION & {item.kind for item in found}:
        found.append(Difference("prompt_tokens", other_tokens, f"copy the tokenizer files of {expected.name}"))
    # Both are computed by the same code: if tensors agree to the rounding of few bits, the rest is what that rounding costs.
    if not largest <= bound and not found and (comparison.precision in BOUNDS or largest != largest):
        found.append(_other_answers(largest, bound, comparison.precision))
    comparison.differences = found
    return comparison


def _compare_server(server: Server, side: Side, rows: Sequence[Row], comparison: Comparison) -> Comparison:
    """Compare what a server answers with a model's files."""
    from dstune.evaluation.against import scores
    from dstune.inference.reference_rows import MOST_TOKENS

    bound = comparison.bound = scores.ALLOWED[side.precision]
    if side.precision == "float32":  # servers compute in 16 bits unless they are told otherwise
        bound = comparison.bound = scores.ALLOWED["bfloat16"]
    comparison.precision = "bfloat16" if side.precision == "float32" else side.precision
    largest, other_prompts = 0.0, []
    reports_prompts, ids_of_text = True, dict[str, int]()
    for row in rows:
        ids = scores.prompt_ids(side.tokenizer, row)
        if ids is None or len(ids) < 2:
            continue
        if reports_prompts:
            shown = server.prompt_ids(row)
            if shown is not None and shown[:MOST_TOKENS] != ids:
                other_prompts.append(_other_prompt(shown, ids))
            try:
                values = server.logprobs(ids)
                wanted = scores.logprobs(side.module, ids)
                largest = _larger(largest, difference(values, wanted, comparison.precision))
                comparison.rows += 1
                continue
            except scores.NoPromptLogprobs:
                reports_prompts = False
                comparison.uncompared.append("prompts: the server reports the log-probabilities of its answers alone")
        question = replace(row, messages=[m for m in row.messages or [] if m["role"] != "assistant"])
        prompt = scores.prompt_ids(side.tokenizer, question)
        answer = server.answer(question)
        if prompt is None:
            continue
        if answer.prompt_tokens is not None and answer.prompt_tokens != len(prompt):
            other_prompts.append(f"the server reads {answer.prompt_tokens} tokens, the template makes {len(prompt)}")
        ids_of_text = ids_of_text or scores.ids_by_text(side.tokenizer)
        written = scores.readable_ids(answer.tokens, ids_of_text)
        if written:
            wanted = scores.logprobs(side.module, [*prompt, *written])[-len(written) :]
            measured = difference(answer.logprobs[: len(written)], wanted, comparison.precision)
            largest = _larger(largest, measured)
            comparison.rows += 1
    comparison.difference = largest
    comparison.uncompared.append("files of the server: it shows none")
    if other_prompts:
        detail = f"{len(other_prompts)} of {len(rows)} prompts become other tokens on the server: {other_prompts[0]}"
        kind = "bos_twice" if all("BOS" in text for text in other_prompts) else "template"
        comparison.differences.append(
            Difference(kind, detail, "start the server with this model's tokenizer and template")
        )
    if not comparison.rows:
        reason = "the server's answers could not be read back as tokens of this tokenizer"
        comparison.differences.append(Difference("tokens", reason, "serve the model with its own tokenizer"))
    elif not largest <= bound:
        comparison.differences.append(_other_answers(largest, bound, comparison.precision))
    return comparison


def _other_prompt(shown: Sequence[int], ids: Sequence[int]) -> str:
    if list(shown[1:]) == list(ids) and shown[:1] == shown[1:2]:
        return "it begins with BOS twice"
    at = next((n for n, (a, b) in enumerate(zip(shown, ids, strict=False)) if a != b), min(len(shown), len(ids)))
    return f"they differ from token {at} on ({list(shown[at : at + 4])}, here {list(ids[at : at + 4])})"


def _other_answers(largest: float, bound: float, precision: str) -> Difference:
    detail = f"log-probabilities differ by {largest:.3g}, {precision} allows {bound:g}"
    return Difference("logprobs", detail, "another base, revision, adapter or number format is loaded")


def _larger(first: float, second: float) -> float:
    """Return the larger; NaN, which no bound allows, if either is."""
    return second if second != second or second > first else first


def text_of(comparison: Comparison) -> str:
    """Return what is printed."""
    return "\n".join(_lines(comparison))


def _lines(comparison: Comparison) -> Iterable[str]:
    measured = ""
    if comparison.difference is not None:
        measured = (
            f"log-probabilities of {comparison.rows} prompts differ by at most {comparison.difference:.2g} "
            f"({comparison.precision} allows {comparison.bound:g})"
        )
    if comparison.same:
        tensors = (
            f"{comparison.tensors:,} tensors, tokenizer, template and settings agree; " if comparison.tensors else ""
        )
        yield f"{comparison.model} is {comparison.against}: {tensors}{measured}"
    else:
        count = len(comparison.differences)
        yield f"{comparison.model} is not {comparison.against}: {count} difference{'s' if count > 1 else ''}"
        for found in comparison.differences:
            yield f"  {found.kind}: {found.detail}"
            yield f"    fix: {found.fix}"
        if measured:
            yield f"  {measured}"
    for text in comparison.uncompared:
        yield f"  not compared: {text}"
