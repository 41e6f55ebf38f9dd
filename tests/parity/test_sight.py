"""Models that see, trained on rows with images: losses, gradients and weights are those of a plain loop with the model's own
processor, in every family, packed or padded, on one and two ranks, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstune.checkpoint import store
from dstune.checkpoint.shards import Weights
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from tests.parity.plain_sight import train_plainly
from tests.parity.reference import Reference
from tests.support.ranks import run_ranks
from tests.support.sight import FAMILIES, save, write_rows

PROGRAM = Path(__file__).with_name("train_cases.py")
RATE = 0.05
SIZES = ((32, 32), (40, 56), (64, 30))


class Shop:
    """Models and rows of all families, and the runs on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._plain: dict[tuple[str, bool], Reference] = {}

    def model(self, kind: str) -> Path:
        folder = self.folder / "models" / kind
        return folder if folder.is_dir() else save(kind, folder)

    @property
    def rows(self) -> Path:
        """Seven rows: with one image, with two, with none."""
        file = self.folder / "data" / "rows.jsonl"
        counts = [1, 0, 2, 1, 0, 1, 1]
        return file if file.is_file() else write_rows(file.parent, 7, images=counts.__getitem__, sizes=SIZES)

    def plain(self, kind: str, *, sees: bool) -> Reference:
        if (kind, sees) not in self._plain:
            self._plain[kind, sees] = train_plainly(self.model(kind), self.rows, steps=2, rate=RATE, sees=sees)
        return self._plain[kind, sees]

    def case(self, kind: str, stage: int, *, packed: bool, sees: bool, ranks: int) -> dict[str, str]:
        name = f"{kind}-{stage}-{'packed' if packed else 'padded'}-{'tower' if sees else 'frozen'}-{ranks}"
        words = [
            "task=chat",
            "method=full",
            f"model.path={self.model(kind)}",
            f"model.train_vision={str(sees).lower()}",
            "model.attention=sdpa",
            "data=files",
            f"data.train={self.rows}",
            "data.split.validation=0",
            "data.max_length=256",
            "data.workers=1",
            f"data.packing={str(packed).lower()}",
            f"zero=stage{stage}",
            "zero.param_persistence_threshold=0",
            "optimizer=sgd",
            f"optimizer.lr={RATE}",
            "optimizer.weight_decay=0",
            "schedule=constant",
            "trainer.grad_clip=0",
            "trainer.precision=fp32",
            "trainer.micro_batch_size=2",
            "trainer.global_batch_size=7",
            "trainer.max_steps=2",
            "checkpoint.every=2",
            "evaluate.every=0",
            "evaluate.at_start=false",
            "evaluate.samples=0",
            "run.export=none",
            "tracking.wandb.mode=disabled",
        ]
        file = self.folder / f"{name}.yaml"
        write_run(file, compose(words))
        return {"run_yaml": str(file), "run_dir": str(self.folder / "runs" / name)}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("sight"))


def verify(shop: Shop, ranks: int, cases: list[tuple[str, int, bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """cases: family, stage, whether rows are packed, whether the tower is trained."""
    monkeypatch.setenv("DSTUNE_CACHE", str(shop.folder / "cache"))
    described = [shop.case(kind, stage, packed=packed, sees=sees, ranks=ranks) for kind, stage, packed, sees in cases]
    run_ranks(PROGRAM, ranks, described)
    for (kind, _, _, sees), case in zip(cases, described, strict=True):
        compare(shop.plain(kind, sees=sees), Path(case["run_dir"]))


def compare(expected: Reference, run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "grad_norm" in row]
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6), run
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=1e-5), run
    weights = Weights(store.newest(run))
    for name in weights:
        true = expected.weights[name]
        assert float((weights[name].detach().double() - true).norm() / true.norm()) < 1e-6, (run, name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_padded_rows_on_one_rank(shop: Shop, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(shop, 1, [(kind, 2, False, False), (kind, 0, False, True)], monkeypatch)
