"""Writes `card.md`, which describes a set of synthetic rows."""

from __future__ import annotations

import argparse
from collections import Counter

from dstune import __version__
from dstune.data.unread import SYNTHETIC
from dstune.synthesize.journal import Journal
from dstune.synthesize.pipeline import Synthesis


def write_card(arguments: argparse.Namespace, made: Synthesis, journal: Journal, requests: int) -> str:
    """Write the card as Markdown."""
    models = Counter((answer.model, answer.version) for answer in journal.answers.values())
    lines = [
        f"# {arguments.output.name}",
        "",
        f"{len(made.rows):,} synthetic rows ({arguments.kind}), written by a model and filtered by dstune {__version__}.",
        f"Column `{SYNTHETIC}` of a row says which model, input and seed it comes from, and its scores.",
        "",
        "| what | value |",
        "| --- | --- |",
        *(
            f"| model | {_cell(model)}{f' ({_cell(version)})' if version else ''}: {count:,} answers |"
            for (model, version), count in sorted(models.items())
        ),
        f"| input | {_cell(arguments.input)} |",
        f"| answers | {len(journal.answers):,} of {requests:,}, {arguments.samples} to a request |",
        f"| sampling | temperature {arguments.temperature:g}, at most {arguments.max_tokens:,} tokens, seed {arguments.seed} |",
        f"| tokens | {journal.tokens:,}, as the server counts them |",
    ]
    if arguments.system:
        lines.append(f"| system message | {_cell(arguments.system)} |")
    if made.contaminated is not None:
        held_out = ", ".join(map(_cell, arguments.held_out))
        lines.append(f"| rows with text of {held_out} | {made.contaminated:,} |")
    lines += ["", "| left out because | rows |", "| --- | --- |"]
    lines += [f"| {_cell(reason)} | {count:,} |" for reason, count in made.reasons.most_common()] or ["| | 0 |"]
    lines += [
        "",
        "What the model writes may be wrong, and repeats what it was trained on.",
        "Its licence or terms may limit what its answers may be used for.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Escape a text so that it fits into one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
