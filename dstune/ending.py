"""How a run ends: its last evaluation and save, the test, the export and `result.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.session import Checkpoints
from dstune.config.method_schema import FeaturesConfig
from dstune.config.schema import Export, RunConfig
from dstune.core import files
from dstune.errors import Preempted, TrainingFailed
from dstune.opening import show_samples
from dstune.redact import redacted
from dstune.tracking.log import Tracker
from dstune.train import spikes
from dstune.train.classical import classical_results
from dstune.train.hooks import LEAVING, Decision, Wish
from dstune.train.loop import Training, evaluate
from dstune.train.watch import watch


def finish(
    run: Training,
    checkpoints: Checkpoints,
    run_dir: Path,
    tokenizer: Any,
    decision: Decision,
    *,
    features_seconds: float = 0.0,
) -> None:
    """Final evaluation, save, test, export and result of a run that ended as planned; the result alone of another."""
    state = run.state
    result: dict[str, Any] = {"reason": decision.reason, "export": None, "test": None}
    if not decision.wish & LEAVING:
        evaluated = run.data.validation is not None and state.eval_last_step != state.step
        if evaluated:
            evaluate(run)
            run.watchdog.rest()
        with run.watchdog.patient("ending the run"):
            result |= _conclude(run, checkpoints, run_dir, features_seconds, unsaved=evaluated)
            show_samples(run, tokenizer, before=False)
    run.saves.settle()
    run.supply.close(for_good=not decision.wish & LEAVING)
    state.seconds = run.seconds_before + time.monotonic() - run.started
    status = "stopped" if decision.reason else "completed"
    status = "pruned" if decision.wish & Wish.PRUNE else status
    status = "preempted" if decision.wish & Wish.PREEMPT else "failed" if decision.wish & Wish.FAIL else status
    if run.world.is_main:
        found = {name: value for name, value in state.extra.items() if name != spikes.NAME}
        checkpoint = store.newest(run_dir)
        speed = state.tokens_per_second
        result |= {
            "status": status,
            "steps": state.step,
            "world_size": run.world.size,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": speed and round(speed, 2),
            **({"utilization": round(state.utilization, 6)} if state.utilization else {}),
            "start_seconds": run.beginning.seconds,
            "peak_memory_gib": round(state.peak_memory_gib, 4),
            "eval_initial": state.eval_initial,
            "eval_final": state.eval_last,
            "best": state.best and vars(state.best),
            "checkpoint": checkpoint and str(checkpoint),
            "nonfinite_steps": state.nonfinite_steps,
            "overflow_steps": state.overflow_steps,
            "spikes": {**spikes.counts(state), "events": spikes.events(state)},
            "slowest_rank": {"rank": run.stragglers.rank, "to_median": round(run.stragglers.ratio, 3)},
            **({"labels": list(run.data.labels)} if found and run.data.labels else {}),
            **found,
        }
        write_result(run_dir, result)
        assert isinstance(run.log, Tracker)
        run.log.summary({key: value for key, value in result.items() if value is not None and key not in state.extra})
        run.log.finish(status)
    run.memory.close()
    run.world.barrier()
    if status == "preempted":
        raise Preempted(f"{decision.reason}: saved at step {state.step}")
    if status == "failed":
        raise TrainingFailed(decision.reason)


def _conclude(
    run: Training, checkpoints: Checkpoints, run_dir: Path, features_seconds: float, *, unsaved: bool
) -> dict[str, Any]:
    """Save, measure what is measured at the end, and export. Every rank must call it; what `result.json` has of it.

    unsaved: an evaluation came after the last save.
    """
    state, config = run.state, run.config
    result: dict[str, Any] = {}
    run.saves.settle()
    newest = store.newest(run_dir)
    # Saved again where an evaluation came after the save, so that the checkpoint knows whether it is the best one.
    due = run.world.broadcast(unsaved or newest is None or newest.name != store.tag(state.step))
    if due and not run.saves.save(state, now=True):
        reason = f"step {state.step} could not be saved: {run.saves.refusal}"
        raise TrainingFailed(f"{reason}; continue the run when that is mended")
    result["weights_step"] = restore_best(run, checkpoints, run_dir)
    watch(run, "after")
    if run.data.test is not None:
        result["test"] = run.evaluator(run.data.test).metrics
    if isinstance(config.method, FeaturesConfig) and run.world.is_main:
        method, rows = config.method, config.evaluate.max_rows
        result["feature_seconds"] = round(features_seconds, 3)
        result["classifiers"] = classical_results(method, run.data, config.trainer.seed, rows)
    if run.data.validation is not None and config.evaluate.counterfactual:
        state.extra["counterfactual"] = run.evaluator.counterfactual(run.data.validation)
    if config.run.export is not Export.none and run.world.is_main:
        result["export"] = str(export(run_dir, config))
    run.world.barrier()
    return result


def restore_best(run: Training, checkpoints: Checkpoints, run_dir: Path) -> int:
    """With `run.export=best` load the best weights, so that what follows is measured on what is exported. Returns the step
    that the weights are of."""
    best = store.best(run_dir) if run.world.is_main and run.config.run.export is Export.best else None
    best = run.world.broadcast(best)
    if best is None or best.name == store.tag(run.state.step):
        return run.state.step
    checkpoints.load_weights(best)
    step = int(store.read_state(best)["train"]["step"])
    if run.log:
        run.log.message(f"back to the best weights, those of step {step}, for the export and what is measured now")
    return step


def export(run_dir: Path, config: RunConfig) -> Path:
    from dstune.checkpoint.export import export_checkpoint

    checkpoint = store.newest(run_dir)
    if config.run.export is Export.best:
        checkpoint = store.best(run_dir) or checkpoint
    assert checkpoint is not None, "the final save comes before the export"
    return export_checkpoint(run_dir, checkpoint, run_dir / "export", force=True)


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json` whole or not at all."""
    files.write(run_dir / "result.json", json.dumps(redacted(result), indent=1))
