"""The verb `dstune data shift`: compares two sets of rows."""

from __future__ import annotations

from pathlib import Path

from dstune.core.arguments import VerbParser
from dstune.monitor.budget import Budget
from dstune.monitor.check import Settings
from dstune.monitor.command import add_test_options, check_numbers, compare, exit_code, report
from dstune.monitor.gather import Live, Reference, read_reference


def main(argv: list[str]) -> int:
    """Run `dstune data shift A B` and return the exit code: 3 for a difference with --fail-on-drift. Raises UserError."""
    parser = VerbParser(
        prog="dstune data shift",
        description="Measure how far the rows B are from the rows A, such as a model's validation rows or last month's rows.",
    )
    parser.add_argument("a", metavar="A", help="rows to compare with: a run (its validation rows), a file or a table")
    parser.add_argument("b", metavar="B", help="rows to compare, in the same forms")
    add_test_options(parser)
    arguments = parser.parse_args(argv)
    check_numbers(arguments)
    reference, other = (_rows(spec, arguments.rows) for spec in (arguments.a, arguments.b))
    settings = Settings(arguments.alpha, 1, arguments.effect, streams=False)
    live = Live(other.rows, [], None, None, from_server=False, left_out=other.left_out)
    outcome = compare(reference, live, Budget(arguments.alpha, 1), settings, embeddings=arguments.embeddings)
    result = outcome.to_json()
    report(outcome, result, as_json=arguments.json)
    return exit_code(result, fails=arguments.fail_on_drift)


def _rows(spec: str, most: int) -> Reference:
    if not (Path(spec) / "run.yaml").is_file():
        return read_reference(None, spec, most, mask=False)
    reference = read_reference(Path(spec), None, most, mask=False)
    return Reference(reference.validation, reference.validation, reference.config, f"validation rows of {spec}")
