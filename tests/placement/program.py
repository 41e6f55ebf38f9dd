"""Computes cells of the placement matrix: `python program.py FOLDER` reads a JSON line for each and answers with one.

A cell is a run as `dstune train` composes it, on the simulated device or on the CPU. Imports are made once; each cell is a
child of its own, which ends with its answer.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

IMPORTS = (
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "peft", "bitsandbytes"),
    *("transformers.models.t5.modeling_t5", "deepspeed", "datasets", "hydra", "dstune.config.validate"),
    *("dstune.rank.worker", "dstune.launch.first_rows", "scipy.stats", "sklearn.metrics", "seqeval.metrics"),
)


def _mix(loss_sum: Any, torch: Any) -> Any:
    return loss_sum.view(1).mul(torch.ones(1)).sum()


def _read(loss_sum: Any, torch: Any) -> Any:
    return loss_sum + 0.0 * loss_sum.item()


def _full(loss_sum: Any, torch: Any) -> Any:
    """There is room for two rows."""
    if _full.rows > 2:  # type: ignore[attr-defined]
        raise torch.OutOfMemoryError("simulated: out of memory. Tried to allocate 1 GiB.")
    return loss_sum


def _full_behind(loss_sum: Any, torch: Any) -> Any:
    """The same, and it runs out at the end of the backward pass, when the gradients of other weights are on their way."""

    def run_out(gradient: Any) -> None:
        if _full.rows > 2:  # type: ignore[attr-defined]
            raise RuntimeError("simulated: out of memory in the backward pass")

    if not _full_behind.planted:  # type: ignore[attr-defined]
        _full_behind.planted = True  # type: ignore[attr-defined]
        next(_full.engine.module.parameters()).register_hook(run_out)  # type: ignore[attr-defined]
    return loss_sum


_full_behind.planted = False  # type: ignore[attr-defined]
PLANTED = {"mix": _mix, "read": _read, "full": _full, "full_behind": _full_behind}
"""Faults that a test asks for: what becomes of the loss of a micro-batch."""


def plant(name: str) -> None:
    import torch

    from dstune.models.heads import language

    loss = language.CausalLmHead._loss
    fault = PLANTED[name]

    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        _full.rows, _full.engine = len(args[1]["input_ids"]), args[0]  # type: ignore[attr-defined]
        output = loss(self, *args, **kwargs)
        return replace(output, loss_sum=fault(output.loss_sum, torch)) if torch.is_grad_enabled() else output

    language.CausalLmHead._loss = planted  # type: ignore[method-assign]


@lru_cache(1)
def composed(argv: tuple[str, ...]) -> Any:
    """Half of a cell's time, and the same on both devices: the parent composes once for both of its children."""
    from dstune.config.compose import compose

    return compose(list(argv)).config


