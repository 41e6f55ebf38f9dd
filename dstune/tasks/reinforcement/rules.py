"""Checks the configuration of task=reinforcement."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from dstune.config.convert import format_value
from dstune.config.schema import Automatic, RunConfig
from dstune.core.errors import Problem, UserError
from dstune.protocols import ENVIRONMENTS, REWARDS, method_of, parallelism_of
from dstune.tasks.reinforcement.config import OVERLONG, Correction, PolicyLoss, ReinforcementConfig, Rollout


def check(config: RunConfig, task: ReinforcementConfig) -> Iterator[Problem]:
    yield from _check_rewards(task)
    if task.kl.coefficient:
        method = method_of(config.method)
        if method.adapter and not method.starts_at_base:
            yield Problem(
                "task.kl.coefficient",
                "the reference is the model with its adapter switched off, which is not where training starts from here",
                "a new adapter that starts at the model (method=lora with its default init), or task.kl.coefficient=0",
                format_value(task.kl.coefficient),
            )
        if task.loss is PolicyLoss.rloo:
            yield Problem(
                "task.kl.coefficient",
                "task.loss=rloo has its KL term inside of the reward, which is not computed here",
                "another task.loss, or task.kl.coefficient=0",
                format_value(task.kl.coefficient),
            )
    if task.updates == 1:
        for key in ("clip_low", "clip_high"):
            if (value := getattr(task, key)) is not None:
                reason = "with one update for each rollout every ratio is 1, and nothing is clipped"
                yield Problem(f"task.{key}", reason, "task.updates=2 or more, or leave it out", format_value(value))
    if task.loss is PolicyLoss.cispo and task.clip_low is not None:
        yield Problem(
            "task.clip_low", "task.loss=cispo has no lower bound", "leave it out", format_value(task.clip_low)
        )
    yield from _check_rollout(config, task)
    if config.data.streaming:
        reason = "completions are identified by the number of their prompt, which rows of a stream do not have"
        yield Problem("data.streaming", reason, "data.streaming=false", "true")
    if isinstance(config.trainer.micro_batch_size, Automatic):
        reason = "`auto` measures rows before training, but completions are only generated during training"
        yield Problem("trainer.micro_batch_size", reason, "trainer.micro_batch_size=8, or as many as fit", "auto")
    if (dropout := getattr(config.method, "dropout", 0.0)) > 0:
        reason = "sampling has no dropout, so the sampler would not be the model in training"
        yield Problem("method.dropout", reason, "method.dropout=0", format_value(dropout))
    if task.replay is not None and not Path(task.replay).is_dir():
        reason = "there is no such folder"
        yield Problem("task.replay", reason, "task.replay=RUN/rollouts of a run", format_value(task.replay))


def _check_rollout(config: RunConfig, task: ReinforcementConfig) -> Iterator[Problem]:
    mode, parallel = task.rollout, parallelism_of(config.parallel)
    if mode is not Rollout.exact and task.environment is not None:
        reason = "environments work only with task.rollout=exact, which generates all completions side by side"
        yield Problem("task.rollout", reason, "task.rollout=exact", mode.value)
    if mode is Rollout.fast and parallel.weight_ranks > 1:
        reason = "each rank generates at its own pace, but these ranks share the weights of each layer"
        yield Problem("task.rollout", reason, "task.rollout=exact, or parallel=none", "fast")
    if mode is Rollout.vllm and parallel.size > 1:
        reason = "each rank requests its own completions, but ranks that share rows or layers need the same ones"
        yield Problem("task.rollout", reason, "task.rollout=exact, or parallel=none", "vllm")
    if mode is Rollout.vllm and task.rollout_url is None and task.replay is None:
        yield Problem(
            "task.rollout_url", "task.rollout=vllm needs a server", "task.rollout_url=http://HOST:PORT", "null"
        )
    if task.rollout_url is not None and (reason := _wrong_address(task.rollout_url)):
        yield Problem("task.rollout_url", reason, "http://HOST:PORT")
    if mode is not Rollout.vllm:
        defaults = ReinforcementConfig()
        for key in ("rollout_url", "rollout_folder", "rollout_seconds", "rollout_sleep"):
            if (value := getattr(task, key)) != getattr(defaults, key):
                reason = f"task.rollout={mode.value} does not use a server"
                yield Problem(f"task.{key}", reason, "task.rollout=vllm, or leave it out", format_value(value))
    if task.correction is Correction.mask and task.cap is None:
        reason = "task.rollout=exact does not correct for the sampler"
        yield Problem("task.correction", reason, "task.importance_cap=2, or leave it out", "mask")


def _wrong_address(url: str) -> str:
    """Return what is wrong with the address of a server; empty if nothing is. Does not repeat the address, which may contain a
    password."""
    try:
        parts = urlsplit(url)
        has_place = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        has_place = False
    if not has_place or not url.isprintable() or " " in url:
        return "this is not the address of a server"
    if "@" in parts.netloc:
        return "its user and password would be written to the run's files; set DSTUNE_ROLLOUT_API_KEY instead"
    return "the address has a query or a fragment after its path" if parts.query or parts.fragment else ""


def _check_rewards(task: ReinforcementConfig) -> Iterator[Problem]:
    names = ", ".join(REWARDS)
    for name in task.rewards:
        if name not in REWARDS:
            reason = "there is no such reward"
            yield Problem("task.rewards", reason, f"one of {names}, or plugins=[FILE] that registers it", name)
    if task.environment is not None and task.environment not in ENVIRONMENTS:
        environment_names = ", ".join(ENVIRONMENTS) or "none is registered"
        fix = f"plugins=[FILE] that registers it ({environment_names})"
        yield Problem("task.environment", "there is no such environment", fix, task.environment)
        return
    scorers = task.reward_names
    if task.overlong_tokens > task.max_new_tokens:
        reason = (
            f"it is the last part of a completion, which has at most {task.max_new_tokens} tokens (task.max_new_tokens)"
        )
        fix = f"task.overlong_tokens={max(1, task.max_new_tokens // 4)}"
        yield Problem("task.overlong_tokens", reason, fix, format_value(task.overlong_tokens))
    if task.evaluation_samples == 1 and task.pass_reward != ReinforcementConfig.pass_reward:
        reason = "pass@k is reported only with several completions of each held-out prompt"
        fix = "task.evaluation_samples=8, or leave it out"
        yield Problem("task.pass_reward", reason, fix, format_value(task.pass_reward))
    if set(scorers) <= {OVERLONG}:
        reason = "nothing scores the completions"
        fix = f"task.rewards=[NAME], one or more of {names}, or a plugin's; or task.graders, task.reward_models"
        yield Problem("task.rewards", reason, fix, "[]")
    if len(set(scorers)) < len(task.rewards) + len(task.graders) + len(task.reward_models) + bool(task.overlong_tokens):
        value = format_value([*task.rewards, *task.graders, *task.reward_models])
        yield Problem("task.rewards", "two of them have the same name", "name each once", value)
    if task.reward_weights and len(task.reward_weights) != len(scorers):
        reason = f"there are {len(scorers)} rewards ({', '.join(scorers)})"
        fix = "a factor for each, or leave it out"
        yield Problem("task.reward_weights", reason, fix, format_value(list(task.reward_weights)))
    kinds, problems = _kinds_of_graders(task)
    yield from problems
    if "score_model" in kinds and task.judge is None:
        reason = "a score_model grader asks a model, and no server is given"
        yield Problem("task.judge", reason, "task.judge=http://HOST:PORT, as of dstune serve", "null")
    if task.judge is not None and not task.judge.startswith(("http://", "https://")):
        yield Problem("task.judge", "this is not the address of a server", "http://HOST:PORT", task.judge)
    for address in task.reward_models:
        if address.startswith(("http://", "https://")) and "#" not in address:
            yield Problem("task.reward_models", "the address names no model", f"{address}#MODEL", address)


def check_machine(task: ReinforcementConfig) -> Iterator[Problem]:
    """Check that this machine has the packages of the rewards, and a sandbox if graders or rewards run programs."""
    for name in task.rewards:
        if (package := REWARDS[name].package) and find_spec(package) is None:
            reason = f"this reward needs the package {package.replace('_', '-')}, which is not installed"
            yield Problem("task.rewards", reason, "pip install '.[reinforcement]' in a clone of dstune", name)
    from dstune.grading.sandbox import missing_reason

    is_python = "python" in _kinds_of_graders(task)[0]
    runs_programs = any(REWARDS[name].runs_programs for name in task.rewards)
    if (is_python or runs_programs) and (missing := missing_reason()):
        key = "graders" if is_python else "rewards"
        reason = f"programs run only in a sandbox, which this machine lacks: {missing}"
        fix = "another reward, or a machine (or container) in which users may make namespaces"
        yield Problem(f"task.{key}", reason, fix, format_value(list(getattr(task, key))))


def _kinds_of_graders(task: ReinforcementConfig) -> tuple[set[str], list[Problem]]:
    """Return the types of the graders in `task.graders`, and the problems of their files."""
    if not task.graders:
        return set(), []
    from dstune.grading.grader import kinds_in
    from dstune.tasks.reinforcement.grade import read_grader

    kinds, problems = set[str](), list[Problem]()
    for path in task.graders:
        try:
            kinds |= kinds_in(read_grader(path))
        except UserError as error:
            problems += error.problems
    return kinds, problems
