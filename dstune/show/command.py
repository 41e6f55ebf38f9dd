"""The verb `dstune data show`: composes the configuration as `dstune train` does, loads the tokenizer (no weights), prints rows."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.overrides import key_of
from dstune.config.schema import InitialWeights, RunConfig
from dstune.config.trust import Use
from dstune.config.validate import validate
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.data.inputs import PARTS
from dstune.data.recorded_files import changed_files
from dstune.launch import preflight, train
from dstune.launch.commands import NO_TELEMETRY, OFFLINE
from dstune.launch.console import Console

if TYPE_CHECKING:
    from dstune.show.facts import Preview

EPILOG = """\
Everything else is taken as by `dstune train`: overrides, --config-dir, and the PATH of a run in the first place.

examples:
  dstune data show experiment=sentiment --rows 3
  dstune data show task=causal_lm data.train=corpus.jsonl data.max_length=2048
  dstune data show runs/NAME/DATE_TIME --split validation --html rows.html
  dstune data show data.train=my.jsonl --row my.jsonl:17
"""


@dataclass(frozen=True)
class Options:
    rows: int
    split: str
    html: Path | None
    row: str | None
    json: bool


def main(argv: list[str]) -> int:
    """Run `dstune data show [RUN] [key=value ...] [flags]`. Raises UserError; returns the exit code."""
    if argv[:1] in ([], ["--help"], ["-h"]):
        print("usage: dstune data show [RUN] [key=value ...] [flags]\n\n`dstune data show --help` explains it.")
        return EXIT_DONE
    if argv[0] != "show":
        raise UserError(Problem("data", "there is no such command", "dstune data show", argv[0]))
    options, words = _parse(argv[1:])
    command = train.parse(words)
    if command.flags.shows:
        return train.show_configuration(command)
    config = train.configuration(command, Use.rows).config
    validate(config)
    console = Console(sys.stderr)
    config = with_local_files(config, console)
    os.environ.update(NO_TELEMETRY | OFFLINE)
    preview = _read_preview(config, options, console.kind)
    if command.run is not None and options.row is None:
        preview = _with_changes(preview, command, config)
    _print(preview, options)
    return EXIT_DONE


def _with_changes(preview: Preview, command: train.Command, config: RunConfig) -> Preview:
    """Return the preview, with a note if its rows are not those that the run was trained on."""
    assert command.run is not None
    named = set(map(key_of, command.flags.overrides))
    keys = {f"data.{preview.split}", "data.train"} - named
    changed = [name for key, name in changed_files(command.run, config).items() if key in keys or "mixture" in key]
    if not changed:
        return preview
    note = f"{', '.join(changed)}: the file changed since {command.run} was trained, these are its rows now"
    return replace(preview, note="; ".join(filter(None, (preview.note, note))))


def _parse(argv: list[str]) -> tuple[Options, list[str]]:
    parser = VerbParser(
        prog="dstune data show",
        usage="dstune data show [RUN] [key=value ...] [flags]",
        description="Rows as the model sees them, with the trained tokens marked, and what there is to know of all rows.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="rows to show, evenly spaced (default 4)")
    parser.add_argument("--split", choices=PARTS, default="train", help="which rows (default train)")
    parser.add_argument("--row", metavar="FILE:LINE", help="show this row alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, words = parser.parse_known_args(argv)
    if options.rows < 0:
        raise UserError(Problem("--rows", "must be at least 0", "--rows 4", str(options.rows)))
    return Options(options.rows, options.split, options.html, options.row, options.json), words


def with_local_files(config: RunConfig, console: Console) -> RunConfig:
    """Return `config` with its data and the files of its model in place, all but the weights.

    Raises:
        UserError: everything that is missing, listed together.
    """
    without_weights = replace(config, model=replace(config.model, weights=InitialWeights.random))
    resolved = preflight.resolve_run(without_weights, console.stage, trains=False)
    return replace(resolved, model=replace(resolved.model, weights=config.model.weights))


def _read_preview(config: RunConfig, options: Options, console_kind: str) -> Preview:
    """Read the rows and show progress on stderr, since a large file takes minutes. console_kind: value for DSTUNE_CONSOLE."""
    from dstune.show.facts import show, show_row
    from dstune.tracking.console import Console as Progress
    from dstune.tracking.console import console_activities

    os.environ.setdefault("DSTUNE_CONSOLE", console_kind)
    with console_activities(Progress(sys.stderr)):
        if options.row is not None:
            return show_row(config, options.row)
        return show(config, options.split, options.rows)


def _print(preview: Preview, options: Options) -> None:
    if options.html is not None:
        from dstune.show.page import page

        try:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(page(preview), encoding="utf-8")
        except OSError as error:
            fix = "give a file in a folder of yours"
            reason = f"cannot be written: {error.strerror}"
            raise UserError(Problem("--html", reason, fix, str(options.html))) from None
    if options.json:
        print(json.dumps(preview.to_json()))
    elif options.html is not None:
        print(options.html)
    else:
        from dstune.show.terminal import Style, text

        print(text(preview, Style.of(sys.stdout, os.environ)))
