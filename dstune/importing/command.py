"""The verb `import`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from dstune.config.words import packaged_choices
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_USER, Problem, UserError
from dstune.importing.convert import Experiment, convert
from dstune.importing.files import TOOLS, TRAINER_KEY, read, tool_of
from dstune.importing.trl import SUPPORTED

DESCRIPTION = """\
Convert a configuration of axolotl, LLaMA-Factory, ms-swift or TRL (YAML, or a shell script with its command) into an experiment,
and list every key that could not be carried over. Exit code 2: the experiment does not compose as it is.
"""


def _parser() -> VerbParser:
    parser = VerbParser("dstune import", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--output", "-o", type=Path, metavar="DIR/experiment/NAME.yaml", help="write it there")
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
    arguments = _parser().parse_args(argv)
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
        value_text = str(dropped.value)
        value_text = value_text if len(value_text) <= 60 else f"{value_text[:57]}..."
        lines.append(f"  {key}: {value_text}\n    {dropped.kind}: {dropped.reason}")
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
