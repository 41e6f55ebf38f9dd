"""The training loop. The unit of work is an optimizer step: the micro-batches whose gradients are summed before an update."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dstune.config.schema import UNTIMED_STEPS, RunConfig, SpikeAction
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.prepared import PreparedData
from dstune.models.heads import Batch, Forward, Head, HeadOutput, numbers, on_device, sums_of
from dstune.protocols import schedule_of, task_of
from dstune.protocols.callback import CONTINUE, LEAVE, UNSAVED, Action, Request, merge
from dstune.protocols.task_options import MeasuresSteps
from dstune.tracking.log import RunLog
from dstune.trainer.callback_list import CallbackList
from dstune.trainer.callbacks.preemption import Preemption
from dstune.trainer.callbacks.startup_timer import StartupTimer
from dstune.trainer.data_loader import DataLoader
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.first_pass import refuse_failing_model
from dstune.trainer.forgetting import Penalties
from dstune.trainer.measure import Totals
from dstune.trainer.memory import PeakMemory
from dstune.trainer.prefetcher import RankBatch, dropout_seed, prefetched_steps
from dstune.trainer.rollouts import Rollouts, RolloutsFailed, RolloutsUnavailable
from dstune.trainer.state import TrainState
from dstune.trainer.step_timer import METRICS, StepTimer, StepTimes
from dstune.trainer.utilization import Utilization
from dstune.trainer.whole_batch import joined
from dstune.zero.engine import Engine, Update


class Saves(Protocol):
    """See `checkpoint.saves.Saves`."""

    refusal: str

    def save(self, state: TrainState, *, now: bool = False, whole: bool = False) -> bool: ...
    def wait_for_pending_save(self) -> bool: ...


@dataclass
class Training:
    """Everything that the loop needs, in one place; built by `rank.setup`."""

    config: RunConfig
    world: World
    run_dir: Path
    engine: Engine
    head: Head
    data: PreparedData
    data_loader: DataLoader
    total_steps: int
    state: TrainState
    evaluator: Evaluator
    saves: Saves
    rewind: Callable[[], TrainState | None]
    """Loads the newest checkpoint that this run has written; returns None if there is none."""
    log: RunLog | None
    pad_token_id: int
    preemption: Preemption
    startup: StartupTimer
    memory: PeakMemory
    utilization: Utilization
    unfreezing: Any = None
    """The schedule of a method that unfreezes more and more layers; None for other methods."""
    penalties: Penalties | None = None
    rollouts: Rollouts | None = None
    """Generates the answers of a task whose rows are prompts; None for other tasks."""
    start_time: float = field(default_factory=time.monotonic)
    """By `time.monotonic`."""
    seconds_before: float = 0.0
    """Seconds that earlier launches of this run took."""
    step_timer: StepTimer = field(default_factory=StepTimer)
    callbacks: CallbackList = field(default_factory=lambda: CallbackList([]))
    unwritten: UnwrittenRow | None = None
    """The row of the previous step, whose update the device may still be computing."""

    @property
    def epochs(self) -> float | None:
        """Passes over the training rows in the whole run; None for a stream."""
        if self.data_loader.rows() is None:
            return None
        if not self.config.trainer.max_steps:
            return self.config.trainer.epochs
        # The first pass over a small mixture may have no rows at all.
        return self.total_steps / max(1, self.data_loader.steps(1))

    @property
    def trainer_state(self) -> dict[str, Any]:
        """The values of `trainer_state` in TRL's reward functions, after the last step."""
        passes = self.epochs or 0.0
        step, steps = self.state.step, self.total_steps
        return {"global_step": step, "max_steps": steps, "epoch": passes * step / max(1, steps)}

    def around(self, phase: str) -> AbstractContextManager[None]:
        """Wrap a long phase in the `around` of all callbacks."""
        return self.callbacks.around(phase)

    def message(self, text: str) -> None:
        if self.log:
            self.log.message(text)


