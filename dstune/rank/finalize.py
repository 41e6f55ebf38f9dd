"""The end of a run: its last evaluation and save, the test, the export and `result.json`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.session import Checkpoints
from dstune.config.schema import Export, RunConfig
from dstune.core import files
from dstune.core.errors import Preempted, TrainingFailed
from dstune.core.secrets import redacted
from dstune.protocols.callback import LEAVE, Action, Request
from dstune.protocols.method import Preparation
from dstune.rank.startup import show_samples
from dstune.tracking.jsonl import json_text
from dstune.tracking.trainer_state import write_trainer_state
from dstune.trainer.loop import Training, evaluate, held_out_rows, save
from dstune.trainer.monitored_sets import evaluate_monitored_sets
from dstune.trainer.safety import measure_moment


def finish(
    run: Training, checkpoints: Checkpoints, run_dir: Path, tokenizer: Any, request: Request, preparation: Preparation
) -> None:
    """Finish the run: evaluate, save, test and export if it ended as planned, then write `result.json` in any case.

    Raises:
        Preempted: the run was preempted and saved.
        TrainingFailed: the run failed, or its last step could not be saved.
    """
    state = run.state
    result: dict[str, Any] = {"reason": request.reason, "export": None, "test": None}
    if not request.action & LEAVE:
        is_evaluation_due = run.data.validation is not None and state.eval_last_step != state.step
        if is_evaluation_due:
            with run.around("the last evaluation"):
                evaluate(run)
        with run.around("ending the run"):
            result |= _conclude(run, checkpoints, run_dir, tokenizer, preparation, unsaved=is_evaluation_due)
            show_samples(run, tokenizer, before=False)
    run.saves.wait_for_pending_save()
    run.data_loader.close(for_good=not request.action & LEAVE)
    state.seconds = run.seconds_before + time.monotonic() - run.start_time
    status = status_of(request)
    refusal = ""
    if run.world.is_main:
        checkpoint = store.newest(run_dir)
        result |= {
            "status": status,
            "steps": state.step,
            "world_size": run.world.size,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "eval_initial": state.eval_initial,
            "eval_final": state.eval_last,
            "held_out_rows": held_out_rows(run),
            "best": state.best and vars(state.best),
            "checkpoint": checkpoint and str(checkpoint),
            **({"labels": list(run.data.labels)} if state.results and run.data.labels else {}),
            **state.results,
        }
        result |= run.callbacks.results(result.keys(), run.message)
        assert run.log is not None
        try:
            write_result(run_dir, result)
            write_trainer_state(run_dir, run.config, result, run.total_steps, epochs=run.epochs)
            run.log.summary(
                {key: value for key, value in result.items() if value is not None and key not in state.results}
            )
            run.log.finish(status)
        except OSError as error:  # raised below, unless there is a better reason
            refusal = f"the results in {run_dir} cannot be written: {error}"
    refusal = run.world.broadcast(refusal)
    if status == "preempted":
        raise Preempted("; ".join(filter(None, [f"{request.reason}: saved at step {state.step}", refusal])))
    if status == "failed":
        raise TrainingFailed(request.reason)
    if refusal:
        raise TrainingFailed(f"{refusal}; then `dstune train {run_dir}` writes them")


def status_of(request: Request) -> str:
    """Return the `status` of `result.json` for the request that ended the run."""
    if request.action & Action.PREEMPT:
        return "preempted"
    if request.action & Action.FAIL:
        return "failed"
    if request.action & Action.PRUNE:
        return "pruned"
    return "stopped" if request.reason else "completed"


def _conclude(
    run: Training, checkpoints: Checkpoints, run_dir: Path, tokenizer: Any, preparation: Preparation, *, unsaved: bool
) -> dict[str, Any]:
    """Save, run the measurements of the end, and export; return their entries of `result.json`. Every rank must call it.

    unsaved: an evaluation followed the last save.
    """
    state, config = run.state, run.config
    result: dict[str, Any] = {}
    run.saves.wait_for_pending_save()
    newest = store.newest(run_dir)
    # After an evaluation the checkpoint is saved again, so that it records whether it is the best one.
    is_save_due = run.world.broadcast(unsaved or newest is None or newest.name != store.tag(state.step))
    if is_save_due and not save(run, now=True):
        reason = f"step {state.step} could not be saved: {run.saves.refusal}"
        raise TrainingFailed(f"{reason}; fix it, then run `dstune train {run_dir}`")
    result["weights_step"] = restore_best(run, checkpoints, run_dir)
    evaluate_monitored_sets(run, "after")
    measure_moment(run, tokenizer, "after")
    if run.data.test is not None:
        result["test"] = run.evaluator(run.data.test).metrics
    if run.world.is_main:
        result |= preparation.result(run)
    if run.data.validation is not None and config.evaluate.counterfactual:
        state.results["counterfactual"] = run.evaluator.counterfactual(run.data.validation)
    if config.run.export is not Export.none and run.world.is_main:
        result["export"] = str(export(run_dir, config))
    run.world.barrier()
    return result


def restore_best(run: Training, checkpoints: Checkpoints, run_dir: Path) -> int:
    """Load the best weights if `run.export=best`, so that the exported model is the one that is tested. Returns the step of the
    loaded weights."""
    best = store.best(run_dir) if run.world.is_main and run.config.run.export is Export.best else None
    best = run.world.broadcast(best)
    best_evaluation = run.state.best
    if (
        run.log
        and run.config.run.export is Export.best
        and best_evaluation
        and (best is None or best.name != store.tag(best_evaluation.step))
    ):
        substitute = (
            "the last weights stand in for it" if best is None else "the best one that was saved stands in for it"
        )
        run.log.message(
            f"warning: the best evaluation, after step {best_evaluation.step}, has no checkpoint here: {substitute}"
        )
    if best is None or best.name == store.tag(run.state.step):
        return run.state.step
    checkpoints.load_weights(best)
    step = int(store.read_state(best)["train"]["step"])
    if run.log:
        run.log.message(f"back to the best weights, those of step {step}, for the export and what is measured now")
    return step


def export(run_dir: Path, config: RunConfig) -> Path:
    """Export the newest checkpoint, or the best one if `run.export=best`, into `export` of the run; return that folder."""
    from dstune.checkpoint.export import export_checkpoint

    checkpoint = store.newest(run_dir)
    if config.run.export is Export.best:
        checkpoint = store.best(run_dir) or checkpoint
    assert checkpoint is not None, "the final save comes before the export"
    return export_checkpoint(run_dir, checkpoint, run_dir / "export", config=config, force=True)


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json` atomically."""
    files.write(run_dir / "result.json", json_text(redacted(result), indent=1))
