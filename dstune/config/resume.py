"""Decides with which configuration a run continues, and which settings may differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from dstune.config import overrides as user_overrides
from dstune.config.convert import dotted, format_value, from_dict, to_dict
from dstune.config.hydra_session import session
from dstune.config.names import all_keys
from dstune.config.run_file import Composed
from dstune.config.schema import CHOICES, RunConfig, TrainerConfig
from dstune.config.zero_file import keys_of_own_files
from dstune.core.errors import Problem, UserError

MAY_CHANGE = (
    "launch.",
    "tracking.",
    "checkpoint.",
    "evaluate.",
    "run.",
    "zero.",
    "parallel.",
    "trainer.spike.",
    "sweep.",
)
"""Sections that a continued run may change: they decide where it runs and what it writes, not what it computes."""

MAY_CHANGE_KEYS = (
    "data.workers",
    "trainer.activation_checkpointing",
    "trainer.mlp_tiles",
    "trainer.max_nonfinite_steps",
    "trainer.profile_steps",
    "trainer.stall_seconds",
    "trainer.early_stopping.patience",
    "trainer.early_stopping.max_gap",
    "model.trust_remote_code",
)
LENGTHS = ("trainer.max_steps", "trainer.epochs")
"""Keys whose values may increase."""


ANEW = "begin a new run from its weights (another run.dir with model.path=RUN/export; of adapters method.adapter=RUN)"
"""What lets a run go on with what may not change within it."""


def continue_run(old: Composed, new: Composed) -> RunConfig:
    """Return the configuration with which `new` continues the run of `old`.

    What the command does not say now, or says as it did then, comes from the run: a default that has changed since, or what
    the first start filled in (a template's date, the commit of a branch), changes no existing run.

    Raises:
        UserError: keys that change the trajectory differ (`check_resume`).
    """
    tree = _from_stored(to_dict(old.config), to_dict(new.config), "", _newly_given(old, new))
    config = from_dict(tree, "the composed configuration")
    check_resume(old.config, config)
    return config


def kept_origins(stored: Composed, config: RunConfig) -> dict[str, str]:
    """Return where the values come from that a run which goes on as `config` has not changed."""

    def same(key: str) -> bool:
        value = attrgetter(key)
        try:
            return bool(value(config) == value(stored.config))
        except AttributeError:  # a key of another choice
            return False

    # Keys of a stranger's run.yaml may be any text.
    return {key: origin for key, origin in stored.origins.items() if key in all_keys() and same(key)}


OF_THIS_COMMAND = ("run.dir", "run.resume", "run.force")
"""Keys whose defaults mean something else than what the run began with."""


def _from_stored(
    stored: dict[str, Any], composed: dict[str, Any], prefix: str, given: Callable[[str], bool]
) -> dict[str, Any]:
    """Return `composed` with the stored value of every key that the command does not set."""
    result = dict(composed)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        now: Any = composed.get(name)
        if key in CHOICES and value["name"] != now["name"]:
            if not given(key):  # chosen when the run began
                result[name] = value | {leaf: now[leaf] for leaf in now if leaf in value and given(f"{key}.{leaf}")}
        elif isinstance(value, dict) and isinstance(now, dict) and key not in all_keys():
            result[name] = _from_stored(value, now, f"{key}.", given)
        elif name in composed and key not in OF_THIS_COMMAND and not given(key):
            result[name] = value
    return result


def _newly_given(old: Composed, new: Composed) -> Callable[[str], bool]:
    """Return a function that tells whether a key, or the choice of a group, is given by the command of `new` otherwise than by that
    of `old`, or by one of the user's own files."""
    new_overrides = {
        key: text for text in new.overrides if (key := user_overrides.key_of(text)) and text not in old.overrides
    }
    sections_given = tuple(f"{key}." for key in new_overrides)
    everything = "experiment" in new_overrides
    with session(new.config_dirs) as hydra:
        keys_of_files = keys_of_own_files(hydra, new.overrides)

    def given(key: str) -> bool:
        inside = any(name.startswith(f"{key}.") for name in new_overrides) and key in all_keys()  # data.columns.text=a
        return everything or key in new_overrides or key.startswith(sections_given) or inside or key in keys_of_files

    return given


def check_resume(old: RunConfig, new: RunConfig) -> None:
    """Check that a run that `old` began may go on as `new`.

    Launch, ZeRO, tracking, run, checkpoint and evaluation settings may change, and the run may become longer.
    Everything else would change the trajectory, so it has to be equal.

    Raises:
        UserError: every key that may not change, with the old value as fix.
    """
    value_before, after = (dict(dotted(to_dict(config), all_keys())) for config in (old, new))
    problems = []
    for section in ("task", "method", "optimizer", "schedule"):
        key = f"{section}.name"
        if value_before[key] != after[key]:
            problems.append(
                Problem(
                    section,
                    f"the run began with {value_before[key]}",
                    f"{section}={value_before[key]}",
                    format_value(after[key]),
                )
            )
    changed_groups = tuple(f"{problem.where}." for problem in problems)
    for key in [*value_before, *(key for key in after if key not in value_before)]:
        then, now = value_before.get(key), after.get(key)
        free = key.startswith(MAY_CHANGE)
        if then == now or free or key in MAY_CHANGE_KEYS or key.startswith(changed_groups):
            continue
        if key in LENGTHS or (key == "model.path" and now == f"./{then}" and old.model.revision is None):
            continue  # a folder, named so that it cannot be a hub id
        reason = f"the run began with {format_value(then)}, and another value would change its course"
        problems.append(Problem(key, reason, f"{key}={format_value(then)}, or {ANEW}", format_value(now)))
    problems += _length_problems(old.trainer, new.trainer)
    if problems:
        raise UserError(problems)


def _length_problems(old: TrainerConfig, new: TrainerConfig) -> Iterator[Problem]:
    """Yield problems with the length: a run may become longer in the unit that its length was given in."""
    if old.max_steps is None:
        longer = f"trainer.epochs={2 * old.epochs} would double it"
        if new.max_steps is not None:
            reason = f"the run's length was given in passes over the rows (trainer.epochs={old.epochs})"
            yield Problem("trainer.max_steps", reason, f"leave it out; {longer}", format_value(new.max_steps))
        elif new.epochs < old.epochs:
            reason = f"a run can become longer, not shorter than {old.epochs}"
            yield Problem("trainer.epochs", reason, f"trainer.epochs={old.epochs}", format_value(new.epochs))
        return
    longer = f"trainer.max_steps={2 * old.max_steps} would double it"
    if new.max_steps is None:
        reason = f"the run's length was given in optimizer steps (trainer.max_steps={old.max_steps})"
        yield Problem("trainer.max_steps", reason, f"trainer.max_steps={old.max_steps}; {longer}", "null")
    elif new.max_steps < old.max_steps:
        reason = f"a run can become longer, not shorter than {old.max_steps}"
        yield Problem("trainer.max_steps", reason, f"trainer.max_steps={old.max_steps}", format_value(new.max_steps))
    elif new.epochs > old.epochs:
        reason = f"the run's length was given in optimizer steps (trainer.max_steps={old.max_steps}), not in epochs"
        yield Problem("trainer.epochs", reason, f"leave it out; {longer}", format_value(new.epochs))