@dataclass
class Step:
    """One optimizer step, filled in while it runs; see `protocols.callback.Step`."""

    number: int
    number_in_launch: int
    batch: RankBatch
    """This rank's micro-batches of the global batch."""
    seconds_waited: float
    """How long the loop waited for the step's rows."""
    timed: bool
    update: Update = field(init=False)
    sums: dict[str, float] = field(default_factory=dict)
    """The head's sums: of this rank, and of all ranks after `synchronize_step` (already in `on_step_end` if a callback reads the
    loss there)."""
    seconds: float = 0.0
    request: Request = CONTINUE

    @property
    def epoch(self) -> float:
        return self.batch.epoch

    @property
    def weight(self) -> float:
        return self.batch.weight

    @property
    def loss_sum(self) -> float:
        if "loss_sum" not in self.sums:
            raise RuntimeError("the loss of a step is not known before on_step_end: read it there, or in a later hook")
        return self.sums["loss_sum"]

    @property
    def loss(self) -> float:
        return self.loss_sum / self.weight


@dataclass(frozen=True)
class UnwrittenRow:
    """A row of metrics.jsonl without the times of the step's parts."""

    step: int
    metrics: dict[str, float | int | str]
    extra_metrics: dict[str, float | int | str]
    """Metrics of callbacks and of the task, written after the times."""
    times: StepTimes


@dataclass
class FinishedEvaluation:
    """What callbacks get in `on_evaluate`; see `protocols.callback.Evaluation`."""

    metrics: dict[str, float]
    seconds: float
    row: dict[str, float]
    missing: frozenset[str] = frozenset()


def fit(run: Training) -> Request:
    """Train from `run.state` to the last step, or until the ranks agree to leave; return why the training ended.

    The caller does the final evaluation and save, since they follow a planned stop only.
    """
    request = evaluate_before_training(run)
    if request.action & (Action.STOP | LEAVE):
        return request
    run.callbacks.on_train_begin(run)
    try:
        request = train(run)
    except BaseException:
        with suppress(Exception):  # the device may be what failed
            write_row(run)
        raise
    write_row(run)
    return request


def train(run: Training) -> Request:
    """Train the remaining steps; return why the training ended."""
    for step in steps(run):
        if step is None:  # some rank still waits for rows of a stream
            request, _ = synchronize(run, run.callbacks.while_waiting(run))
        else:
            try:
                with refuse_untrainable_model(run):
                    train_step(run, step)
            except RolloutsUnavailable as error:  # on all ranks alike; the state is still that of the previous step
                return save_if_requested(run, Request(Action.PREEMPT, str(error)))
            except RolloutsFailed as error:
                return save_and_fail(run, str(error))
            synchronize_step(run, step)
            run.callbacks.on_step_agreed(run, step)
            report_step(run, step)
            request = rewind_if_requested(run, step.request)
            request = evaluate_if_requested(run, request)
        request = save_if_requested(run, request)
        if request.action & (Action.STOP | LEAVE):
            return request
    return Request(Action.STOP)


def refuse_untrainable_model(run: Training) -> AbstractContextManager[None]:
    """Raise UserError if the model's code refuses the first training step.

    The check before training runs in evaluation mode, in which some models accept more: in training, Reformer refuses rows that
    do not fill its positions.
    """
    if run.state.step:
        return nullcontext()
    return refuse_failing_model(run.config.model.path, type(run.engine.module).__name__, raised_there=True)


def steps(run: Training) -> Iterator[Step | None]:
    """Yield the remaining steps, each as soon as its rows are loaded; yield None, on all ranks alike, while any rank waits for
    rows."""
    state, first_step = run.state, run.state.step
    # A rewind leaves out global batches, and later ones replace them: how many the run will need is not known in advance.
    may_rewind = run.config.trainer.spike.action is SpikeAction.rollback
    end = sys.maxsize if may_rewind else run.total_steps + state.left_out_batches
    batch_numbers = range(state.next_batch, end if first_step < run.total_steps else state.next_batch)
    run.step_timer.start()
    for batch in prefetched_steps(run.config, run.data_loader, run.world, run.pad_token_id, batch_numbers, run.head):
        if batch is None:
            yield None
            continue
        number_in_launch = state.step - first_step
        is_timed = number_in_launch >= UNTIMED_STEPS
        step = Step(state.step + 1, number_in_launch, batch, run.step_timer.rows_ready(), timed=is_timed)
        run.callbacks.on_step_begin(run, step)
        yield step
        if state.step >= run.total_steps:
            return
        run.callbacks.between_steps(run)
        run.step_timer.start()  # waiting for rows is part of a step; evaluation and saving are not


