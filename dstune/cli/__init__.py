"""The command `dstune`: finds the verb and runs it, and turns errors into messages and exit codes. Each verb has a file here, and
registers itself.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

from dstune import __version__
from dstune.core import places
from dstune.core.disk import is_disk_full
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, DstuneError, Problem, UserError, to_json
from dstune.core.paths import PROJECT_FILE
from dstune.core.text import Filtered, visible_but_colours
from dstune.core.verb import GROUPS, VERBS, Verb, other_names

ORDER = (
    "init",
    "models",
    "samples",
    "data",
    "train",
    "plan",
    "runs",
    "status",
    "cancel",
    "checkpoints",
    "prune",
    "upgrade",
    "evaluate",
    "generate",
    "predict",
    "report",
    "export",
    "doctor",
    "verify",
    "trust",
    "completion",
)
"""The verbs that come first in their group of `dstune --help`, in this order; those of wings and plugins follow."""

EXAMPLES = """\
examples:
  dstune train                                           the quickstart: a small chat model on the packaged dialogues
  dstune train experiment=sentiment trainer.epochs=2     a prepared experiment with a changed value
  dstune train model.path=OWNER/NAME data.train=my.jsonl method=lora
  dstune train --cfg job experiment=sentiment            show the configuration instead of training
  dstune train runs/NAME/DATE_TIME trainer.max_steps=80  continue a run, longer
  dstune generate runs/NAME/DATE_TIME --prompt "Hello"