def compute(argv: list[str], *, simulated: bool, run_dir: Path, fault: str) -> dict[str, Any]:
    """Train in this process; losses, gradient norms, and what waited for the device, of each step."""
    from dstune.config.validate import find_problems
    from dstune.launch.first_rows import hardware_problems

    config = composed(tuple(argv))
    config = replace(config, run=replace(config.run, dir=str(run_dir)))

    problems = [*find_problems(config), *hardware_problems(config, gpus=1 if simulated else 0)]
    if problems:
        return {"refused": [str(problem.reason) for problem in problems]}
    run_dir.mkdir(parents=True)
    (run_dir / "logs").mkdir()
    if simulated:
        from tests.placement import simulated_device

        simulated_device.install()
    if fault:
        plant(fault)
    import torch

    from dstune.core.rank_env import RankEnv
    from dstune.models import kernels
    from dstune.rank import worker
    from dstune.trainer import loop
    from dstune.trainer.callbacks.preemption import Preemption
    from dstune.trainer.evaluate import Evaluator
    from dstune.trainer.out_of_memory import explained
    from dstune.zero.start import start_process_group

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DSTUNE_STORE=str(run_dir / "store"))
    world = start_process_group(RankEnv(0, 1, 0, 1, "environment"))
    preemption = Preemption(config, 0.0, run_dir, is_main=True)
    gc.disable()  # so that what set-up leaves behind is still there when it is counted
    *before, config = worker.stages_of(config, run_dir)
    for stage in before:
        worker.train_earlier_stage(stage, config, run_dir, world, preemption)
    setup = worker.Setup(config, run_dir, world, preemption, worker.StartupTimer())
    layout = setup.configure_rank()
    rows = setup.load_data(layout)
    start, rows = setup.prepare_method(layout, rows)
    built = setup.build_model(layout, rows, start)
    engine = setup.build_engine(layout, built, start)
    engines = sum(type(one).__name__ == "DeepSpeedEngine" for one in gc.get_objects())
    gc.enable()
    penalties = setup.check_arithmetic(rows, built, engine, start)
    restored = setup.restore(layout, rows, built, engine, start)
    run = setup.build_training(layout, rows, built, engine, penalties, restored)
    found: dict[str, Any] = {"losses": [], "norms": [], "micro_batches": [], "waits": [], "engines": engines}
    found["groups"] = len(run.engine._engine.optimizer.param_groups)
    found["kernels"] = kernels.of_run(built.module, built.model, run.head, run.engine.inner_optimizer)
    found["rows"] = run.config.trainer.micro_batch_size
    found["settings"], found["products"] = layout.deepspeed, torch.get_float32_matmul_precision()
    found["device"] = str(run.engine.device)
    train_step, report_step, evaluate = loop.train_step, loop.report_step, Evaluator._run
    found["evaluations"] = []

    def counted(run: Any, step: Any) -> None:
        if simulated:
            simulated_device.forget()
        train_step(run, step)

    def reported(run: Any, step: Any) -> None:
        report_step(run, step)
        found["losses"].append(step.loss)
        found["norms"].append(step.update.grad_norm)
        found["micro_batches"].append(len(step.batch.batches))
        if simulated:
            found["waits"].append([[*where, count] for where, count in sorted(simulated_device.waits.items())])

    def evaluated(self: Any, split: Any, progress: Any) -> Any:
        simulated_device.forget()
        done = [0]
        result = evaluate(self, split, lambda number, total: done.append(number))
        waits = sorted(simulated_device.waits.items())
        found["evaluations"].append([done[-1], [[*where, count] for where, count in waits]])
        return result

    loop.train_step, loop.report_step = counted, reported
    if simulated:
        Evaluator._run = evaluated
    with explained(setup.place("training"), lambda: setup.less_memory(layout)):
        loop.fit(run)
    loop.train_step, loop.report_step, Evaluator._run = train_step, report_step, evaluate
    run.callbacks.close()
    return found


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a child of this process makes of a cell."""
    with contextlib.chdir(folder), contextlib.suppress(Exception):  # a child says what is wrong
        composed(tuple(request["argv"]))
    reads, writes = os.pipe()
    log = folder / f"{request['name']}.log"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(reads)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            with contextlib.chdir(folder):
                found = compute(
                    request["argv"],
                    simulated=request["simulated"],
                    run_dir=folder / request["name"],
                    fault=request["plant"],
                )
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writes, json.dumps(found).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    found = json.loads(content) if content else {"error": f"ended with {os.waitstatus_to_exitcode(status)}"}
    output = log.read_text(errors="replace")
    # An error within the backward pass may end the process before Python hears of it.
    if mixed := [line for line in output.splitlines() if line.startswith("MIXED ")]:
        found["error"] = mixed[0]
    if "error" in found:
        found["log"] = output[-6000:]
    return {"name": request["name"], **found}


def main() -> None:
    import importlib

    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed would import it
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # else the first collection in a child copies every page of the parent's objects
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line), folder)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
