"""lion, muon and adamw_8bit: a plain loop = dstune at every ZeRO stage; continued to the bit; on other ranks, or refused.

The plain loop has the formulas of the papers by hand, in float64; bitsandbytes' own optimizer for adamw_8bit, on vectors that
are cut as the stage cuts them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from parity.reference import Reference, train_plainly
from parity.test_ladder import BASE, PROGRAM, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks
from support.tiny import save_decoder

ENGINES = Path(__file__).with_name("optimizer_ranks.py")
RATE, DECAY = 1e-3, 0.1
COMMON = ["data.packing=false", f"optimizer.lr={RATE}", f"optimizer.weight_decay={DECAY}"]
STAGES = (0, 1, 2, 3)


class Lion:
    def __init__(self):
        self.momentum: dict[str, torch.Tensor] = {}

    def __call__(self, model):
        for name, parameter in model.named_parameters():
            momentum = self.momentum.setdefault(name, torch.zeros_like(parameter))
            direction = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
            decay = DECAY if parameter.dim() > 1 else 0.0
            parameter.copy_(parameter - RATE * (direction + decay * parameter))
            momentum.copy_(0.99 * momentum + 0.01 * parameter.grad)


class Adam:
    """By hand, for the parameters that `chosen` names."""

    def __init__(self, chosen):
        self.chosen, self.steps, self.moments = chosen, 0, {}

    def __call__(self, model):
        self.steps += 1
        for name, parameter in model.named_parameters():
            if not self.chosen(name, parameter):
                continue
            first, second = self.moments.setdefault(name, [torch.zeros_like(parameter) for _ in range(2)])
            first.copy_(0.9 * first + 0.1 * parameter.grad)
            second.copy_(0.999 * second + 0.001 * parameter.grad**2)
            update = first / (1 - 0.9**self.steps) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            decay = DECAY if parameter.dim() > 1 else 0.0
            parameter.copy_(parameter - RATE * (update + decay * parameter))


def in_a_layer(name, parameter):
    return parameter.dim() == 2 and ".layers." in name


class Muon:
    def __init__(self):
        self.momentum: dict[str, torch.Tensor] = {}
        self.rest = Adam(lambda name, parameter: not in_a_layer(name, parameter))

    def __call__(self, model):
        self.rest(model)
        for name, parameter in model.named_parameters():
            if not in_a_layer(name, parameter):
                continue
            momentum = self.momentum.setdefault(name, torch.zeros_like(parameter))
            momentum.copy_(0.95 * momentum + 0.05 * parameter.grad)
            update = 0.95 * momentum + 0.05 * parameter.grad
            # The singular values that the iteration leads to, one by one.
            left, values, right = torch.linalg.svd(update / update.norm(), full_matrices=False)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            orthogonal = left @ torch.diag(values) @ right * 0.2 * math.sqrt(max(parameter.shape))
            parameter.copy_(parameter - RATE * (orthogonal + DECAY * parameter))


class InBytes:
    """bitsandbytes' own on the vectors of a stage: each parameter, what a rank has of all laid end to end (1, 2), or of each
    (3)."""

    def __init__(self, stage: int, ranks: int):
        self.stage, self.ranks, self.optimizer = stage, ranks, None
        self.rest = Adam(lambda name, parameter: not self.rounded(name, parameter))

    def rounded(self, name, parameter):
        return parameter.dim() == 2 and "embed" not in name

    def pieces(self, tensors):
        flat = [tensor.reshape(-1) for tensor in tensors]
        if self.stage == 0:
            return flat
        if self.stage == 3:
            shares = [[*one.split(-(-one.numel() // self.ranks))] for one in flat]
            return [torch.cat([share[rank] for share in shares]) for rank in range(self.ranks)]
        joined = torch.cat(flat)
        return list(joined.split(-(-joined.numel() // self.ranks)))

    def __call__(self, model):
        from bitsandbytes.optim import AdamW8bit

        self.rest(model)
        chosen = [p for name, p in model.named_parameters() if self.rounded(name, p)]
        weights, gradients = self.pieces(chosen), self.pieces([p.grad for p in chosen])
        if self.optimizer is None:
            self.flats = [torch.nn.Parameter(piece.detach().float()) for piece in weights]
            self.optimizer = AdamW8bit(self.flats, lr=RATE, weight_decay=DECAY, min_8bit_size=0)
        for flat, gradient in zip(self.flats, gradients, strict=True):
            flat.grad = gradient.float()
        self.optimizer.step()
        indices = self.pieces([torch.arange(p.numel()) + 10**6 * number for number, p in enumerate(chosen)])
        for flat, places in zip(self.flats, indices, strict=True):
            for number, parameter in enumerate(chosen):
                mine = places // 10**6 == number
                parameter.view(-1)[places[mine] % 10**6] = flat.detach()[mine].double()


APART = {"muon": 0.0, "lion": 1e-4, "adamw_8bit": 1e-3}
"""Largest share of the elements that differ by more than 1e-6: an update that is a sign, or made of states in 8 bits, turns a
difference of 1e-7 into a step. Measured: 0, 0 and 1e-4."""
REFERENCES = {"lion": Lion, "muon": Muon}


@pytest.fixture(scope="module")
def references(workshop) -> dict[str, Reference]:  # noqa: F811
    cache = workshop.folder / "cache"
    return {
        name: train_plainly(
            workshop.composed(f"plain-{name}", f"optimizer={name}", *COMMON).config, cache, update=made()
        )
        for name, made in REFERENCES.items()
    }


def plain_of_bytes(workshop, stage: int, ranks: int) -> Reference:  # noqa: F811
    config = workshop.composed("plain-bytes", "optimizer=adamw_8bit", *COMMON).config
    return train_plainly(config, workshop.folder / "cache", update=InBytes(stage, ranks))


CELLS = {
    2: [(name, stage) for name in ("lion", "muon", "adamw_8bit") for stage in STAGES],
    3: [("lion", 3), ("muon", 1), ("muon", 3), ("adamw_8bit", 2)],
}
LONG = 1800
"""Seconds for the ranks of a test, on cores that are busy."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_plain_loop_has_the_same_curve_and_weights(workshop, references, ranks):  # noqa: F811
    """To 1e-6 in fp32, but for elements whose sign or byte falls on the other side (`APART`)."""
    names = CELLS[ranks]
    cases = [
        workshop.case(f"{name}-s{stage}-n{ranks}", f"optimizer={name}", f"zero=stage{stage}", *COMMON)
        for name, stage in names
    ]
    run_ranks(PROGRAM, ranks, cases, timeout=LONG)
    for name, stage in names:
        expected = references.get(name) or plain_of_bytes(workshop, stage, ranks)
        run = f"{name}-s{stage}-n{ranks}"
        rows = workshop.rows(run)
        tolerance = 1e-6 if name == "muon" else 1e-5
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=tolerance), run
        trained = workshop.weights(run)
        apart = torch.cat([(trained[key] - weight).abs().flatten() for key, weight in expected.weights.items()])
        assert (apart > 1e-6).double().mean() <= APART[name], run
        assert apart.max() < 5 * 2 * RATE, run
    assert (torch.cat([weight.flatten() for weight in expected.weights.values()])).abs().max() > 0.1


