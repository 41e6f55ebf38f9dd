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
    _same("the losses of one rank and two", _losses(alone), _losses(whole), TOLERANCE)
    run("resumed", 2, 2, "zero=stage2")
    resumed = run("resumed", 4, 2, "zero=stage2")
    _same("the losses of a resumed run", _losses(resumed), _losses(whole), 0.0)
    _same_weights(resumed.dir / "export", whole.dir / "export")
    measured = _evaluated(whole)
    answers = None
    if not task_of(whole.config.task).generates:
        answers = whole.predict(rows[:4])
        assert len(answers) == len(rows[:4]), "there is not an answer for each row"
    exported = whole.export(place / "exported")
    return {"result": whole.result, "evaluation": measured, "answers": answers, "export": exported}


def _losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row]


def _same_weights(resumed: Path, undisturbed: Path) -> None:
    for kept in sorted(undisturbed.glob("*.safetensors")):
        same = kept.read_bytes() == (resumed / kept.name).read_bytes()
        assert same, f"the weights of a resumed run differ from those of an undisturbed one: {kept.name}"


def _evaluated(run: Any) -> dict[str, Any]:
    """The metrics of `dstune evaluate`, which are those of the run's last evaluation."""
    measured: dict[str, Any] = run.evaluate()["metrics"]
    final = run.result["eval_final"]
    both = [name for name in measured if isinstance(final.get(name), (int, float))]
    _same("the metrics of dstune evaluate", [measured[n] for n in both], [final[n] for n in both], TOLERANCE)
    return measured


def _same(what: str, found: Sequence[float], expected: Sequence[float], tolerance: float) -> None:
    pairs = zip(found, expected, strict=True)
    same = all(math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) for one, other in pairs)
    assert same, f"{what} differ: {list(found)}, expected {list(expected)}"
