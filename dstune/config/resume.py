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
"""Prefixes of keys that a continued run may change: they decide where it runs and what it writes, not what it computes."""

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
    "task.judge",
    "task.max_failed_share",
    "task.reward_retry_seconds",
    "task.reward_seconds",
    "task.rollout_seconds",
    "task.rollout_url",
)
"""Further keys that a continued run may change."""
LENGTHS = ("trainer.max_steps", "trainer.epochs")
"""Keys whose values may increase."""


ANEW = (
    "start a new run from its weights (another run.dir with model.path=RUN/export, or for adapters method.adapter=RUN)"
)
"""How to continue training with a value that may not change within a run."""


def continue_run(old: Composed, new: Composed) -> RunConfig:
    """Return the configuration with which `new` continues the run of `old`.

    Values that the command does not set, or sets as it did at the start, come from the run. So no existing run changes if a default
    has changed since, and a run keeps what its first start filled in (a template's date, the commit of a branch).

    Raises:
        UserError: keys that would change the run's trajectory differ (`check_resume`).
    """
    tree = _from_stored(to_dict(old.config), to_dict(new.config), "", _newly_given(old, new))
    config = from_dict(tree, "the composed configuration")
    check_resume(old.config, config)
    return config


def kept_origins(stored: Composed, config: RunConfig) -> dict[str, str]:
    """Return the origins of the values that stay the same when a run continues as `config`."""

    def same(key: str) -> bool:
        value = attrgetter(key)
        try:
            return bool(value(config) == value(stored.config))
        except AttributeError:  # a key of another choice
            return False

    # A run.yaml from somebody else may have any text as a key.
    return {key: origin for key, origin in stored.origins.items() if key in all_keys() and same(key)}


OF_THIS_COMMAND = ("run.dir", "run.resume", "run.force")
"""Keys that are never taken from the stored run: they only concern one command."""


def _from_stored(
    stored: dict[str, Any], composed: dict[str, Any], prefix: str, is_given: Callable[[str], bool]
) -> dict[str, Any]:
    """Return `composed` with the stored value of every key that the command does not set."""
    result = dict(composed)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        new_value: Any = composed.get(name)
        if key in CHOICES and value["name"] != new_value["name"]:
            if not is_given(key):  # chosen when the run began
                new_leaves = {
                    leaf: new_value[leaf] for leaf in new_value if leaf in value and is_given(f"{key}.{leaf}")
                }
                result[name] = value | new_leaves
        elif isinstance(value, dict) and isinstance(new_value, dict) and key not in all_keys():
            result[name] = _from_stored(value, new_value, f"{key}.", is_given)
        elif name in composed and key not in OF_THIS_COMMAND and not is_given(key):
            result[name] = value
    return result


def _newly_given(old: Composed, new: Composed) -> Callable[[str], bool]:
    """Return a function that says whether a key, or the choice of a group, is given now: by an override of `new` that `old` did not
    have, or by one of the user's own files."""
    new_keys = {key for text in new.overrides if (key := user_overrides.key_of(text)) and text not in old.overrides}
    new_sections = tuple(f"{key}." for key in new_keys)
    has_new_experiment = "experiment" in new_keys
    with session(new.config_dirs) as hydra:
        keys_of_files = keys_of_own_files(hydra, new.overrides)

    def is_given(key: str) -> bool:
        if has_new_experiment or key in new_keys or key.startswith(new_sections) or key in keys_of_files:
            return True
        return key in all_keys() and any(name.startswith(f"{key}.") for name in new_keys)  # data.columns.text=a

    return is_given


def check_resume(old: RunConfig, new: RunConfig) -> None:
    """Check that a run that began as `old` may continue as `new`.

    The keys of MAY_CHANGE and MAY_CHANGE_KEYS may differ, and the run may become longer. Any other difference would change the
    trajectory, so it is refused.

    Raises:
        UserError: every key that may not change, with the old value as fix.
    """
    old_values, new_values = (dict(dotted(to_dict(config), all_keys())) for config in (old, new))
    problems = []
    for section in ("task", "method", "optimizer", "schedule"):
        old_name, new_name = old_values[f"{section}.name"], new_values[f"{section}.name"]
        if old_name != new_name:
            reason = f"the run began with {old_name}"
            problems.append(Problem(section, reason, f"{section}={old_name}", format_value(new_name)))
    changed_groups = tuple(f"{problem.where}." for problem in problems)
    for key in [*old_values, *(key for key in new_values if key not in old_values)]:
        old_value, new_value = old_values.get(key), new_values.get(key)
        may_differ = key.startswith((*MAY_CHANGE, *changed_groups)) or key in MAY_CHANGE_KEYS or key in LENGTHS
        if old_value == new_value or may_differ:
            continue
        if key == "model.path" and new_value == f"./{old_value}" and old.model.revision is None:
            continue  # the same folder, written so that it cannot be a hub id
        reason = f"the run began with {format_value(old_value)}, and another value would change its course"
        problems.append(Problem(key, reason, f"{key}={format_value(old_value)}, or {ANEW}", format_value(new_value)))
    problems += _length_problems(old.trainer, new.trainer)
    if problems:
        raise UserError(problems)


def _length_problems(old: TrainerConfig, new: TrainerConfig) -> Iterator[Problem]:
    """Yield problems with the length: a run may only become longer, in the unit in which its length was given."""
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