def train_step(run: Training, step: Step) -> None:
    """Train one optimizer step: generate answers if rows are prompts, then update the weights (with rollouts perhaps several
    times)."""
    run.engine.set_learning_rate(learning_rate(run, step))
    run.step_timer.begin()
    if run.rollouts is None:
        update_weights(run, step)
        return
    step.batch = run.rollouts.begin_step(run, step)
    run.step_timer.mark("rollout")
    first_sums: dict[str, float] = {}
    with run.rollouts.several_updates() as inputs_of_update:
        for number in range(run.rollouts.updates):
            update_weights(run, step, inputs_of_update(number))
            if not number:
                first_sums = step.sums | run.rollouts.end_step(step, step.sums)
    step.sums = first_sums | step.sums


def update_weights(run: Training, step: Step, extra_inputs: Sequence[Mapping[str, torch.Tensor]] = ()) -> None:
    """Accumulate the gradients of this rank's micro-batches, then update. extra_inputs: tensors to add to each micro-batch."""
    seeds = dropout_seeds(run, step)
    batches = [on_device(batch, run.engine.device) for _, batch in step.batch.batches]
    whole_batch_inputs = joined(run.head, run.engine, batches, run.world, seeds) or extra_inputs
    sums: dict[str, torch.Tensor] = {}

    def head(forward: Forward, batch: Batch) -> HeadOutput:
        output = run.head(forward, batch)
        for name, value in sums_of(output).items():
            sums[name] = sums.get(name, 0) + value.detach()
        run.step_timer.mark("forward")
        return output

    def veto(_: torch.Tensor) -> bool:
        loss_sum = float(sums["loss_sum"]) if run.world.counts else 0.0  # includes the last micro-batch
        (total,) = run.world.sum([loss_sum])
        return run.world.any(run.callbacks.veto(run, total / step.weight))

    for position, batch in enumerate(batches):
        is_last = position == len(batches) - 1
        run.callbacks.on_micro_batch_begin(run, step, position, batch)
        torch.manual_seed(seeds[position])
        run.engine.accumulate(
            head,
            {**batch, **(whole_batch_inputs[position] if whole_batch_inputs else {})},
            batch_weight=step.weight,
            last=is_last,
            veto=veto if is_last and run.callbacks.can_veto else None,
        )
        run.callbacks.on_micro_batch_end(run, step, position)
        run.step_timer.mark("backward")
    step.update = run.engine.update(sums if run.world.counts else None)
    run.step_timer.mark("update")
    step.sums = numbers(sums, step.update.scalars) if run.world.counts else dict.fromkeys(sums, 0.0)


def learning_rate(run: Training, step: Step) -> float:
    """Return the learning rate of `step`: `optimizer.lr` times the schedule's factor."""
    return run.config.optimizer.lr * schedule_of(run.config.schedule).factor(step.number - 1, run.total_steps)


def dropout_seeds(run: Training, step: Step) -> list[int]:
    """Return the seed of each micro-batch. It depends on (run seed, step, micro-batch) alone, so it is the same on any number of
    ranks and after a resume."""
    # Ranks that share a row hold different positions of it, so they need different random numbers.
    seed, place = run.config.trainer.seed, run.world.place_in_group
    return [dropout_seed(seed, step.number - 1, part.index, place) for part, _ in step.batch.batches]


def synchronize_step(run: Training, step: Step) -> None:
    """Exchange sums and requests with the other ranks after this rank has finished the step."""
    state = run.state
    state.step = step.number
    state.tokens += step.batch.tokens
    state.targets += step.weight
    state.cursor = run.data_loader.cursor(state.next_batch)
    if run.callbacks.needs_loss_at_step_end:  # the same on all ranks, which have the same callbacks
        step.sums = dict(zip(step.sums, run.world.sum(list(step.sums.values())), strict=True))
        step.request, _ = synchronize(run, run.callbacks.on_step_end(run, step))
    else:
        step.request, step.sums = synchronize(run, run.callbacks.on_step_end(run, step), step.sums)
    step.seconds = run.step_timer.seconds()
    run.state.seconds = run.seconds_before + time.monotonic() - run.start_time


