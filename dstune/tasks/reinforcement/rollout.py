"""Make the completions of a step: sample them with the current weights, score them, compute advantages, build micro-batches, and
record them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.batches import batch_of
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.generation.answers import end_tokens
from dstune.generation.batch import below_adapters
from dstune.generation.cache import layer_kinds
from dstune.generation.completions import Completion, sample_completions, sample_continuously
from dstune.models.heads import on_device
from dstune.protocols import method_of
from dstune.tasks.reinforcement.batches import TrainedCompletion, completion_batch, shared_batch
from dstune.tasks.reinforcement.config import ReinforcementConfig, Rollout
from dstune.tasks.reinforcement.head import PolicyHead, kept_log_probabilities
from dstune.tasks.reinforcement.losses import advantages_of, denominator
from dstune.tasks.reinforcement.metrics import LOGGED, reward_of, rollout_sums
from dstune.tasks.reinforcement.recorded import recorded_step, replayed, written_step
from dstune.tasks.reinforcement.records import (
    FOLDER,
    Scored,
    identity_of,
    pack_scored,
    place_of,
    unpack_scored,
    write_records,
)
from dstune.tasks.reinforcement.redraws import Candidates, Prompts, Replaced, redraw
from dstune.tasks.reinforcement.sampler_check import allowed, examine, is_allowed, looks_like, problem_of
from dstune.tasks.reinforcement.scoring import Scorer
from dstune.tasks.reinforcement.served_sampler import ServedSampler
from dstune.tasks.reinforcement.turns import Environments
from dstune.trainer.generation import speaking
from dstune.trainer.prefetcher import RankBatch
from dstune.trainer.rollouts import RolloutRun, RolloutsFailed, RolloutStep, batches_of_answers
from dstune.zero.engine import Engine

SEED_OF_EVALUATION = 2**40
"""Used in place of a step number: every evaluation samples with the same noise, which training never uses."""


class Rollouts:
    """Samples and scores the completions of each step, on all ranks together. See `trainer.rollouts`."""

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        engine: Engine,
        head: PolicyHead,
        tokenizer: Any,
        world: World,
        run_dir: Path | None,
        stops: Sequence[int],
    ):
        """run_dir: where completions are recorded; None for an evaluation."""
        assert isinstance(config.task, ReinforcementConfig)
        self._config, self._task, self._split = config, config.task, split
        self._engine, self._head, self._tokenizer, self._world = engine, head, tokenizer, world
        self._run_dir = run_dir
        self._ends = frozenset(end_tokens(below_adapters(engine.module), stops))
        self._scorer = Scorer(config, split)
        self._environments = None
        if self._task.environment is not None:
            self._environments = Environments(self._task, tokenizer, self._scorer, config.data.max_length, self._ends)
        self._server = None
        if self._task.rollout is Rollout.vllm and run_dir is not None and self._task.replay is None:
            self._server = ServedSampler(self._task, engine, world, run_dir, self._ends)
        self._sums: dict[str, float] = {}
        self._shares_prompts = False
        if run_dir is not None and not method_of(config.method).in_front:
            engine.train(False)
            self._shares_prompts = head.share_prompts(engine.forward, engine.device, world)
            engine.train(True)

    @property
    def updates(self) -> int:
        return self._task.updates

    def begin_step(self, run: RolloutRun, step: RolloutStep) -> RankBatch:
        """Return the completions of a step's prompts as the micro-batches to train on."""
        prompts = [(part, batch) for part, batch in step.batch.batches]
        parts = [part for part, _ in prompts]
        recorded = recorded_step(self._task, self._world, step.number)
        complete: Callable[[Sequence[Prompts]], list[list[Scored]]]
        if recorded is None:
            complete = self._sampling(run, step)
        else:
            complete = partial(replayed, self._task, self._world, recorded=recorded)
        local_completions = complete(prompts)
        replaced = self._redraw(step.number, parts, local_completions, complete)
        if recorded is None and self._server is not None:
            self._server.rest()
        groups = self._with_advantages(local_completions, parts)
        everything = [*groups, *self._gathered_replaced(replaced)]
        completions = [scored for group in everything for scored in group]
        if recorded is None:
            self._refuse_failed(completions, is_first=not step.number_in_launch)
        if recorded is None and self._run_dir is not None and self._world.is_main:
            numbers = {scored.completion.prompt for scored in completions}
            questions = {number: self._scorer.question_of(number) for number in numbers}
            write_records(self._run_dir / FOLDER, step.number, completions, self._task.reward_names, questions)
        self._head.largest_difference = 0.0
        logged = self._logged()
        sums = rollout_sums(self._task, everything) | logged
        self._sums = sums if self._world.is_main else dict.fromkeys(sums, 0.0)
        trained = self._training_batch(local_completions, step.batch, groups)
        self._scorer.forget_rows()
        return trained

    def _sampling(self, run: RolloutRun, step: RolloutStep) -> Callable[[Sequence[Prompts]], list[list[Scored]]]:
        """Return a function that samples and scores the completions of prompts in this step, a list for each micro-batch."""
        state = {"global_step": step.number - 1, "max_steps": run.total_steps, "epoch": step.epoch}
        written = written_step(self._task, self._world, self._run_dir, step.number)
        if self._server is not None:
            with run.around("generating"):
                self._server.publish()

        def complete(prompts: Sequence[Prompts]) -> list[list[Scored]]:
            completed: list[list[Scored]] = []
            # Environments live until the next ones start, so each batch is scored before the next one is generated.
            for batches in [[part] for part in prompts] if self._environments else [prompts]:
                with run.around("generating"):
                    new = self._write(batches, step.number, written)
                with run.around("scoring"):
                    self._scorer.score(new, written, state)
                    self._refuse_outage()
                completed += new
            return completed

        return complete

    def _redraw(
        self,
        step: int,
        parts: Sequence[MicroBatch],
        completed: list[list[Scored]],
        complete: Callable[[Sequence[Prompts]], list[list[Scored]]],
    ) -> list[Replaced]:
        """Replace groups without signal in `completed`; see `redraws.redraw`."""
        for batch in completed:
            for scored in batch:
                scored.replaced = False  # of a replay
        if not self._task.redraws:
            return []
        config, split = self._config, self._split

        def complete_parts(redrawn: Sequence[MicroBatch]) -> list[list[Scored]]:
            pad = self._tokenizer.pad_token_id
            return complete([(part, batch_of(config, split, part, pad)) for part in redrawn])

        keys = config.trainer.seed, step
        candidates = partial(Candidates, keys, len(split.lengths))
        return redraw(self._task, self._world, parts, completed, candidates, complete_parts)

    def _gathered_replaced(self, replaced: Sequence[Replaced]) -> list[list[Scored]]:
        """Return the replaced groups of all ranks, in the order of their rounds and places."""
        if not self._task.redraws:
            return []
        packed: list[Any] = [
            [item.round, item.place, [pack_scored(scored) for scored in item.group]] for item in replaced
        ]
        everyone = [row for of_rank in self._world.gather_groups(packed) for row in of_rank]
        everyone.sort(key=lambda row: row[:2])
        groups = [[unpack_scored(scored) for scored in group] for _, _, group in everyone]
        for scored in (scored for group in groups for scored in group):
            reward = reward_of(scored, self._task.weights)
            scored.reward = None if math.isnan(reward) else reward
        return groups

    def _logged(self) -> dict[str, float]:
        """Return the mean, by name, of the metrics that rewards logged in this step on any rank; the same on all ranks."""
        completions = self._world.gather(self._scorer.logged)
        self._scorer.logged = {}
        names = sorted({name for of_rank in completions for name in of_rank})
        values = {name: [value for of_rank in completions for value in of_rank.get(name, ())] for name in names}
        return {f"{LOGGED}{name}": sum(numbers) / len(numbers) for name, numbers in values.items()}

    @contextmanager
    def several_updates(self) -> Iterator[Callable[[int], Sequence[Mapping[str, torch.Tensor]]]]:
        """Yield a function that gives the micro-batches of an update, by its number, the log-probabilities of their tokens at the
        first update; nothing for the first update itself."""
        if self.updates == 1:
            yield lambda number: ()
            return
        with kept_log_probabilities(self._head) as old_logps:
            yield lambda number: [{"old": logps} for logps in old_logps] if number else ()

    def end_step(self, step: RolloutStep, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of the rollout, to be added to those of this rank's head (`sums`).

        Raises:
            UserError: the sampler's log-probabilities differ from the trained model's, averaged over all ranks or in a token of any
                rank. Raised on all ranks.
        """
        names = ("difference", "absolute_difference", "compared")
        compared = self._world.gather_numbers([*(sums[name] for name in names), self._head.largest_difference])
        signed, absolute, count = compared[:, :3].sum(axis=0).tolist()
        largest = float(compared[:, 3].max())
        if self._task.replay is None and count:
            self._refuse_different(step, signed / count, absolute / count, largest)
        return self._sums | {"largest_difference": largest if self._world.is_main else 0.0}

    def close(self) -> None:
        self._scorer.close()

    def _write(
        self,
        prompts: Sequence[tuple[MicroBatch, Mapping[str, torch.Tensor]]],
        step: int,
        written: Mapping[str, Scored],
    ) -> list[list[Scored]]:
        """Generate this rank's completions for training: with the server if there is one, otherwise with `complete`.

        written: completions of this step from an earlier launch. A server would not generate the same ones again, so those of the
        same weights are reused.
        """
        if self._server is None:
            return self.complete(prompts, step)
        version = self._server.version
        completed = {
            place_of(scored.completion): scored.completion
            for scored in written.values()
            if scored.completion.version == version
        }
        samples = self._task.samples
        numbers = dict.fromkeys(number for _, batch in prompts for number in batch["sample"].tolist())
        missing = [n for n in numbers if any(f"{n}/{sample}" not in completed for sample in range(samples))]
        numbered_prompts = [(number, self._split.sample(number)["input_ids"].tolist()) for number in missing]
        for completion in self._server.complete(numbered_prompts, samples, (self._config.trainer.seed, step)):
            completed[place_of(completion)] = completion
        return [
            [
                Scored(completion, self._tokenizer.decode(completion.ids, skip_special_tokens=True))
                for number in batch["sample"].tolist()
                for completion in (completed[f"{number}/{sample}"] for sample in range(samples))
            ]
            for _, batch in prompts
        ]

    def complete(
        self, prompts: Sequence[tuple[MicroBatch, Mapping[str, torch.Tensor]]], step: int, samples: int | None = None
    ) -> list[list[Scored]]:
        """Generate this rank's completions, a list for each micro-batch of prompts (`encode.prompt_batch`)."""
        task, world, by_batch = self._task, self._world, []
        keys = self._config.trainer.seed, step
        with speaking(self._engine, world) as (module, in_step):
            if task.rollout is Rollout.fast:
                return self._complete_continuously(module, prompts, keys, samples or task.samples, in_step=in_step)
            for _, batch in prompts:
                if self._environments is not None:
                    numbers = batch["sample"].tolist()
                    count = samples or task.samples
                    by_batch.append(self._environments.complete(module, numbers, count, keys, world, in_step=in_step))
                    continue
                completions = sample_completions(
                    module,
                    batch["input_ids"].to(self._engine.device),
                    batch["attention_mask"].to(self._engine.device),
                    batch["sample"].tolist(),
                    samples=samples or task.samples,
                    max_new_tokens=task.max_new_tokens,
                    temperature=task.temperature,
                    ends=self._ends,
                    padding=self._tokenizer.pad_token_id,
                    keys=keys,
                    goes_on=world.any if in_step else bool,
                )
                by_batch.append(
                    [
                        Scored(completion, self._tokenizer.decode(completion.ids, skip_special_tokens=True))
                        for completion in completions
                    ]
                )
        return by_batch

    def _complete_continuously(
        self,
        module: nn.Module,
        prompts: Sequence[tuple[MicroBatch, Mapping[str, torch.Tensor]]],
        keys: tuple[int, int],
        samples: int,
        *,
        in_step: bool,
    ) -> list[list[Scored]]:
        """Do the same as `complete` in a batch that is kept full. Raises UserError on all ranks if they have to compute in step."""
        if in_step:
            reason = "each rank writes at its own pace, and the whole weights have no room on every rank"
            raise UserError(Problem("task.rollout", reason, "task.rollout=exact", "fast"))
        if (kinds := layer_kinds(module)) != {"DynamicLayer"}:
            reason = f"the model keeps more than keys and values of all tokens ({', '.join(sorted(kinds))}), which are not cut here"
            raise UserError(Problem("task.rollout", reason, "task.rollout=exact", "fast"))
        tokens = {
            number: self._split.sample(number)["input_ids"].tolist()
            for _, batch in prompts
            for number in batch["sample"].tolist()
        }
        most = max((len(batch["sample"]) for _, batch in prompts), default=1) * samples
        completions = sample_continuously(
            module,
            list(tokens.items()),
            samples=samples,
            rows=most,
            max_new_tokens=self._task.max_new_tokens,
            temperature=self._task.temperature,
            ends=self._ends,
            padding=self._tokenizer.pad_token_id,
            keys=keys,
            device=self._engine.device,
        )
        texts = {
            place_of(written): self._tokenizer.decode(written.ids, skip_special_tokens=True) for written in completions
        }
        by_prompt: dict[int, list[Completion]] = {}
        for completion in completions:
            by_prompt.setdefault(completion.prompt, []).append(completion)
        return [
            [
                Scored(written, texts[place_of(written)])
                for number in batch["sample"].tolist()
                for written in by_prompt[number]
            ]
            for _, batch in prompts
        ]

    def score(self, completed: Sequence[Sequence[Scored]], state: Mapping[str, Any]) -> None:
        """Score completions with the rewards. state: the values of `trainer_state` in TRL's functions."""
        self._scorer.score(completed, {}, state)
        self._scorer.forget_rows()

    def _with_advantages(
        self, local_completions: Sequence[Sequence[Scored]], parts: Sequence[MicroBatch]
    ) -> list[list[Scored]]:
        """Return all completions of the step on every rank, in the order of its prompts and a list for each; set the advantages of
        `local_completions`."""
        task, world, samples = self._task, self._world, self._task.samples
        counted = [
            [pack_scored(scored) for scored in batch] if not part.filler else []
            for part, batch in zip(parts, local_completions, strict=True)
        ]
        everyone = world.gather_groups(counted) if world.size > 1 else [counted]
        ordered = [
            unpack_scored(packed)
            for position in range(len(counted))
            for of_rank in everyone
            for packed in of_rank[position]
        ]
        rewards = torch.tensor([reward_of(scored, task.weights) for scored in ordered], dtype=torch.float64)
        advantages = advantages_of(task, rewards.view(-1, samples)).flatten().tolist()
        advantage_by_id = {}
        for scored, reward, advantage in zip(ordered, rewards.tolist(), advantages, strict=True):
            scored.reward, scored.advantage = None if math.isnan(reward) else reward, advantage
            advantage_by_id[identity_of(scored.completion)] = advantage
        for batch in local_completions:
            for scored in batch:
                scored.advantage = advantage_by_id.get(identity_of(scored.completion), 0.0)
        return [ordered[start : start + samples] for start in range(0, len(ordered), samples)]

    def _refuse_outage(self) -> None:
        """Raise RolloutsFailed on all ranks if a reward of any rank was unavailable for too long."""
        outages = [outage for outage in self._world.gather(self._scorer.patience.outage) if outage]
        if outages:
            seconds = self._task.reward_retry_seconds
            raise RolloutsFailed(
                f"a reward was unavailable for {seconds:g} s (task.reward_retry_seconds): {outages[0]}"
            )

    def _refuse_failed(self, completions: Sequence[Scored], *, is_first: bool) -> None:
        """Refuse a step of which a reward failed to score more than `task.max_failed_share`, or which no reward scored.

        completions: all of the step. is_first: whether the launch has not trained yet, so that nothing is to be saved.

        Raises:
            RolloutsFailed, or UserError if `is_first`. Raised on all ranks.
        """
        count, most = len(completions), self._task.max_failed_share
        for name in self._task.reward_names:
            reasons = [scored.failures[name] for scored in completions if name in scored.failures]
            share = len(reasons) / max(1, count)
            if not reasons or (share <= most and share < 1):
                continue
            if len(reasons) == count:
                reason = f"the reward {name!r} could score no completion: {reasons[0]}"
            else:
                reason = f"the reward {name!r} failed to score {len(reasons)} of {count} completions: {reasons[0]}"
            if not is_first:
                raise RolloutsFailed(reason)
            raise UserError(Problem("task.rewards", reason, f"check the reward and {self._required(name)}", name))
        if count and is_first and all(score is None for scored in completions for score in scored.scores):
            names = ", ".join(self._task.reward_names)
            reason = "the rewards scored no completion of the first step: each returned None"
            raise UserError(Problem("task.rewards", reason, "a reward that applies to these rows", names))

    def _required(self, name: str) -> str:
        from dstune.protocols import REWARDS

        columns = REWARDS[name].columns if name in REWARDS else ()
        return f"the columns of the rows, which need {', '.join(columns)}" if columns else "its process"

    def _training_batch(
        self, local_completions: Sequence[Sequence[Scored]], batch: RankBatch, groups: Sequence[Sequence[Scored]]
    ) -> RankBatch:
        """Return micro-batches of `trainer.micro_batch_size` completions; the same number on every rank."""
        answered = [(part, scored) for (part, _), scored in zip(batch.batches, local_completions, strict=True)]
        batches = batches_of_answers(answered, self._config.trainer.rows, self._world, self._tensors)
        trained = [self._trained(scored) for group in groups for scored in group]
        weight = denominator(self._task, [length for length in trained if length]) or 1.0
        tokens = sum(self._prompt_length(scored) + len(scored.completion.ids) for group in groups for scored in group)
        return RankBatch(weight, tokens, batch.epoch, batches)

    def _prompt_length(self, scored: Scored) -> int:
        completion = scored.completion
        return len(completion.prompt_ids) if completion.prompt_ids else int(self._split.lengths[completion.prompt])

    def _trained(self, scored: Scored) -> int:
        """Return the number of tokens of a completion that are trained."""
        completion = scored.completion
        is_left_out = self._task.mask_truncated and not completion.ended
        return 0 if is_left_out else len(completion.ids) - len(completion.read)

    def _tensors(self, chunk: Sequence[tuple[Scored, bool]]) -> dict[str, torch.Tensor]:
        """Return the arrays of a micro-batch of (completion, whether it counts); see `PolicyHead`."""
        completions = []
        for scored, counts in chunk:
            completion = scored.completion
            prompt = completion.prompt_ids or self._scorer.prompt_ids(completion.prompt)
            ids = np.array(completion.ids, dtype=np.int64)
            labels = ids.copy()
            labels[completion.read if counts and self._trained(scored) else slice(None)] = NO_TARGET
            sampled = np.array(completion.logps, dtype=np.float32)
            tokens = np.asarray(prompt, dtype=np.int64)
            completions.append(TrainedCompletion(tokens, ids, labels, sampled, scored.advantage))
        if self._shares_prompts:
            return shared_batch(completions)
        return completion_batch(completions, self._tokenizer.pad_token_id)

    def _refuse_different(self, step: RolloutStep, signed: float, absolute: float, largest: float) -> None:
        dtype = next(below_adapters(self._engine.module).parameters()).dtype
        if is_allowed(dtype, signed, absolute, largest):
            return
        batches = [on_device(batch, self._engine.device) for _, batch in step.batch.batches]
        self._engine.train(False)
        difference = examine(self._head, self._engine.forward, batches, self._task.temperature)
        self._engine.train(True)
        looks = self._world.broadcast(looks_like(difference, self._task.temperature, allowed(dtype)[1]))
        measured = signed, absolute, largest
        raise UserError(problem_of(self._task.rollout, dtype, step.number, measured, looks))