--trust KEY believes a key of a run that you have not signed, --trust plugins also those of dstune.yaml (docs/security.md).
`dstune VERB --help` explains a verb; `dstune train --help KEY` a key or a group.
exit codes: 0 done, 2 the configuration or data is wrong, 75 preempted (`dstune train RUN` continues), 1 anything else
"""


UNUSABLE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a path that the user gave: another user's folder, a loop of links, a text too long to be a path."""
MAX_PATH_CHARACTERS = 200
"""Longest path that an error shows completely."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit code of the public contract."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A verb also prints text from rows, templates and files of runs, which may hold control sequences of a terminal. Errors are
    # filtered where they are created.
    stdout, sys.stdout = sys.stdout, Filtered(sys.stdout, visible_but_colours)
    try:
        return _exit_code(arguments)
    finally:
        sys.stdout = stdout


def _exit_code(arguments: list[str]) -> int:
    try:
        with places.named():
            code = run(arguments)
    except DstuneError as error:
        print_error(error, as_json="--json" in arguments)
        code = error.exit_code
    except BrokenPipeError:  # before OSError, of which it is a subclass
        code = EXIT_FAILED
    except OSError as error:
        if is_disk_full(error):
            print_error(DstuneError(f"a full disk refused a write: {error}"), as_json="--json" in arguments)
            return EXIT_FAILED
        if error.errno not in UNUSABLE or not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        name = os.fsdecode(error.filename)
        path = name if len(name) < MAX_PATH_CHARACTERS else f"{name[:MAX_PATH_CHARACTERS]}..."
        user_error = UserError(Problem(path, f"cannot be used: {error.strerror}", "give a path that you may use"))
        print_error(user_error, as_json="--json" in arguments)
        code = user_error.exit_code
    except KeyboardInterrupt:
        print("dstune: interrupted", file=sys.stderr)
        code = EXIT_FAILED
    flush()
    return code


def run(arguments: list[str]) -> int:
    """Run the verb of the command line. Raises DstuneError."""
    verb, *other_words = without_local_rank(arguments, os.environ) or ["--help"]
    if other_words and f"{verb} {other_words[0]}" in VERBS.without_installed():  # of a wing, such as `data shift`
        verb, *other_words = f"{verb} {other_words[0]}", *other_words[1:]
    if verb in ("--help", "-h", "help"):
        if other_words and find_verb(other_words[0]) is not None:  # `dstune help train`
            return run([other_words[0], "--help"])
        print(help_text())
        return EXIT_DONE
    if verb in ("--version", "-V"):
        print(f"dstune {__version__}")
        return EXIT_DONE
    if verb in ("--shell-completion", "-sc") or verb.startswith("--shell-completion="):
        from dstune.cli.completion import complete

        return complete(arguments)
    if not any(word.partition("=")[0] == "--trust" for word in other_words):
        return _run_verb(verb, other_words)
    from dstune.config import trust

    with trust.from_flags(other_words) as words:
        return _run_verb(verb, words)


def without_local_rank(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """Return the command line without the flag that `deepspeed` puts before the arguments of the module that it starts.

    DeepSpeed passes `--local_rank=N` unless it is called with `--no_local_rank`, torch's former launcher `--local-rank=N`. Both
    set `LOCAL_RANK` too, which is what dstune reads.
    """
    match = re.fullmatch(r"--local[_-]rank=(\d+)", arguments[0]) if arguments else None
    return arguments[1:] if match and environment.get("LOCAL_RANK") == match[1] else arguments


def _run_verb(name: str, words: list[str]) -> int:
    verb = find_verb(name)
    if verb is None:
        raise UserError(unknown_verb(name))
    if verb.needs_plugins or not os.path.lexists(PROJECT_FILE):
        return verb().run(words)
    from dstune.config.project import optional_plugins

    with optional_plugins():
        return verb().run(words)


def find_verb(name: str) -> type[Verb] | None:
    """Return the verb of this name, or None. Loads plugins only if no built-in verb has the name."""
    return VERBS.without_installed().get(name) or all_verbs().get(name)


def all_verbs() -> Mapping[str, type[Verb]]:
    """Return the built-in verbs, and those of installed plugins and of plugins in `dstune.yaml` that the user trusts."""
    if os.path.lexists(PROJECT_FILE):
        from dstune.config.plugins import activate_requested
        from dstune.config.project import optional_plugins

        with optional_plugins():
            activate_requested([])
    return VERBS.classes()


def help_text() -> str:
    try:
        verbs = all_verbs()
    except UserError as error:  # of a plugin
        print(f"dstune: note: lists no verbs of plugins: {error}", file=sys.stderr)
        verbs = VERBS.without_installed()
    rows = []
    for group in GROUPS:
        lines = [f"  {name:<12} {verb.summary}" for name, verb in verbs.items() if verb.group == group]
        rows += [group, *lines, ""] if lines else []
    usage = (
        "usage: dstune VERB [PATH] [key=value ...] [--json] [--trust KEY,...] [Hydra flags]\n       dstune --version"
    )
    return "\n".join([usage, "", "Fine-tune language models with DeepSpeed ZeRO.", "", *rows, EXAMPLES])


def unknown_verb(word: str) -> Problem:
    import difflib

    names = list(VERBS)
    if re.match(r"--local[_-]rank\b", word):
        reason = (
            "this is a flag of a launcher, and no launcher has started this process (LOCAL_RANK is unset or differs)"
        )
        return Problem("command line", reason, "remove it", word)
    if word.startswith("-"):
        return Problem("command line", "flags go after the verb", f"dstune VERB {word}", word)
    if "=" in word:
        return Problem("command line", "the verb is missing", f"dstune train {word}", word)
    if word in (verb_by_other_name := other_names()):
        return Problem("verb", "there is no such verb", verb_by_other_name[word], word)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    fix = f"did you mean `dstune {nearest[0]}`?" if nearest else f"the verbs are {', '.join(names)}"
    return Problem("verb", "there is no such verb", fix, word)


def print_error(error: DstuneError, *, as_json: bool) -> None:
    """Print an error: as text on stderr for people, or as one JSON object on stdout for scripts."""
    if as_json:
        print(json.dumps({"error": {**json.loads(to_json(error)), "exit_code": error.exit_code}}))
        return
    problems = getattr(error, "problems", [])
    if len(problems) > 1:
        listed = "\n".join(f"  {problem}".replace("\n", "\n  ") for problem in problems)
        print(f"dstune: {len(problems)} problems\n{listed}", file=sys.stderr)
    else:
        print(f"dstune: {error}", file=sys.stderr)


def flush() -> None:
    """Flush the output; ignore a reader that has gone (`| head`), which would raise an error when the interpreter exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
