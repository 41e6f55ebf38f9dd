"""The verb `import`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.words import packaged_choices
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_USER, Problem, UserError
from dstune.core.text import one_line
from dstune.importing.convert import Experiment, convert
from dstune.importing.files import TOOLS, TRAINER_KEY, read, tool_of
from dstune.importing.trl import SUPPORTED
from dstune.launch.console import Console

if TYPE_CHECKING:
    from dstune.importing.half_finished import ContinuedRun

DESCRIPTION = """\
Convert a configuration of axolotl, LLaMA-Factory, ms-swift or TRL (YAML, or a shell script with its command) into an experiment,
and list every key that could not be carried over. Exit code 2: the experiment does not compose as it is.

Given a folder, continue a half-finished run: a checkpoint that transformers' Trainer, or a tool built on it, wrote with DeepSpeed
becomes a run directory, which `dstune train RUN` continues on any number of ranks and at any ZeRO stage.

  dstune import checkpoint-50 --output runs/mine data.train=rows.jsonl
"""


def _parser() -> VerbParser:
    parser = VerbParser(
        "dstune import",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a configuration, or the folder of a checkpoint")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="with a checkpoint: what it does not say, data.train=... first",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="PATH",
        help="write it there: DIR/experiment/NAME.yaml, or with a checkpoint the new run directory",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--from", dest="tool", metavar="|".join(TOOLS), help="the tool; recognised by the keys otherwise"
    )
    parser.add_argument(
        "--trainer",
        metavar="|".join(SUPPORTED),
        help="TRL's trainer that the file is for, if neither a command nor its keys say so",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks that the batch sizes are meant for")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Raises UserError; returns the exit code of the public contract."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.file.is_dir():
        return _continue(arguments)
    if arguments.overrides:
        fix = "give it to `dstune train` after experiment=NAME"
        reason = "a configuration is converted as it is"
        raise UserError(Problem("command line", reason, fix, arguments.overrides[0]))
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UserError(Problem("--ranks", "expected a whole number of at least 1", value=str(arguments.ranks)))
    if arguments.output is not None:
        _check_output(arguments.output, arguments.force)
    raw = read(arguments.file)
    if arguments.trainer is not None:
        if arguments.trainer not in SUPPORTED:
            fix = f"one of {', '.join(SUPPORTED)}"
            raise UserError(Problem("--trainer", "this trainer is not supported", fix, arguments.trainer))
        raw = {**raw, TRAINER_KEY: arguments.trainer}
    experiment = convert(raw, tool_of(raw, arguments.tool, str(arguments.file)), arguments.file, arguments.ranks)
    if arguments.output is not None:
        try:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(experiment.text, encoding="utf-8")
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
            raise UserError(Problem("--output", reason, "give a folder of yours", str(arguments.output))) from None
    if arguments.json:
        print(
            json.dumps(
                {
                    **asdict(experiment),
                    "experiment": experiment.text,
                    "output": arguments.output and str(arguments.output),
                }
            )
        )
    else:
        if arguments.output is None:
            print(experiment.text, end="")
        print(report(experiment, arguments.output), file=sys.stderr if arguments.output is None else sys.stdout)
    return EXIT_USER if experiment.problems else EXIT_DONE


def _continue(arguments: argparse.Namespace) -> int:
    """Write the run directory that continues a checkpoint. Raises UserError."""
    from dstune.importing.half_finished import continue_checkpoint  # imports DeepSpeed

    for flag in ("ranks", "tool", "trainer"):
        if value := getattr(arguments, flag):
            name = {"tool": "from"}.get(flag, flag)
            raise UserError(Problem(f"--{name}", "a checkpoint says it itself", "leave it out", str(value)))
    if arguments.output is None:
        fix = f"dstune import {arguments.file} --output runs/{arguments.file.absolute().parent.name or 'mine'}"
        raise UserError(Problem("--output", "a checkpoint becomes a run directory, and none is given", fix))
    continued = continue_checkpoint(
        arguments.file, arguments.output, arguments.overrides, Console(sys.stderr if arguments.json else sys.stdout)
    )
    print(json.dumps(asdict(continued)) if arguments.json else report_continued(continued))
    return EXIT_DONE


def report_continued(continued: ContinuedRun) -> str:
    """Return what was carried, what was not and why, what was assumed, and the next command."""
    ranks = f"{continued.ranks} rank{'s' * (continued.ranks != 1)}"
    lines = [
        f"{continued.kind}, step {continued.step} of {continued.total_steps}, written by {ranks} at ZeRO stage {continued.stage}",
        f"carried: weights, moments, schedule, and the order of {continued.rows:,} rows for all {continued.total_steps} steps",
    ]
    if continued.dropped:
        lines.append("not carried:")
    for key, dropped in continued.dropped.items():
        lines.append(f"  {one_line(key)}: {_shortened(dropped.value)}\n    {dropped.kind}: {one_line(dropped.reason)}")
    if continued.differences:
        lines += ["losses will differ from those of the Trainer:", *(f"  {text}" for text in continued.differences)]
    lines += ["assumed:", *(f"  {text}" for text in continued.assumed)]
    lines += [f"written: {continued.run}", f"next: {shlex.join(['dstune', 'train', continued.run])}"]
    return "\n".join(lines)


def _shortened(value: object) -> str:
    text = one_line(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_output(output: Path, force: bool) -> None:
    """Raise UserError for a file that `experiment=NAME` would not find, or that exists."""
    if output.suffix != ".yaml":
        fix = "give a name that ends in .yaml"
        raise UserError(Problem("--output", "an experiment is found in a .yaml file only", fix, str(output)))
    if output.stem in packaged_choices()["experiment"]:
        reason = f"dstune has an experiment {output.stem} of its own, which experiment={output.stem} would choose"
        fix = f"give another name: {output.with_stem(f'my_{output.stem}')}"
        raise UserError(Problem("--output", reason, fix, str(output)))
    if output.exists() and not force:
        raise UserError(Problem("--output", "the file exists", "another name, or --force", str(output)))


def report(experiment: Experiment, output: Path | None) -> str:
    """Return which keys were converted, which were not and why, the assumptions, and the next steps."""
    lines = [
        f"{experiment.tool}: {len(experiment.carried)} keys carried, {len(experiment.dropped)} not or not to the letter"
    ]
    for key, dropped in experiment.dropped.items():
        lines.append(f"  {key}: {_shortened(dropped.value)}\n    {dropped.kind}: {dropped.reason}")
    if experiment.assumed:
        lines += ["assumed:", *(f"  {text}" for text in experiment.assumed)]
    if experiment.problems:
        lines += ["to fix before it runs:"]
        lines += [f"  {problem}".replace("\n", "\n  ") for problem in experiment.problems]
    if output is not None:
        folder = output.parent.parent if output.parent.name == "experiment" else None
        lines.append(f"written: {output}")
        if folder is None:
            lines.append("put it into a folder named experiment, so that --config-dir finds it")
        else:
            command = shlex.join(["dstune", "train", "--config-dir", str(folder), f"experiment={output.stem}"])
            lines.append(f"then: {command}" if experiment.problems else f"next: {command}")
    return "\n".join(lines)
