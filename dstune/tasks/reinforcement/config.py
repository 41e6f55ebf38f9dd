"""The keys of `task=reinforcement`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from dstune.config.fields import setting
from dstune.protocols import ENVIRONMENTS
from dstune.protocols.task import TaskConfig


class PolicyLoss(Enum):
    dapo = "dapo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    gspo = "gspo"
    cispo = "cispo"
    rloo = "rloo"


class RewardScale(Enum):
    auto = "auto"
    group = "group"
    batch = "batch"
    none = "none"


class Rollout(Enum):
    exact = "exact"
    fast = "fast"
    vllm = "vllm"


class Correction(Enum):
    truncate = "truncate"
    mask = "mask"


class KlEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(frozen=True)
class KlConfig:
    coefficient: float = setting(0.0, at_least=0.0)
    """Weight of the divergence from the model that training starts from (TRL: `beta`): the model with its adapter switched off, or
    without an adapter (`method=full`) a copy that stays in memory. 0 computes no reference."""
    estimator: KlEstimator = KlEstimator.k3
    """Of a token's divergence, with d = log p(policy) - log p(reference): `k1` is d, `k2` is d^2 / 2, `k3` is
    exp(-d) - 1 + d (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""


@dataclass(frozen=True)
class ReinforcementConfig(TaskConfig):
    """The model answers prompts, rewards score the answers, and what scored above its group becomes more probable."""

    needs: ClassVar[str] = "task.rewards=[exact_answer]"
    name: str = "reinforcement"
    rewards: list[str] = setting([], example="[exact_answer]")
    """Functions that score a completion: `exact_answer`, `number`, `boxed_answer`, `pattern`, `json_object`, `json_schema`,
    `reasoning_format`, `brevity`, `word_count`, `script`, `code_tests`, or the name of a plugin's `@dstune.reward`. The scores
    are added up."""
    graders: list[str] = setting([], signed=True, example="[grader.json]")
    """JSON files, each with a grader of the fine-tuning API (`string_check`, `text_similarity`, `score_model`, `python`,
    `multi`), whose grades are added to the rewards under the name of the file."""
    reward_models: list[str] = setting([], signed=True)
    """Models whose scores are added to the rewards: a run or export of `task=reward`, a sequence classifier with one output, or
    the address of a server that has one (`http://HOST:PORT#MODEL`)."""
    reward_weights: list[float] = setting([], example="[0.5]")
    """A factor for each of `rewards`, then of `graders`, then of `reward_models`, then for the environment's own reward, and for
    the reward `overlong` of `overlong_tokens` last; 1 for all when not given."""
    reward_seconds: float = setting(60.0, above=0.0)
    """Time limit of one reward for the completions of a micro-batch; a reward that runs programs gets `program_seconds` more for
    every four completions. A reward that takes longer is ended, and its completions do not train."""
    reward_retry_seconds: float = setting(600.0, at_least=0.0)
    """How long a reward is asked again, with growing pauses, if its server is down, too slow, busy or answers 5xx. Then the run
    saves and ends with exit code 1, and can be resumed. 0 does not ask again."""
    max_failed_share: float = setting(1.0, at_least=0.0, at_most=1.0)
    """Largest share of a step's completions that a reward may fail to score. If it fails to score more, or all, the run saves and
    ends. Completions that it scores None because it does not apply do not count."""
    program_seconds: float = setting(10.0, above=0.0)
    """Time limit of one program (a `python` grader, a completion under `code_tests`) or one answer of `judge`."""
    program_memory_gib: float = setting(2.0, above=0.0)
    """Limit of the address space of each process of such a program."""
    judge: str | None = setting(None, signed=True, example="http://localhost:8000")
    """Address of a server with OpenAI's chat completions, which has the models of `score_model` graders (`http://HOST:PORT`);
    the variable `DSTUNE_JUDGE_API_KEY` may hold its key."""
    environment: str | None = setting(None, example="NAME", needs="plugins=[./plugin.py]")
    """The name of a plugin's `@dstune.environment`: its public methods are tools that the model may call, for several turns."""
    turns: int = setting(8, at_least=1)
    """With an environment, the largest number of the model's answers in one completion."""
    environment_seconds: float = setting(60.0, above=0.0)
    """Time limit of a completion's tool calls in one turn. A completion whose environment takes longer ends there and does not
    train."""
    loss: PolicyLoss = PolicyLoss.dapo
    """`dapo` (mean over all tokens of a step; TRL's default too), `grpo` (mean over completions of the mean over tokens),
    `dr_grpo` (divided by completions times `max_new_tokens`), `gspo` (ratio of whole completions, by token mean), `cispo`
    (truncated ratio as a weight), `rloo` (leave-one-out advantages, ratio of whole completions). All means are over the
    global batch, whatever the number of ranks."""
    samples: int = setting(8, at_least=2)
    """Completions of each prompt, which are compared with each other (TRL: `num_generations`). A step has
    `trainer.global_batch_size` prompts."""
    max_new_tokens: int = setting(256, at_least=1)
    """Longest completion, in tokens (TRL: `max_completion_length`)."""
    temperature: float = setting(1.0, above=0.0)
    """Sampling temperature. The loss uses log-probabilities at the same temperature."""
    rollout: Rollout = Rollout.exact
    """`exact` writes the completions of a micro-batch of prompts side by side until the last one has ended: the same bits whenever
    it is repeated on as many ranks. `fast` keeps the batch full, a new completion in the place of one that has ended; the
    sampler is then a little further from the training forward pass, and `importance_cap` corrects the loss for it. `vllm` lets the
    server at `rollout_url` write them, with the weights that are about to train; evaluations stay in this process."""
    rollout_url: str | None = setting(None, signed=True, example="http://localhost:8000", needs="task.rollout=vllm")
    """Address of a vLLM server (`http://HOST:PORT`) for `rollout=vllm`; the variable `DSTUNE_ROLLOUT_API_KEY` may hold its key."""
    rollout_folder: str | None = setting(
        None, signed=True, example="FOLDER", needs="task.rollout=vllm task.rollout_url=http://localhost:8000"
    )
    """Where the server reads adapters or weights, under the same path on both machines, in a folder of this run; `sampler` of the
    run directory when not given."""
    rollout_seconds: float = setting(600.0, above=0.0)
    """Time limit of a server's answer, over all attempts. If it is exceeded, the run saves and ends with exit code 75, and can be
    resumed."""
    rollout_sleep: bool = False
    """Whether the server sleeps while this run trains, so that both have room on the same GPU (`vllm serve
    --enable-sleep-mode`)."""
    importance_cap: float | None = setting(None, above=0.0, example="2", needs="task.rollout=fast")
    """Weight each token by its probability under the model in training over that under the sampler, at most this (truncated
    importance sampling). When not given, 2 with `rollout=fast` and `vllm`; with `exact` tokens are not weighted."""
    correction: Correction = Correction.truncate
    """Weight of tokens whose ratio is above `importance_cap`: `truncate` gives them the cap, `mask` gives 0 to them and to tokens
    whose ratio is below 1 / `importance_cap`."""
    updates: int = setting(1, at_least=1)
    """Optimizer updates with the completions of one step (TRL: `num_iterations`). With 1, ratios are 1 and nothing is clipped."""
    clip_low: float | None = setting(None, at_least=0.0, example="0.2", needs="task.updates=2")
    """Clip ratios at 1 minus this (TRL: `epsilon`); 0.2 when not given, with `gspo` 3e-4. `cispo` has no lower bound."""
    clip_high: float | None = setting(None, at_least=0.0, example="0.28", needs="task.updates=2")
    """Clip ratios at 1 plus this (TRL: `epsilon_high`); `clip_low` when not given, with `dapo` 0.28, with `gspo` 4e-4. With
    `cispo` the largest ratio itself, 5."""
    scale_rewards: RewardScale = RewardScale.auto
    """Standard deviation that advantages are divided by: of the `group` (the completions of a prompt), of the `batch` (all
    completions of a step), or `none`. `auto` is `none` with `dr_grpo` and `rloo`, as they are defined, and else `group`."""
    kl: KlConfig = field(default_factory=KlConfig)
    redraws: int = setting(0, at_least=0, example="4")
    """Prompts whose completions all get the same reward teach nothing. At most this many times a step, they are replaced with other
    prompts of the training data, which are answered and scored (DAPO's dynamic sampling). Those that remain then train as they
    are. 0 replaces none."""
    overlong_tokens: int = setting(0, at_least=0, example="64")
    """Length of the last part of `max_new_tokens` in which the reward `overlong` falls from 0 to -1 (DAPO's soft overlong
    punishment). 0 for no such reward."""
    mask_truncated: bool = False
    """Whether completions that did not end within `max_new_tokens` are left out of the loss (their rewards still count in
    their group)."""
    evaluation_samples: int = setting(1, at_least=1, example="8")
    """Completions of each held-out prompt in an evaluation. With more than one, it reports `pass@k` with its interval."""
    pass_reward: float = setting(1.0, example="0.5", needs="task.evaluation_samples=8")
    """The reward from which a completion counts as right in `pass@k`; `overlong` does not count."""
    replay: str | None = setting(None, example="RUN/rollouts")
    """The folder `rollouts` of another run. Each step trains on that run's completions and rewards instead of new ones."""
    template_date: str | None = setting(None, example="2026-01-31")
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far ratios may be below and above 1; for `cispo`, the second number is the largest ratio itself."""
        low, high = DEFAULT_CLIP.get(self.loss, (0.2, 0.2))
        if self.clip_low is not None:
            low = self.clip_low
            high = high if self.loss is PolicyLoss.cispo else low
        return low, high if self.clip_high is None else self.clip_high

    @property
    def cap(self) -> float | None:
        """The largest weight of a token; None if tokens are not weighted."""
        if self.importance_cap is None and self.rollout is not Rollout.exact:
            return DEFAULT_CAP
        return self.importance_cap

    @property
    def scale(self) -> RewardScale:
        """`scale_rewards` with `auto` resolved by the loss."""
        if self.scale_rewards is not RewardScale.auto:
            return self.scale_rewards
        return RewardScale.none if self.loss in (PolicyLoss.dr_grpo, PolicyLoss.rloo) else RewardScale.group

    @property
    def grader_files(self) -> dict[str, str]:
        """The files of `graders` by their names."""
        return {Path(file).stem: file for file in self.graders}

    @property
    def model_paths(self) -> dict[str, str]:
        """`reward_models` by their names."""
        return {(path.partition("#")[2] or Path(path).name): path for path in self.reward_models}

    @property
    def reward_names(self) -> list[str]:
        """Names of everything that scores a completion, in the order of `weights`."""
        names = [*self.rewards, *self.grader_files, *self.model_paths]
        if self.environment is not None and hasattr(ENVIRONMENTS[self.environment], "get_reward"):
            names.append(self.environment)
        return [*names, OVERLONG] if self.overlong_tokens else names

    @property
    def weights(self) -> list[float]:
        """A factor for each of `reward_names`."""
        return list(self.reward_weights) or [1.0] * len(self.reward_names)

    @property
    def weights_of_content(self) -> list[float]:
        """The same, without what only measures the length: 0 for `overlong`."""
        names = zip(self.reward_names, self.weights, strict=True)
        return [0.0 if self.overlong_tokens and name == OVERLONG else weight for name, weight in names]


OVERLONG = "overlong"
"""Name of the reward that `overlong_tokens` adds."""
DEFAULT_CAP = 2.0
"""The default of verl (`rollout_is_threshold`); TRL truncates at 3."""
DEFAULT_CLIP = {
    PolicyLoss.dapo: (0.2, 0.28),  # Yu et al. 2025, arXiv:2503.14476
    PolicyLoss.gspo: (3e-4, 4e-4),  # Zheng et al. 2025, arXiv:2507.18071
    PolicyLoss.cispo: (0.0, 5.0),  # MiniMax-M1, arXiv:2506.13585, as TRL has it
}
"""Defaults of `clip` by loss; the others have 0.2 on both sides."""
