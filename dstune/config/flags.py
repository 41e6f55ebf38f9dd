"""Parses and answers Hydra's flags (`--cfg`, `--help`, `--info`, ...) after a verb of dstune."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from dstune.config import habits
from dstune.config.names import ROOT_KEYS, all_keys, nearest, suggest_key
from dstune.config.plain_file import expand
from dstune.config.words import meaning
from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from dstune.config.completion import Verbs

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
UNSUPPORTED = {
    "--config-name": "there is one root configuration; experiment=NAME chooses between prepared ones",
    "--config-path": "--config-dir FOLDER adds groups of your own",
    "--experimental-rerun": "run.resume=PATH continues a run",
}

OTHER_VERBS = {
    "--checkpoint": "export` and `dstune generate",
    "--prompt": "generate",
    "--input": "generate",
    "--split": "evaluate",
    "--merge": "export",
    "--out": "export",
    "--verify": "checkpoints",
    "--prune": "checkpoints",
    "--now": "cancel",
}
"""Flags of other verbs, with the verb that each belongs to."""


@dataclass(frozen=True)
class Flags:
    """The parsed words of a command line after its verb."""

    overrides: list[str]
    config_dirs: list[str] = field(default_factory=list)
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    info: str | None = None
    help: bool = False
    hydra_help: bool = False
    shell_completion: bool = False
    multirun: bool = False

    @property
    def shows(self) -> bool:
        """Whether the command shows something (`show`) instead of starting a run."""
        return bool(self.cfg or self.info or self.help or self.hydra_help or self.shell_completion)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fix = "--cfg job shows the configuration" if "--cfg" in message else "`dstune train --help` shows the flags"
        raise UserError(Problem("command line", message, fix))


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd", action="append", default=[], dest="config_dirs")
    parser.add_argument("--cfg", "-c", choices=CFG)
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--info", "-i")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    for flag in ("--config-name", "--config-path", "--experimental-rerun"):
        parser.add_argument(flag)
    return parser


def hydra_flags(argv: Sequence[str], *, may_sweep: bool = False) -> Flags:
    """Parse the overrides and Hydra's flags in `argv`, which contains neither the verb nor words that the verb parses itself.

    may_sweep: whether the verb accepts `--multirun`.

    Raises:
        UserError: an unknown flag (with the key that was probably meant), or a missing or wrong value of a flag.
    """
    words = list(argv)
    for i, word in enumerate(words):
        if word in ("--info", "-i") and (i + 1 == len(words) or words[i + 1] not in INFO):
            words[i] = "--info=all"  # without a value, argparse would take the next override as its value
    parsed, unknown = _parser().parse_known_intermixed_args(words)
    # In `unknown`, a word without dashes is the value of the flag before it.
    following = dict(itertools.pairwise(words))
    problems = [_unknown_flag(flag, following.get(flag, "")) for flag in unknown if flag.startswith("-")]
    if parsed.multirun and not may_sweep:
        reason = "a sweep is several runs, which `dstune train` alone starts"
        problems.append(Problem("--multirun", reason, "dstune train --multirun KEY=A,B"))
    problems += [
        Problem(flag, "dstune does not have this flag of Hydra", UNSUPPORTED[flag])
        for flag in ("--config-name", "--config-path", "--experimental-rerun")
        if getattr(parsed, flag[2:].replace("-", "_")) is not None
    ]
    if parsed.info is not None and parsed.info not in INFO:
        problems.append(Problem("--info", f"expected one of {', '.join(INFO)}", value=parsed.info))
    if (parsed.package or parsed.resolve) and not parsed.cfg:
        flag = "--package" if parsed.package else "--resolve"
        problems.append(Problem(flag, "only together with --cfg", f"--cfg job {flag}"))
    if problems:
        raise UserError(problems)
    return Flags(
        overrides=parsed.overrides if parsed.help else expand(parsed.overrides),
        config_dirs=parsed.config_dirs,
        cfg=parsed.cfg,
        package=parsed.package,
        resolve=parsed.resolve,
        info=parsed.info,
        help=parsed.help,
        hydra_help=parsed.hydra_help,
        shell_completion=parsed.shell_completion,
        multirun=parsed.multirun,
    )


def _unknown_flag(flag: str, following: str) -> Problem:
    """Return the problem with an unknown flag, such as `--max-steps 5` of another tool, or `--cgf`, which is misspelled.

    following: the word after it.
    """
    name, equals, value = flag.partition("=")
    if not equals and not following.startswith("-"):
        value = following
    plain = name.lstrip("-").replace("-", "_")
    if plain in ("resume", "resume_from_checkpoint"):
        run = value or "RUN"
        fix = f"`dstune train {run}` continues a run; run.resume={run} starts another one from its newest checkpoint"
        return Problem(name, "settings are keys, not flags", fix, value)
    if verbs := OTHER_VERBS.get(name):
        return Problem(name, "this verb has no such flag", f"it belongs to `dstune {verbs}`", value)
    if plain in ("config", "config_file"):
        return Problem(name, "there is no such flag", meaning(value or "NAME.yaml") or "", value)
    if words := habits.answer(plain, value):
        return Problem(name, "settings are keys, not flags", habits.as_fix(words), value)
    options = [option for option in _parser()._option_string_actions if option.startswith("--")]
    if similar := nearest(name, options, cutoff=0.75):
        return Problem(name, "there is no such flag", f"did you mean {similar}?", value)
    if key := suggest_key(plain, all_keys()):
        return Problem(name, "settings are keys, not flags", f"write {key}={value or 'VALUE'}", value)
    return Problem(name, "there is no such flag", "`dstune train --help` shows flags and keys", value)


def show(flags: Flags, verbs: Verbs | None = None) -> int:
    """Print what `flags` ask for on standard output. Returns the exit code 0.

    Args:
        verbs: the verbs that completion offers; None if `flags` do not ask for completion.

    Raises:
        UserError: wrong overrides or a wrong file of zero.path, as `compose` does; with `--cfg job` or `all`, a configuration
            that `dstune train` would refuse; a package that the configuration does not have.
    """
    if flags.shell_completion:
        from dstune.config.completion import shell_completion

        shell_completion(flags.overrides, verbs or {})
        return 0
    from dstune.config.compose import run_hydra, with_default_experiment
    from dstune.config.hydra_session import ROOT_CONFIG, group_options, program_name, session
    from dstune.config.plugins import activate_requested
    from dstune.config.project import optional_plugins

    topics = _topics(flags.overrides) if flags.help else []
    overrides = with_default_experiment([word for word in flags.overrides if word not in topics])
    with optional_plugins() if flags.help or flags.hydra_help else nullcontext():
        activate_requested(overrides, flags.config_dirs)
    with session(flags.config_dirs) as hydra:
        if flags.help:
            from dstune.config.documentation import index, topic

            groups = group_options(hydra)
            print("\n\n".join(topic(name, groups) for name in topics) if topics else index(groups))
        elif flags.hydra_help:
            from hydra._internal.utils import get_args_parser

            with program_name():
                hydra.hydra_help(ROOT_CONFIG, get_args_parser(), argparse.Namespace(overrides=[]))
        elif info := flags.info:
            run_hydra(hydra, overrides, lambda texts: hydra.show_info(info, ROOT_CONFIG, texts))
        else:
            print(run_hydra(hydra, overrides, lambda texts: _configuration(hydra, texts, flags)), end="")
    return 0


def _topics(words: Sequence[str]) -> list[str]:
    """Return the words that `--help` is asked about: names of groups, choices and keys."""
    settings = (*ROOT_KEYS, "experiment", "hydra")  # overrides of these add groups and keys
    return [word for word in words if word.partition("=")[0].partition(".")[0] not in settings or "=" not in word]


def _configuration(hydra: Hydra, overrides: list[str], flags: Flags) -> str:
    """Return the text that Hydra prints for `--cfg`. Raises UserError for a wrong value, or a package that does not exist."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import Container, OmegaConf

    from dstune.config.compose import compose_dict_config, put_file, refuse_wrong_values

    composed = compose_dict_config(hydra, overrides)
    HydraConfig.instance().set_config(composed)  # for references such as ${hydra:runtime.cwd}
    if flags.cfg != "hydra":
        put_file(hydra, composed, overrides)
        refuse_wrong_values(hydra, composed, overrides)
    OmegaConf.set_readonly(composed.hydra, None)
    selected_config: Any = hydra.get_sanitized_cfg(composed, str(flags.cfg))
    header = ""
    if flags.package and flags.package != "_global_":
        selected_config = _package(selected_config, flags.package)
        header = f"# @package {flags.package}\n"
    if not isinstance(selected_config, Container):
        return f"{selected_config}\n"
    if flags.resolve:
        OmegaConf.resolve(selected_config)
    return header + OmegaConf.to_yaml(selected_config)


def _package(composed: DictConfig, package: str) -> Any:
    from omegaconf import OmegaConf

    missing = object()
    part = OmegaConf.select(composed, package, default=missing)
    if part is missing:
        similar = nearest(package, [*map(str, composed), *all_keys()])
        fix = f"did you mean {similar}?" if similar else f"one of {', '.join(map(str, composed))}"
        raise UserError(Problem("--package", "the configuration has no such part", fix, package))
    return part
