"""`dstune completion`."""

from __future__ import annotations

from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.verb import MACHINE, VERBS, Verb, verb

HELP = """\
usage: dstune completion bash|zsh|fish

bash: put eval "$(dstune completion bash)" into ~/.bashrc
zsh:  put eval "$(dstune completion zsh)" into ~/.zshrc
fish: put dstune completion fish | source into ~/.config/fish/config.fish
"""


@verb
class Completion(Verb):
    name = "completion"
    summary = 'print the shell completion: eval "$(dstune completion bash)"'
    group = MACHINE
    takes_files = False
    further_words = ("bash", "zsh", "fish")

    def run(self, arguments: list[str]) -> int:
        """Print the script that a shell evaluates."""
        if arguments in (["--help"], ["-h"]):
            print(HELP)
            return EXIT_DONE
        if len(arguments) != 1:
            raise UserError(
                Problem("completion", "expected the name of a shell", "dstune completion bash (or zsh, fish)")
            )
        return complete(["--shell-completion", f"install={arguments[0]}"])

    def parser(self) -> None:
        return None


def complete(arguments: list[str]) -> int:
    """Answer a question of the shell (`--shell-completion`)."""
    from dstune.config.flags import hydra_flags, show

    return show(hydra_flags(arguments), {name: cls().words for name, cls in VERBS.classes().items()})
