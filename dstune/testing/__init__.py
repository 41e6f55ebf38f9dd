"""For the authors of plugins: `check_plugin` proves one on a tiny model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
"""Relative difference of losses between one rank and two: sums in another order."""


def check_plugin(
    file: str | os.PathLike[str],
    *overrides: str,
    rows: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    decoder: bool = False,
) -> dict[str, Any]:
    """Train a plugin on a tiny random model in fp32 and compare: one rank with two, and a resumed run with an undisturbed one.

    Prints a line for each thing as soon as it is proved.

    Args:
        file: the plugin, as in `plugins=[...]`.
        overrides: what chooses it: `"task=my_task"`, `"optimizer=mine"`, ... with what its rows need.
        rows: at least 24 rows to train on; words of the texts become the vocabulary.
        folder: an empty folder for the model and the runs.
        decoder: a language model (Llama) in place of an encoder (BERT).

    Returns:
        `result` (that of the run), `evaluation` (its metrics again, from the run directory), `answers` (predictions for the
        first rows; None of a task that writes text), `export` (the folder).

    Raises:
        AssertionError: what differs, with both values.
        dstune.UserError: the plugin or the rows are refused.
    """
    import dstune
    from dstune.protocols import task_of
    from dstune.testing.tiny import save_model

    place = Path(folder).absolute()
    save_model(place / "model", rows, decoder=decoder)
    settings = [
        f"model.path={place / 'model'}",
        "data.max_length=64",
        "data.split.validation=0.25",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        "trainer.precision=fp32",  # bf16, the default of newer hardware, is coarser than TOLERANCE
        "schedule=constant",
        "checkpoint.every=2",
        *overrides,
    ]

    def run(name: str, steps: int, ranks: int, *further: str) -> dstune.Run:
        where = [f"run.dir={place / name}", f"trainer.max_steps={steps}", f"launch.processes={ranks}"]
        return dstune.train(*settings, *where, *further, train=rows, plugins=[file], progress=False)

    whole = run("two-ranks", 4, 2, "zero=stage2")
    alone = run("one-rank", 4, 1, "zero=stage0")
    losses = _losses(whole)
    print(f"trained: {len(losses)} steps on two ranks at ZeRO stage 2, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    _same("the losses of one rank and two", _losses(alone), losses, TOLERANCE)
    print(f"ranks: one rank at stage 0 has the same losses, within {TOLERANCE:g}")
    run("resumed", 2, 2, "zero=stage2")
    resumed = run("resumed", 4, 2, "zero=stage2")
    _same("the losses of a resumed run", _losses(resumed), losses, 0.0)
    files = _same_weights(resumed.dir / "export", whole.dir / "export")
    print(f"resume: a run resumed at step 2 has the same losses, and the same bytes in {', '.join(files)}")
    measured = _evaluated(whole)
    print(f"evaluation: dstune evaluate measures what the run measured: {', '.join(measured)}")
    answers = None
    if not task_of(whole.config.task).generates:
        answers = whole.predict(rows[:4])
        assert len(answers) == len(rows[:4]), "there is not an answer for each row"
        print(f"prediction: {len(answers)} rows have {len(answers)} answers, with {', '.join(answers[0])}")
    exported = whole.export(place / "exported")
    print(f"export: {exported} has {', '.join(sorted(file.name for file in exported.glob('*.safetensors')))}")
    return {"result": whole.result, "evaluation": measured, "answers": answers, "export": exported}


def _losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row]


def _same_weights(resumed: Path, undisturbed: Path) -> list[str]:
    """Compare the files of weights by their bytes; return their names."""
    files = sorted(undisturbed.glob("*.safetensors"))
    assert files, f"there are no weights in {undisturbed}"
    for file in files:
        are_equal = file.read_bytes() == (resumed / file.name).read_bytes()
        assert are_equal, f"the weights of a resumed run differ from those of an undisturbed one: {file.name}"
    return [file.name for file in files]


def _evaluated(run: Any) -> dict[str, Any]:
    """Return the metrics of `dstune evaluate`, which are those of the run's last evaluation."""
    measured: dict[str, Any] = run.evaluate()["metrics"]
    final = run.result["eval_final"]
    names = [name for name in measured if isinstance(final.get(name), (int, float))]
    assert names, "dstune evaluate measures nothing that the run measured"
    _same("the metrics of dstune evaluate", [measured[n] for n in names], [final[n] for n in names], TOLERANCE)
    return measured


def _same(name: str, values: Sequence[float], expected: Sequence[float], tolerance: float) -> None:
    pairs = zip(values, expected, strict=True)
    are_equal = all(math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance) for value, other in pairs)
    assert are_equal, f"{name} differ: {list(values)}, expected {list(expected)}"
