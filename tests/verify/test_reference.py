"""The comparison by hand arithmetic, and the batches and weights that come from formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dstune_verify import golden, models, reference
from dstune_verify.world import World

RATE = 0.5
BEFORE = {"a": torch.tensor([4.0, 8.0]), "b": torch.tensor([1.0])}
GRADIENTS = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}


def errors_of(after: dict[str, list[float]], losses=(2.0,), dtype=torch.float32) -> reference.Errors:
    weights = {name: torch.tensor(values) for name, values in after.items()}
    return reference.compare(BEFORE, weights, GRADIENTS, losses, [2.0], RATE, dtype)


def test_the_expected_step_is_right():
    errors = errors_of({"a": [2.5, 8.0], "b": [-1.0]})
    assert (errors.gradient, errors.tensor, errors.scale, errors.norm_ratio) == (0.0, 0.0, 0.0, 1.0)
    assert errors.exceeds(reference.BOUNDS["fp32"]) == ""


def test_half_the_gradient_is_an_error_of_one_half():
    errors = errors_of({"a": [3.25, 8.0], "b": [0.0]})
    assert (errors.gradient, errors.scale, errors.norm_ratio) == pytest.approx((0.5, 0.5, 0.5))
    assert "error of gradient is 0.5, bound 0.02" in errors.exceeds(reference.BOUNDS["bf16"])


def test_one_wrong_tensor_is_named_though_the_norm_is_right():
    errors = errors_of({"a": [2.5, 8.0], "b": [3.0]})  # the sign of b is wrong
    assert (errors.tensor, errors.tensor_name, errors.norm_ratio) == (pytest.approx(2.0), "b", 1.0)
    assert errors.gradient == pytest.approx(8 / 5)


def test_not_a_number_is_above_every_bound():
    assert errors_of({"a": [math.nan, 8.0], "b": [-1.0]}).exceeds(reference.BOUNDS["bf16"])
    assert errors_of({"a": [2.5, 8.0], "b": [-1.0]}, losses=[math.nan]).exceeds(reference.BOUNDS["bf16"])


def test_a_frozen_weight_that_moves_is_wrong_whatever_the_gradient():
    before = BEFORE | {"frozen": torch.ones(1)}
    after = {"a": torch.tensor([2.5, 8.0]), "b": torch.tensor([-1.0]), "frozen": torch.tensor([1.0001])}
    errors = reference.compare(before, after, GRADIENTS, [2.0], [2.0], RATE, torch.float32)
    assert errors.exceeds(reference.BOUNDS["fp32"]) == "frozen weight frozen changed"


def test_rounding_of_the_weights_is_no_error():
    """A weight of 8 in bf16 is rounded by up to 2^-6 (8 bits): a gradient error of 2^-6 / rate."""
    errors = errors_of({"a": [2.5, 8.0 - 2**-6], "b": [-1.0]}, dtype=torch.bfloat16)
    assert errors.gradient == pytest.approx(2**-6 / RATE / 5)
    assert errors.exceeds(reference.BOUNDS["fp32"]) == ""
    assert errors_of({"a": [2.5, 8.0 - 2**-6], "b": [-1.0]}).exceeds(reference.BOUNDS["fp32"])


def test_the_plain_loop_averages_and_clips():
    model = torch.nn.Linear(1, 1, bias=False)
    model.forward = lambda batch: model.weight.sum() * batch  # type: ignore[method-assign]
    weights = {"weight": torch.tensor([[7.0]])}
    losses, gradients = reference.plain_gradients(model, weights, [[1.0, 2.0], [3.0, 6.0]], 0.0)
    assert losses == [[7.0, 14.0], [21.0, 42.0]]
    assert gradients["weight"].item() == 3.0
    _, clipped = reference.plain_gradients(model, weights, [[1.0, 2.0], [3.0, 6.0]], 1.5)
    assert clipped["weight"].item() == pytest.approx(1.5)
    _, below = reference.plain_gradients(model, weights, [[1.0, 2.0], [3.0, 6.0]], 30.0)
    assert below["weight"].item() == 3.0


def test_the_formula_gives_the_same_numbers_everywhere():
    values = models.hashed(4, "blocks.0.norm1.weight")
    assert values.tolist() == [-0.1996459332294762, 0.4819950396195054, 0.5723046851344407, 0.9280781233683228]
    many = models.hashed(100_000, "embedding.weight")
    assert float(many.mean()) == pytest.approx(0, abs=0.01)
    assert float(many.var()) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 3), (3, 2)])
def test_micro_batches_average_to_the_mean_over_all_targets(ranks, accumulation):
    batches = [batch for of_rank in models.make_batches(0, ranks, accumulation) for batch in of_rank]
    assert sum(float(batch.weights.sum()) for batch in batches) / len(batches) == pytest.approx(1.0)
    weights = {float(weight) for batch in batches for weight in batch.weights.flatten()} - {0.0}
    assert len(weights) == 1
    if len(batches) > 1:
        assert len({int((batch.weights > 0).sum()) for batch in batches}) > 1


def test_a_model_whose_weights_have_other_names_is_not_compared_with_known_losses(monkeypatch):
    """Mixtral's experts were modules of their own up to transformers 4."""
    world = World(0, 1, 0, torch.device("cpu"), store=None)
    monkeypatch.setattr(golden, "NETWORKS", {name: golden.NETWORKS[name] for name in ("gpt2", "mixtral")})
    assert golden.check_networks(world)[0] == ""
    monkeypatch.setitem(golden.GOLDEN, "mixtral", (1.0, 1.0))
    assert "mixtral: the loss is 4.65411, expected 1" in golden.check_networks(world)[0]
    monkeypatch.setitem(golden.LAYOUTS, "mixtral", 0)
    assert golden.check_networks(world)[0] == ""