def synchronize(
    run: Training, local_request: Request, sums: Mapping[str, float] | None = None
) -> tuple[Request, dict[str, float]]:
    """Merge the requests of all ranks and add up their `sums`; the result is the same on every rank.

    Costs one small collective per step: action, numbers of callbacks and sums travel together.
    """
    sums, callback_numbers = sums or {}, run.callbacks.numbers()
    flat = [value for numbers_by_name in callback_numbers for value in numbers_by_name.values()]
    gathered = run.world.gather_numbers([float(local_request.action), *flat, *sums.values()])
    run.callbacks.agreed(run, callback_numbers, gathered[:, 1 : 1 + len(flat)])
    action = Action.CONTINUE
    for requested in gathered[:, 0]:
        action |= Action(int(requested))
    reason = local_request.reason
    if action & (Action.STOP | LEAVE):
        reason = join_reasons(run.world.gather(local_request.reason))
    return Request(action, reason), dict(zip(sums, gathered[:, 1 + len(flat) :].sum(axis=0).tolist(), strict=True))


def join_reasons(reasons: Sequence[str]) -> str:
    """Join the reasons of all ranks, listed by rank; empty ones do not count. Equal reasons appear once, and a rank is named only
    if reasons differ."""
    rank_by_reason = {text: rank for rank, text in reversed(list(enumerate(reasons))) if text}
    if len(rank_by_reason) == 1:
        return next(iter(rank_by_reason))
    return "; ".join(f"rank {rank}: {text}" for text, rank in rank_by_reason.items())


def report_step(run: Training, step: Step) -> None:
    """Prepare the step's row of metrics.jsonl, and write it if the times of the step's parts are known.

    They are not known while the device still computes the update. The loop does not wait for the device: it writes the row after
    the next step, or earlier if an evaluation, save or rewind comes first.
    """
    write_row(run)
    if run.log is None:
        return
    metrics: dict[str, float | int | str] = {
        "epoch": step.epoch,
        "loss": step.loss,
        "lr": learning_rate(run, step),
        "grad_norm": step.update.grad_norm,
        "tokens": run.state.tokens,
        "step_seconds": step.seconds,
    }
    task = task_of(run.config.task)
    task_metrics = task.measure_step(Totals.of(step.sums)) if isinstance(task, MeasuresSteps) else {}
    extra_metrics = {**run.callbacks.metrics(run, step, ("step", *metrics, *METRICS, *task_metrics)), **task_metrics}
    run.unwritten = UnwrittenRow(step.number, metrics, extra_metrics, run.step_timer.times())
    if run.unwritten.times.are_known:
        write_row(run)


def write_row(run: Training) -> None:
    """Write the row that is waiting for its step's times, if there is one."""
    row, run.unwritten = run.unwritten, None
    if row is not None and run.log is not None:
        metrics = row.metrics | row.times.parts() | row.extra_metrics
        run.log.log(row.step, metrics)
        run.log.progress(row.step, run.total_steps, metrics)


def rewind_if_requested(run: Training, request: Request) -> Request:
    """Go back to the newest checkpoint if `request` asks for it; return the actions that still have to be done.

    The run then has the state of that checkpoint, but continues with the data that follows the undone steps.

    Raises:
        UserError: `trainer.spike.action` is not `rollback`. Raised on all ranks alike.
    """
    if not request.action & Action.REWIND:
        return request
    write_row(run)
    if run.config.trainer.spike.action is not SpikeAction.rollback:  # the data would end before the last step
        reason = "a callback asked for Action.REWIND, which works only with trainer.spike.action=rollback"
        raise UserError(Problem("trainer.callbacks", reason, "set trainer.spike.action=rollback"))
    state = run.state
    run.callbacks.on_progress(f"going back from step {state.step}")
    with run.around("going back"):
        run.saves.wait_for_pending_save()
        earlier = run.rewind()
    if earlier is not None:
        earlier.left_out_batches = state.next_batch - earlier.step
        earlier.cursor = state.cursor
        earlier.seconds, earlier.save_seconds = state.seconds, state.save_seconds  # a rewind gives no time back
        vars(state).update(vars(earlier))
        if run.log:
            run.log.rewind(state.step)
        # The step is undone, so its evaluation and save are no longer due.
        request = Request(request.action & LEAVE, request.reason)
    run.callbacks.on_rewind(run, earlier)
    return request


