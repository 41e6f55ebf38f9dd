"""`dstune trust`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, Problem, UserError
from dstune.core.paths import PROJECT_FILE
from dstune.core.text import one_line
from dstune.core.verb import MACHINE, Verb, verb

if TYPE_CHECKING:
    from dstune.config.project import Candidate


@verb
class Trust(Verb):
    name = "trust"
    summary = "let the plugins that a folder's dstune.yaml names run as you"
    group = MACHINE
    action = "dstune.cli.trust:main"
    other_names = ((("allow",), "`dstune trust FOLDER`"),)


def main(argv: list[str]) -> int:
    """Run `dstune trust [FOLDER] [--yes | --list | --remove]`; return 1 if the user says no. Raises UserError."""
    from dstune.config import project
    from dstune.core.arguments import VerbParser

    text = (
        "Trust the plugins that FOLDER/dstune.yaml names, as they are now: commands in that folder then run them as you. "
        "A plugin that changes or is added is not trusted."
    )
    parser = VerbParser(prog="dstune trust", description=text)
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help="the current one if absent"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--yes", action="store_true", help="do not ask, for scripts")
    mode.add_argument("--list", action="store_true", help="show the folders that you trust")
    mode.add_argument("--remove", action="store_true", help="stop trusting FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.list:
        return _list()
    if arguments.remove:
        return _remove(arguments.folder)
    candidates = _candidates(arguments.folder)
    record = {plugin.place: plugin.digest for plugin in candidates}
    print(one_line(str(arguments.folder.resolve())))
    for plugin in candidates:
        print(f"  {_line(plugin.place, plugin.digest)}")
        for remark in plugin.remarks:
            print(f"    {one_line(remark)}")
    if project.read_record(arguments.folder) == record:
        print("You trust these plugins already.")
        return EXIT_DONE
    if not arguments.yes and not _confirmed(arguments):
        print("They are not trusted.")
        return EXIT_FAILED
    project.write_record(arguments.folder, candidates)
    print("They run as you from now on, until one of them changes.")
    return EXIT_DONE


def _candidates(folder: Path) -> list[Candidate]:
    from dstune.config import project

    if not folder.is_dir():
        raise UserError(Problem("FOLDER", "there is no such folder", "dstune trust .", str(folder)))
    if candidates := project.candidates(folder):
        return candidates
    fix = "there is nothing to trust"
    if (folder / "run.yaml").is_file():
        fix = f"a run is signed: dstune upgrade {folder} --trust KEY"
    raise UserError(Problem("FOLDER", f"it has no {PROJECT_FILE} that names plugins", fix, str(folder)))


def _line(place: str, digest: str) -> str:
    from dstune.config.project import INSTALLED

    return f"{one_line(place)}  {digest if digest == INSTALLED else f'sha256 {one_line(digest)}'}"


def _confirmed(arguments: argparse.Namespace) -> bool:
    if not sys.stdin.isatty():
        fix = f"dstune trust {arguments.folder} --yes"
        raise UserError(Problem("trust", "there is no terminal to ask for confirmation", fix, str(arguments.folder)))
    print("Let every command in this folder run this code as you? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _list() -> int:
    from dstune.config.project import trusted_folders

    for folder, plugins in trusted_folders().items():
        print(one_line(folder) + ("" if Path(folder).is_dir() else "  (gone)"))
        for place, digest in plugins.items():
            print(f"  {_line(place, digest)}")
    return EXIT_DONE


def _remove(folder: Path) -> int:
    from dstune.config.project import record_file

    try:
        record_file(folder).unlink()
    except (FileNotFoundError, RuntimeError):
        raise UserError(
            Problem(
                "FOLDER", "you do not trust this folder", "`dstune trust --list` shows the ones you do", str(folder)
            )
        ) from None
    print(f"{one_line(str(folder.resolve()))} is not trusted any more.")
    return EXIT_DONE
