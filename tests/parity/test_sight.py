"""Models that see, trained on rows with images: losses, gradients and weights are those of a plain loop with the model's own
processor, in every family, packed or padded, on one and two ranks, at every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint import store
from dstune.checkpoint.shards import Weights
from dstune.config.compose import compose
from dstune.config.run_file import read_run, write_run
from dstune.core.errors import UserError
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.models.load import load_tokenizer
from dstune.trainer.sight import refuse_with_images
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

    def case(
        self,
        kind: str,
        stage: int,
        *,
        packed: bool,
        sees: bool,
        ranks: int,
        name: str = "",
        changes: Sequence[str] = (),
    ) -> dict[str, str]:
        """changes: further overrides, of a case with this `name`."""
        name = f"{kind}-{stage}-{'packed' if packed else 'padded'}-{'tower' if sees else 'frozen'}-{ranks}{name}"
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
            *changes,
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


def compare(expected: Reference, run: Path, *, looser: float = 1.0) -> None:
    """looser: by how much what is compared may differ more than the losses of chats."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "grad_norm" in row]
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=looser * 1e-6), run
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=looser * 1e-5), run
    weights = Weights(store.newest(run))
    differences = {name: weights[name].detach().double() - expected.weights[name] for name in weights}
    for name, difference in differences.items():
        # A bias of the projector is the sum of many gradients: the plain loop in fp32 is off by 8.7e-6 itself (Qwen3-VL).
        assert float(difference.norm() / expected.weights[name].norm()) < looser * 1e-5, (run, name)
    everything = torch.cat([expected.weights[name].flatten() for name in weights]).norm()
    assert float(torch.cat([part.flatten() for part in differences.values()]).norm() / everything) < looser * 1e-6, run


COMPARED = [*FAMILIES]
UNPACKED = ["gemma3", "gemma4", "qwen3_5"]
"""Packed rows of these are refused."""
PACKED = [kind for kind in COMPARED if kind not in UNPACKED]
SELECTION = ["llava"]


def marked(kinds: list[str]) -> list[Any]:
    """A small selection runs with every test, the families with those that take longer."""
    return [kind if kind in SELECTION else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", marked(COMPARED))
def test_padded_rows_on_one_rank(shop: Shop, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(shop, 1, [(kind, 2, False, False), (kind, 0, False, True)], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_on_one_rank(shop: Shop, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(shop, 1, [(kind, 1, True, False), (kind, 3, True, True)], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPARED)
def test_two_ranks_at_every_stage(shop: Shop, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some micro-batches have no image, and one rank has none in a step."""
    packed = kind in PACKED
    cases = [(kind, stage, packed and bool(stage % 2), sees) for stage in range(4) for sees in (False, True)]
    verify(shop, 2, cases, monkeypatch)


@pytest.mark.ci
def test_two_ranks_one_without_an_image(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(shop, 2, [("qwen2_vl", 3, True, False), ("llava", 3, False, True), ("llava", 2, True, True)], monkeypatch)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", pytest.param("gemma4", marks=pytest.mark.ci)])
def test_families_that_are_not_packed_are_refused(
    shop: Shop, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    run = read_run(Path(shop.case(kind, 2, packed=True, sees=False, ranks=1)["run_yaml"])).config
    data = prepare(run, load_tokenizer(run.model), RankEnv(0, 1, 0, 1, "test"), tmp_path / "cache")
    with pytest.raises(UserError, match=rf"data\.packing.*{kind}"):
        refuse_with_images(run, data)
    refuse_with_images(replace(run, data=replace(run.data, packing=False)), data)


def test_a_tower_is_not_trained_on_text(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    run = read_run(Path(shop.case("llava", 2, packed=False, sees=True, ranks=1)["run_yaml"])).config
    rows = write_rows(tmp_path / "data", 3, images=lambda row: 0)
    run = replace(run, data=replace(run.data, train=str(rows)))
    data = prepare(run, load_tokenizer(run.model), RankEnv(0, 1, 0, 1, "test"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"model\.train_vision"):
        refuse_with_images(run, data)


@pytest.mark.ci
def test_a_run_that_is_continued_ends_with_the_same_bits(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, and two more in another launch; against four at once. Packed, tower trained, partitioned."""
    monkeypatch.setenv("DSTUNE_CACHE", str(shop.folder / "cache"))
    case = shop.case("qwen2_vl", 3, packed=True, sees=True, ranks=1)
    two, four = read_run(Path(case["run_yaml"])), shop.folder / "four.yaml"
    write_run(four, replace(two, config=replace(two.config, trainer=replace(two.config.trainer, max_steps=4))))
    runs = [str(shop.folder / "runs" / name) for name in ("at-once", "continued")]
    run_ranks(
        PROGRAM,
        1,
        [
            {"run_yaml": str(four), "run_dir": runs[0]},
            {"run_yaml": case["run_yaml"], "run_dir": runs[1]},
            {"run_yaml": str(four), "run_dir": runs[1]},
        ],
    )
    whole, continued = (Weights(store.newest(Path(run))) for run in runs)
    assert set(whole) == set(continued)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_without_images_has_zeros_for_the_tower(shop: Shop, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch is one row, so that a rank often computes one without an image while another has one."""
    monkeypatch.setenv("DSTUNE_CACHE", str(shop.folder / "cache"))
    cases = [
        shop.case(
            "llava",
            stage,
            packed=False,
            sees=True,
            ranks=ranks,
            name="-single",
            changes=["trainer.micro_batch_size=1", f"zero.reduce_bucket_size={bucket}"],
        )
        for stage, bucket in ((0, 10**6), (1, 1000), (2, 10**6), (3, 10**6))
    ]
    run_ranks(PROGRAM, ranks, cases)
    for case in cases:
        compare(shop.plain("llava", sees=True), Path(case["run_dir"]))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_rank_without_images_changes_no_update(
    shop: Shop, precision: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of a trained tower, and bf16: two and three ranks, at every stage, move weights as one rank does."""
    monkeypatch.setenv("DSTUNE_CACHE", str(shop.folder / "cache"))
    stages = (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3)
    changes = ["method=lora", f"trainer.precision={precision}", "trainer.micro_batch_size=1"]
    runs = []
    for ranks in (1, 2, 3):
        cases = [
            shop.case("llava", stage, packed=False, sees=True, ranks=ranks, name=f"-lora-{precision}", changes=changes)
            for stage in (stages if ranks > 1 else stages[:1])
        ]
        run_ranks(PROGRAM, ranks, cases)
        runs += [Path(case["run_dir"]) for case in cases]
    alone, *others = (moved(run) for run in runs)
    scale = torch.cat([change.flatten() for change in alone.values()]).norm()
    assert any("vision_tower" in name for name in alone) and len(others) == 2 * len(stages)
    for run, other in zip(runs[1:], others, strict=True):
        difference = torch.cat([(other[name] - change).flatten() for name, change in alone.items()])
        assert float(difference.norm() / scale) < bound, run


def moved(run: Path) -> dict[str, torch.Tensor]:
    """Return the second matrix of each adapter, which begins at zero."""
    weights = Weights(store.newest(run))
    return {name: weights[name].detach().double() for name in weights if "lora_B" in name}
