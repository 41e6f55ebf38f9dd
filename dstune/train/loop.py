"""The training loop. One optimizer step is one window: the micro-batches whose gradients are summed before an update."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dstune.config.schema import UNTIMED_STEPS, RunConfig, SpikeAction
from dstune.config.task_schema import EmbeddingConfig
from dstune.data.build import PreparedData
from dstune.dist import World
from dstune.models.heads import Batch, Forward, Head, HeadOutput, sums_of
from dstune.protocols import schedule_of, task_of
from dstune.train import spikes
from dstune.train.beginning import Beginning
from dstune.train.evaluate import Evaluator
from dstune.train.evaluation_cost import EvaluationCost
from dstune.train.feed import Feed, dropout_seed, windows
from dstune.train.forgetting import Penalties
from dstune.train.hooks import LEAVING, OVERFITTING, UNSAVED, Decision, Hook, Wish, join
from dstune.train.measure import Totals
from dstune.train.memory import PeakMemory
from dstune.train.profiling import StepProfiler
from dstune.train.spikes import SpikeGuard
from dstune.train.split import TimeSplit
from dstune.train.state import TrainState
from dstune.train.stragglers import OwnTime, Stragglers
from dstune.train.supply import Supply
from dstune.train.unfreezing import Unfreezing
from dstune.train.utilization import Utilization
from dstune.train.watchdog import Watchdog
from dstune.train.window import joined
from dstune.zero.engine import Engine, Update

TIMED = ("timed_tokens", "timed_seconds", "timed_flops", "timed_capacity")

POSITIONS, TARGETS, FLOPS = "use/positions", "use/targets", "use/flops"
"""Beside the sums of the head: positions computed, tokens that count in the loss, floating-point operations needed."""


class Log(Protocol):
    """Where rank 0 reports; the other ranks have none."""

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None: ...
    def progress(self, step: int, total_steps: int, metrics: Mapping[str, float | int | str]) -> None: ...
    def message(self, text: str) -> None: ...
    def rewind(self, step: int) -> None: ...


class Saves(Protocol):
    """See `checkpoint.saves.Saves`."""

    refusal: str

    def save(self, state: TrainState, *, now: bool = False, whole: bool = False) -> bool: ...
    def settle(self) -> bool: ...


@dataclass
class Training:
    """Everything that the loop needs, in one place; built by `worker`."""

    config: RunConfig
    world: World
    engine: Engine
    head: Head
    data: PreparedData
    supply: Supply
    total_steps: int
    state: TrainState
    hooks: list[Hook]
    evaluator: Evaluator
    saves: Saves
    rewind: Callable[[], TrainState | None]
    """Loads the newest checkpoint that this run has written; None where there is none."""
    watchdog: Watchdog
    log: Log | None
    memory: PeakMemory
    pad_token_id: int
    guard: SpikeGuard
    own_time: OwnTime
    utilization: Utilization
    profiler: StepProfiler
    beginning: Beginning = field(default_factory=Beginning)
    unfreezing: Unfreezing | None = None
    """Of a method that trains more and more layers."""
    penalties: Penalties | None = None
    stragglers: Stragglers = field(default_factory=Stragglers)
    split: TimeSplit = field(default_factory=TimeSplit)
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    """Time that earlier launches of this run took."""
    evaluation_cost: EvaluationCost = field(init=False)

    def __post_init__(self) -> None:
        self.evaluation_cost = EvaluationCost(self.config, self.total_steps)


def fit(run: Training) -> Decision:
    """Train from `run.state` to the last step, or until the ranks agree to leave; returns why it ended.

    The final evaluation and save are the caller's, so that they happen after a planned stop only.
    """
    state, validation = run.state, run.data.validation
    if validation is not None and (state.evaluation_due or (state.step == 0 and run.config.evaluate.at_start)):
        decision = evaluate(run)
        if decision.wish & Wish.SAVE:
            with run.watchdog.patient("saving"):
                run.saves.save(state)
        if decision.wish & Wish.STOP:
            return decision
    shared = run.world.data_parallel_size < run.world.size
    # Where ranks share rows, those with the ends of answers have the targets, and the projection makes the whole loss.
    run.own_time.attach(run.engine.module, without=projection_of(run.engine.module) if shared else None)
    run.beginning.mark("evaluation")
    first = state.step
    ahead = sys.maxsize if run.guard.action is SpikeAction.rollback else run.total_steps + state.skipped_windows
    steps = range(state.window, ahead if first < run.total_steps else state.window)
    run.watchdog.beat(f"step {state.step + 1}")
    began = time.perf_counter()
    for feed in windows(run.config, run.data, run.supply, run.world, run.pad_token_id, steps):
        if feed is None:  # rows of a stream are not ready on some rank
            run.watchdog.beat(f"the wait for the rows of step {state.step + 1}")
            decision, _ = agree(run, join([hook.while_waiting(state) for hook in run.hooks]))
            decision = save_if_asked(run, decision)
            if decision.wish & LEAVING:
                return decision
            continue
        number = state.step - first
        run.beginning.mark("first rows")
        waited = time.perf_counter() - began
        if number >= UNTIMED_STEPS:
            run.profiler.before_step(state.step + 1)
        update, sums = train_step(run, feed, waited)
        state.step += 1
        state.tokens += feed.window.tokens
        state.targets += feed.window.weight
        state.cursor = run.supply.cursor(state.window)
        asked = join([hook.after_step(state, update) for hook in run.hooks])
        used = use_of(run, feed)
        decision, sums = agree(run, asked, sums | used)
        used = {name: sums.pop(name) for name in used}
        seconds = time.perf_counter() - began
        run.beginning.end("first step")
        state.seconds = run.seconds_before + time.monotonic() - run.started
        capacity = run.utilization.capacity(seconds)
        if number >= UNTIMED_STEPS and not run.profiler.disturbs:
            state.timed_tokens += feed.window.tokens
            state.timed_seconds += seconds
            state.timed_flops += used[FLOPS]
            state.timed_capacity += capacity
            tell(run, run.evaluation_cost.stepped(seconds))
        penalty = None if run.penalties is None else run.penalties.value()
        if math.isfinite(sums["loss_sum"]):
            state.fit_loss_sum += sums["loss_sum"]
            state.fit_weight += feed.window.weight
        spike = run.guard.note(state, sums["loss_sum"] / feed.window.weight)
        # What follows a step that asks for something is no step.
        run.profiler.after_step(pause=bool(decision.wish) or spike is not None or state.step >= run.total_steps)
        report_step(run, feed, update, sums, rates(used, seconds, capacity), seconds, penalty, spike)
        if spike is not None:
            decision = act_on_spike(run, spike, decision)

        leaving = decision.wish & LEAVING
        if decision.wish & Wish.EVALUATE and validation is not None:
            state.evaluation_due = bool(leaving)
            if not leaving:
                decision = join([decision, evaluate(run)])
        if decision.wish & UNSAVED:
            return decision
        decision = save_if_asked(run, decision)
        run.watchdog.beat(f"step {state.step + 1}")
        if decision.wish & (Wish.STOP | LEAVING):
            return decision
        if state.step >= run.total_steps:
            break
        with run.watchdog.patient("writing the profile"):
            run.profiler.write()  # after a save, which may be urgent
        began = time.perf_counter()  # waiting for the feed is part of a step; evaluation and saving are not
    return Decision(Wish.STOP, "")


def projection_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """The vocabulary projection of a model, or of the one that adapters are on."""
    found = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(found, "base_layer", found)


def save_if_asked(run: Training, decision: Decision) -> Decision:
    """Save for `decision`, which comes back; as a failure where the run leaves and cannot be saved."""
    if not decision.wish & (Wish.SAVE | Wish.PREEMPT):
        return decision
    leaving = bool(decision.wish & Wish.PREEMPT)
    with run.watchdog.patient("saving"):
        saved = run.saves.save(run.state, now=leaving, whole=leaving)
    if leaving and not saved:
        reason = f"step {run.state.step} could not be saved: {run.saves.refusal}"
        return Decision(Wish.FAIL, f"{decision.reason}, and {reason}")
    return decision


def act_on_spike(run: Training, spike: dict[str, Any], decision: Decision) -> Decision:
    """Tell of a spike; go back to the last checkpoint where that is asked for. `spike` is one of `SpikeGuard.note`.

    decision: for the step that was just done; what is left of it comes back.

    After going back the run has the state of that checkpoint, but goes on with the data after the spike. A run that is
    killed meanwhile comes to the same spike again and does the same.
    """
    state = run.state
    told = f"the loss of step {spike['step']} leaps to {spike['loss']:.4g} ({spike['z_score']:g} robust deviations)"
    if spike["action"] == "rolled back":
        events = state.extra[spikes.NAME]["events"]
        run.watchdog.beat(f"going back from step {state.step}")
        with run.watchdog.patient("going back"):
            run.saves.settle()
            earlier = run.rewind()
        if earlier is None:
            spike["action"] = "skipped"
            told += "; the update is left out, there is no checkpoint yet to go back to"
        else:
            earlier.skipped_windows = state.window - earlier.step
            earlier.cursor = state.cursor
            earlier.extra.setdefault(spikes.NAME, {"losses": []})["events"] = events
            for name in ("seconds", "save_seconds", "peak_memory_gib", *TIMED):
                setattr(earlier, name, getattr(state, name))
            told += f"; back to step {earlier.step}, {state.window - earlier.window} windows of data are left out"
            vars(state).update(vars(earlier))
            # That step is undone; its evaluation and save are not due any more.
            decision = Decision(decision.wish & LEAVING, decision.reason)
            if run.log:
                run.log.rewind(state.step)
    elif spike["action"] == "skipped":
        told += "; the update is left out"
    if run.log:
        run.log.message(f"warning: {told}")
    reason = run.guard.exhausted(state)
    return join([decision, Decision(Wish.FAIL, reason)]) if reason else decision


def train_step(run: Training, feed: Feed, waited: float = 0.0) -> tuple[Update, dict[str, float]]:
    """One optimizer step: accumulate this rank's micro-batches, then update. Returns this rank's sums too.

    waited: seconds that the step waited for its rows.
    """
    if run.unfreezing is not None:
        run.unfreezing.before_step(run.state.step)
    factor = schedule_of(run.config.schedule).factor(run.state.step, run.total_steps)
    run.engine.set_learning_rate(run.config.optimizer.lr * factor)
    # Dropout depends on (seed, step, micro-batch) alone: the same on any number of ranks, and after a resume.
    # Ranks that share a row have other numbers for other positions of it.
    seed, place = run.config.trainer.seed, run.world.place_in_group
    seeds = [dropout_seed(seed, run.state.step, part.index, place) for part, _ in feed.batches]
    device = run.engine.device
    batches = [{key: value.to(device, non_blocking=True) for key, value in batch.items()} for _, batch in feed.batches]
    run.split.begin(waited)
    shares = joined(run.head, run.engine, batches, run.world, seeds)
    sums: dict[str, torch.Tensor] = {}

    def summed(forward: Forward, batch: Batch) -> HeadOutput:
        output = run.head(forward, batch)
        for name, value in sums_of(output).items():
            sums[name] = sums.get(name, 0) + value.detach()
        run.split.mark("forward")
        return output

    def veto(_: torch.Tensor) -> bool:
        mine = float(sums["loss_sum"]) if run.world.counts else 0.0  # the last micro-batch is in it
        (total,) = run.world.sum([mine])
        return run.guard.is_spike(run.state, total / feed.window.weight)

    for position, batch in enumerate(batches):
        torch.manual_seed(seeds[position])
        run.watchdog.beat(f"micro-batch {position + 1} of step {run.state.step + 1}")
        is_last = position == len(batches) - 1
        if position == 0:
            run.own_time.start(next(iter(batch.values())).numel(), waited)
        run.engine.accumulate(
            summed,
            batch | (shares[position] if shares else {}),
            window_weight=feed.window.weight,
            last=is_last,
            veto=veto if is_last and run.guard.before_update else None,
        )
        run.own_time.stop()
        run.split.mark("backward")
    update = run.engine.update()
    run.split.mark("update")
    return update, {name: float(value) if run.world.counts else 0.0 for name, value in sums.items()}


def use_of(run: Training, feed: Feed) -> dict[str, float]:
    """What the window has of use in it, as far as this rank has computed it; of the step that is just done."""
    unfrozen = 0 if run.unfreezing is None else run.unfreezing.trained_layers(run.state.step - 1)
    flops = run.utilization.flops(feed.counted, unfrozen)
    used = {POSITIONS: feed.counted.positions, TARGETS: feed.counted.targets, FLOPS: flops}
    # Ranks that share rows have counted the same ones.
    return {name: value * run.world.data_parallel_size / run.world.size for name, value in used.items()}


def rates(used: Mapping[str, float], seconds: float, capacity: float) -> dict[str, float]:
    """The metrics of a step that needed `used` over all ranks; without those that are not known."""
    found = {"positions_per_second": used[POSITIONS] / seconds, "targets_per_second": used[TARGETS] / seconds}
    if capacity:
        found["utilization"] = used[FLOPS] / capacity
    return {name: value for name, value in found.items() if value}


def agree(run: Training, asked: Decision, sums: Mapping[str, float] | None = None) -> tuple[Decision, dict[str, float]]:
    """What any rank asked for, and the `sums` of all ranks: the same on every rank. One small collective a step."""
    sums = sums or {}
    own_time = run.own_time.collect()
    numbers = run.world.gather_numbers([float(asked.wish), run.memory.gib, own_time, *sums.values()])
    if (slow := run.stragglers.compare(numbers[:, 2].tolist())) and run.log:
        run.log.message(slow)
    wish = Wish.NOTHING
    for flags in numbers[:, 0]:
        wish |= Wish(int(flags))
    run.state.peak_memory_gib = max(run.state.peak_memory_gib, float(numbers[:, 1].max()))
    reason = asked.reason
    if wish & (Wish.STOP | LEAVING):
        reasons = run.world.gather(asked.reason)
        named = {text: rank for rank, text in reversed(list(enumerate(reasons))) if text}
        reason = "; ".join(text if len(named) == 1 else f"rank {rank}: {text}" for text, rank in named.items())
    return Decision(wish, reason), dict(zip(sums, numbers[:, 3:].sum(axis=0).tolist(), strict=True))


def evaluate(run: Training) -> Decision:
    """Evaluate the validation rows, remember and report the metrics; what the hooks of any rank ask for after them."""
    validation, state = run.data.validation, run.state
    assert validation is not None
    began = time.perf_counter()

    def progress(done: int, batches: int) -> None:
        run.watchdog.beat(f"micro-batch {done + 1} of {batches} of the evaluation after step {state.step}")

    progress(0, 0)
    evaluation = run.evaluator(validation, progress)
    run.watchdog.beat(f"what follows the evaluation after step {state.step}")
    metrics = evaluation.metrics
    gap = note_gap(run, metrics)
    state.evaluation_due = False
    state.eval_last, state.eval_last_step = metrics, state.step
    if state.step == 0:
        state.eval_initial = metrics
    if run.log:
        seconds = time.perf_counter() - began
        row = {f"eval/{name}": value for name, value in metrics.items()} | {"eval/seconds": seconds}
        run.log.log(state.step, row if gap is None else row | {"eval/gap": gap})
        tell(run, run.evaluation_cost.evaluated(seconds))
    state.extra |= evaluation.details
    decision, _ = agree(run, join([hook.after_evaluation(state, metrics) for hook in run.hooks]))
    return decision


def note_gap(run: Training, metrics: Mapping[str, float]) -> float | None:
    """How far the held-out loss is above the mean training loss since the evaluation before; None where nothing was trained
    since, and of embeddings, whose loss depends on how many texts are compared at once.

    Dropout, and that the weights were still on their way, let the training loss be higher than it would be in evaluation.
    """
    state = run.state
    if "loss" not in metrics or not state.fit_weight or isinstance(run.config.task, EmbeddingConfig):
        return None
    training = state.fit_loss_sum / state.fit_weight
    gap = metrics["loss"] - training
    state.extra[OVERFITTING] = {"training_loss": training, "held_out_loss": metrics["loss"], "gap": gap}
    state.fit_loss_sum = state.fit_weight = 0.0
    return gap


def tell(run: Training, line: str | None) -> None:
    if run.log and line:
        run.log.message(line)


def report_step(
    run: Training,
    feed: Feed,
    update: Update,
    sums: Mapping[str, float],
    use: Mapping[str, float],
    seconds: float,
    penalty: float | None,
    spike: dict[str, Any] | None,
) -> None:
    if run.log is None:
        return
    state = run.state
    metrics: dict[str, float | int | str] = {
        "epoch": feed.epoch,
        "loss": sums["loss_sum"] / feed.window.weight,
        "lr": run.config.optimizer.lr * schedule_of(run.config.schedule).factor(state.step - 1, run.total_steps),
        "grad_norm": update.grad_norm,
        "tokens": state.tokens,
        "tokens_per_second": feed.window.tokens / seconds,
        **use,
        "step_seconds": seconds,
        **run.split.seconds(),
        "peak_memory_gib": state.peak_memory_gib,
    }
    if penalty is not None:
        metrics["penalty"] = penalty
    if run.unfreezing is not None:
        metrics["trained_layers"] = run.unfreezing.trained_layers(state.step - 1)
    metrics |= task_of(run.config.task).measure_step(Totals.of(sums))
    if not update.applied:
        metrics["skipped"] = "overflow" if update.loss_scale > 1.0 else "nonfinite"
        if update.vetoed:
            metrics["skipped"] = "spike"
    if spike is not None:
        metrics["spike_z_score"] = spike["z_score"]
    if run.world.size > 1:
        metrics |= {"slowest_rank": run.stragglers.rank, "slowest_to_median": round(run.stragglers.ratio, 3)}
    run.log.log(state.step, metrics)
    run.log.progress(state.step, run.total_steps, metrics)