KINDS = [(name, stage, "fp32") for name in ("lion", "muon", "adamw_8bit") for stage in STAGES]
KINDS += [(name, stage, "bf16") for name in ("muon", "adamw_8bit") for stage in (1, 2, 3)]
OTHER_LAYOUTS = [(2, 3), (2, 0), (1, 2), (3, 1), (3, 3)]
"""(ranks, stage) that take up a checkpoint of 2 ranks at stage 2."""


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / "weights.pt")


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """What engines on two ranks did; see `optimizer_ranks.py`."""
    folder = tmp_path_factory.mktemp("engines")
    save_decoder(folder / "model")
    cases = [
        {"name": f"{name}-{stage}-{precision}", "optimizer": name, "stage": stage, "precision": precision}
        for name, stage, precision in KINDS
    ]
    cases.append({"name": "muon-offload", "optimizer": "muon", "stage": 3, "precision": "fp32", "offload": "cpu"})
    run_ranks(ENGINES, 2, {"folder": str(folder), "model": str(folder / "model"), "cases": cases}, timeout=LONG)
    return folder


def test_a_saved_engine_goes_on_to_the_bit(engines):
    names = [f"{name}-{stage}-{precision}" for name, stage, precision in KINDS] + ["muon-offload"]
    for name in names:
        found = saved(engines / name)
        assert any((found["after"][key] != value).any() for key, value in found["before"].items()), name
        for key, value in found["after"].items():
            assert torch.equal(found["continued"][key], value), f"{name}: {key}"


