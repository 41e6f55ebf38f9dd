"""Runs of one test module: composed, trained many to a process group, and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dstune.config.compose import compose
from dstune.config.run_file import Composed, write_run

VOLATILE = {
    "tokens_per_second",
    "positions_per_second",
    "targets_per_second",
    "utilization",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "update_seconds",
    "rollout_seconds",
    "peak_memory_gib",
    "eval/seconds",
    "time",
    "slowest_rank",
    "slowest_to_median",
}
"""What of a row of metrics is another number in every run."""


PLAIN = (
    "data=files",
    "optimizer=sgd",
    "schedule=constant",
    "trainer.precision=fp32",
    "trainer.grad_clip=0",
    "zero.param_persistence_threshold=0",  # tiny parameters are partitioned too
    "evaluate.at_start=false",
)
"""Of runs that are compared with a plain loop: beside this their lengths, rates and batches."""
AT_THE_END = ("evaluate.every=0", "checkpoint.every=0")


class Results:
    """What the runs in `folder` have left."""

    folder: Path

    def written(self, name: str, composed: Composed, directory: str | None = None) -> dict[str, str]:
        """Return a case of `parity/train_cases.py`."""
        path = self.folder / f"{name}.yaml"
        write_run(path, composed)
        return {"run_yaml": str(path), "run_dir": str(self.folder / (directory or name))}

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name: str) -> dict[str, Any]:
        return load_file(self.folder / name / "export" / "model.safetensors")

    def result(self, name: str) -> dict:
        return json.loads((self.folder / name / "result.json").read_text())


class Workshop(Results):
    """base: overrides of every run, which evaluates and saves at its end unless they say otherwise."""

    def __init__(self, folder: Path, base: Sequence[str]):
        self.folder, self._base = folder, base

    def config(self, *overrides: str) -> Composed:
        return compose([*AT_THE_END, *self._base, *overrides])

    def case(self, name: str, *overrides: str, directory: str | None = None) -> dict[str, str]:
        """Return a case of `parity/train_cases.py`."""
        composed = self.config(f"run.dir={self.folder / (directory or name)}", *overrides)
        return self.written(name, composed, directory)

    def cells(
        self, size: int, kinds: Mapping[str, Sequence[str]], cells: Sequence[tuple[str, int]]
    ) -> list[dict[str, str]]:
        """Return KIND-sSTAGE-nSIZE for each kind and ZeRO stage of `cells`."""
        return [self.case(f"{kind}-s{stage}-n{size}", *kinds[kind], f"zero=stage{stage}") for kind, stage in cells]

    def stopped_and_continued(self, name: str, *overrides: str) -> list[dict[str, str]]:
        """Run NAME-whole without a stop, and NAME-cut that is stopped after its first step and then continued."""
        limit = "run.time_limit=0.000001"  # over after the first step of each launch
        return [
            self.case(f"{name}-whole", *overrides),
            self.case(f"{name}-cut", *overrides, limit),
            self.case(f"{name}-end", *overrides, directory=f"{name}-cut"),
        ]

    def rows(self, name: str) -> list[dict]:
        """Return metrics rows, without times and memory."""
        return [{key: value for key, value in row.items() if key not in VOLATILE} for row in super().rows(name)]
