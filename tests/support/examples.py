"""The plugins of `examples/plugins`, and what a run with each, or with all at once, is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from support.command import ROOT
from support.tiny import save_encoder

EXAMPLES = ROOT / "examples" / "plugins"

SETTINGS = [
    "model.path=encoder",
    "data.max_length=32",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "checkpoint.every=3",
    "evaluate.every=3",
    "model.config_overrides={hidden_dropout_prob: 0.1}",
]
SPLIT = ["data.split.validation=0.2"]
LABELS = "data.train=labelled.jsonl"
STARS = "data.train=stars.jsonl"

CASES = {
    "ordinal": (["ordinal"], ["task=ordinal", "task.labels=[low,middle,high]", "task.smoothing=0.05", LABELS]),
    "bitfit": (["bitfit"], ["task=classification", "method=bitfit", "method.norms=true", LABELS]),
    "star_rating": (["star_rating"], ["task=classification", "data.format=star_rating", STARS]),
    "kappa": (["kappa"], ["task=classification", "trainer.early_stopping.metric=kappa", LABELS]),
    "veto_outliers": (
        ["veto_outliers"],
        ["task=classification", "trainer.callbacks=[{veto_outliers: {factor: 1.001, at_least: 1}}]", LABELS],
    ),
    "signum": (["signum"], ["task=classification", "optimizer=signum", "optimizer.lr=1e-3", LABELS]),
}
TOGETHER = (
    ["ordinal", "bitfit", "star_rating", "kappa", "veto_outliers", "signum"],
    [
        *("task=ordinal", "task.labels=['1','2','3']", "method=bitfit", "data.format=star_rating", STARS),
        *("trainer.early_stopping.metric=kappa", "optimizer=signum", "optimizer.lr=1e-3"),
        "trainer.callbacks=[{veto_outliers: {factor: 1.001, at_least: 1}}]",
    ],
)


def prepare(folder: Path) -> None:
    """Write a tiny encoder, rows with labels, rows with stars, and the plugins."""
    save_encoder(folder / "encoder")
    labels = ("low", "middle", "high")
    labelled = [{"text": f"w{n % 5} w{n % 7} w{n % 3}", "label": labels[n % 3]} for n in range(60)]
    stars = [{"title": f"w{n % 5}", "body": f"w{n % 7} w{n % 3}", "stars": n % 3 + 1} for n in range(60)]
    for name, rows in (("labelled", labelled), ("stars", stars), ("held_out", stars[:12])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in TOGETHER[0]:
        shutil.copyfile(EXAMPLES / f"{name}.py", folder / f"{name}.py")


def overrides(case: tuple[list[str], list[str]], run: str, steps: int, *further: str) -> list[str]:
    """Return what follows `dstune train`."""
    files, settings = case
    plugins = f"plugins=[{','.join(f'{name}.py' for name in files)}]"
    return [plugins, *SETTINGS, *settings, f"trainer.max_steps={steps}", f"run.dir={run}", *further]