def test_every_stage_has_the_same_weights(engines):
    """In fp32, of optimizers whose states do not depend on the layout; states in host memory too."""
    for name in ("lion", "muon"):
        first = saved(engines / f"{name}-0-fp32")["after"]
        others = [f"{name}-{stage}-fp32" for stage in (1, 2, 3)] + ["muon-offload"] * (name == "muon")
        for other in others:
            apart = torch.cat(
                [(saved(engines / other)["after"][key] - value).flatten() for key, value in first.items()]
            )
            assert (apart.abs() > 1e-6).double().mean() <= APART[name], other


def test_lion_and_muon_are_taken_up_by_other_ranks_and_stages(engines):
    for ranks in (1, 2, 3):
        cases = [
            {
                "name": f"{name}-taken-{ranks}-{stage}",
                "optimizer": name,
                "stage": stage,
                "precision": "fp32",
                "takes": f"{name}-2-fp32",
            }
            for name in ("lion", "muon")
            for size, stage in OTHER_LAYOUTS
            if size == ranks
        ]
        run_ranks(
            ENGINES, ranks, {"folder": str(engines), "model": str(engines / "model"), "cases": cases}, timeout=LONG
        )
        for case in cases:
            expected = saved(engines / case["takes"])["after"]
            found = saved(engines / case["name"])["after"]
            apart = torch.cat([(found[key] - value).flatten() for key, value in expected.items()])
            assert (apart.abs() > 1e-6).double().mean() <= APART[case["optimizer"]], case["name"]


def noise_of_samples(model, batch):
    """The loss of `next_token_loss`, with NEFTune's noise by hand."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    embedded = model.get_input_embeddings()(ids)
    drawn = torch.rand(embedded.shape) * 2 - 1
    largest = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(len(ids)):
        starts = [0] if mask is not None else [n for n in range(ids.shape[1]) if positions[row, n] == 0]
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            length = int(mask[row].sum()) if mask is not None else end - start
            largest[row, start:end] = 5 / math.sqrt(length * embedded.shape[-1])
    disturbed = embedded + drawn * largest.unsqueeze(-1)
    others = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    logits = model(inputs_embeds=disturbed, **others, use_cache=False).logits
    expected = batch["labels"][:, 1:].flatten()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), expected, ignore_index=-100, reduction="sum")
    return loss, int((expected != -100).sum())


def test_noise_on_embeddings_is_that_of_a_plain_loop_on_any_ranks_and_after_a_stop(workshop):  # noqa: F811
    noise = ["model.neftune_alpha=5", "evaluate.every=1"]
    kinds = {"padded": [*noise, "data.packing=false"], "packed": [*noise, "data.packing=true"]}
    plain, silent = {}, {}
    for kind, more in kinds.items():
        config = workshop.composed(f"plain-noise-{kind}", *more).config
        plain[kind] = train_plainly(config, workshop.folder / "cache", loss_of=noise_of_samples)
        silent[kind] = train_plainly(config, workshop.folder / "cache")
    limit = "run.time_limit=0.000001"
    for ranks, stage in ((1, 2), (2, 3), (3, 1)):
        cases = [workshop.case(f"noise-{kind}-n{ranks}", f"zero=stage{stage}", *more) for kind, more in kinds.items()]
        run_ranks(PROGRAM, ranks, cases)
    run_ranks(PROGRAM, 2, [workshop.case("noise-cut", "zero=stage3", *kinds["packed"], limit)])
    run_ranks(PROGRAM, 2, [workshop.case("noise-end", "zero=stage3", *kinds["packed"], directory="noise-cut")])
    assert exact(workshop.folder / "noise-cut") == exact(workshop.folder / "noise-packed-n2")
    for kind, expected in plain.items():
        assert abs(expected.losses[0] - silent[kind].losses[0]) > 1e-3
        for ranks in (1, 2, 3):
            rows = workshop.rows(f"noise-{kind}-n{ranks}")
            assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6)
            trained = workshop.weights(f"noise-{kind}-n{ranks}")
            assert all((trained[key] - weight).abs().max() < 1e-6 for key, weight in expected.weights.items())


def test_states_in_8_bits_are_not_continued_in_another_layout(workshop):  # noqa: F811
    more = ["optimizer=adamw_8bit", *COMMON]
    limit = "run.time_limit=0.000001"
    run_ranks(PROGRAM, 2, [workshop.case("bytes-2", "zero=stage2", *more, limit)])
    case = workshop.case("bytes-3", "zero=stage3", *more, directory="bytes-2")
    with pytest.raises(
        AssertionError, match=r"written on 2 ranks at ZeRO stage 2, this run has .*, and optimizer=adamw_8bit rounds"
    ):
        run_ranks(PROGRAM, 2, [case])
    assert len(workshop.rows("bytes-2")) == 1