def evaluate_before_training(run: Training) -> Request:
    """Evaluate the initial weights, or catch up on an evaluation that the previous launch skipped because it had to end; then
    save if requested."""
    state = run.state
    if not (state.evaluation_due or (state.step == 0 and run.config.evaluate.at_start)):
        return CONTINUE
    return save_if_requested(run, evaluate(run))


def evaluate_if_requested(run: Training, request: Request) -> Request:
    """Evaluate if `request` asks for it; return it merged with the requests that callbacks make on seeing the metrics.

    A run that is about to leave does not evaluate now, but when it is resumed.
    """
    if not request.action & Action.EVALUATE or run.data.validation is None:
        return request
    run.state.evaluation_due = bool(request.action & LEAVE)
    return request if run.state.evaluation_due else merge([request, evaluate(run)])


def held_out_rows(run: Training) -> int | None:
    """Return how many validation rows an evaluation measures; None if there are none."""
    if run.data.validation is None:
        return None
    rows, max_rows = len(run.data.validation.lengths), run.config.evaluate.max_rows
    return rows if max_rows is None else min(rows, max_rows)


def evaluate(run: Training) -> Request:
    """Evaluate the validation rows, store and report the metrics; return the merged requests of all ranks' callbacks."""
    validation, state = run.data.validation, run.state
    if validation is None:
        return CONTINUE
    write_row(run)
    began = time.perf_counter()

    def progress(done: int, batches: int) -> None:
        run.callbacks.on_progress(f"micro-batch {done + 1} of {batches} of the evaluation after step {state.step}")
        if run.log:
            run.log.evaluating(state.step, done, batches)

    progress(0, 0)
    evaluation = run.evaluator(validation, progress)
    run.callbacks.on_progress(f"the work that follows the evaluation after step {state.step}")
    metrics, seconds = evaluation.metrics, time.perf_counter() - began
    state.evaluation_due = False
    state.eval_last, state.eval_last_step = metrics, state.step
    if state.step == 0:
        state.eval_initial = metrics
    state.results |= evaluation.details
    row = {f"eval/{name}": value for name, value in metrics.items()} | {"eval/seconds": seconds}
    finished = FinishedEvaluation(metrics, seconds, row, evaluation.missing)
    rank_request = run.callbacks.on_evaluate(run, finished)
    if run.log:
        for warning in evaluation.warnings:
            run.log.message(f"warning: the evaluation after step {state.step}: {warning}")
        run.log.log(state.step, finished.row, rows=held_out_rows(run))
    request, _ = synchronize(run, rank_request)
    return request


def save_if_requested(run: Training, request: Request) -> Request:
    """Save if `request` asks for it; return `request`, or FAIL if the run has to leave but could not be saved."""
    if not request.action & (Action.SAVE | Action.PREEMPT) or request.action & UNSAVED:
        return request
    is_leaving = bool(request.action & Action.PREEMPT)
    saved = save(run, now=is_leaving, whole=is_leaving)
    if is_leaving and not saved:
        reason = f"step {run.state.step} could not be saved: {run.saves.refusal}"
        return Request(Action.FAIL, f"{request.reason}, and {reason}")
    return request


def save_and_fail(run: Training, reason: str) -> Request:
    """Save the last step, whose weights can be trusted, and return the request that ends the run as failed."""
    step = run.state.step
    outcome = (
        f"step {step} is saved"
        if save(run, now=True, whole=True)
        else f"step {step} could not be saved: {run.saves.refusal}"
    )
    return Request(Action.FAIL, f"{reason}; {outcome}")


def save(run: Training, *, now: bool, whole: bool = False) -> bool:
    """Save a checkpoint of the current step; see `checkpoint.saves.Saves.save`. Returns whether it was written."""
    write_row(run)  # a run that continues from this checkpoint does not write this step's row again
    run.state.callbacks |= run.callbacks.state_dict()
    with run.around("saving"):
        saved = run.saves.save(run.state, now=now, whole=whole)
    if saved:
        run.callbacks.on_save(run)
    return saved
