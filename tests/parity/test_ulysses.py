"""Rows whose positions several ranks share train as rows in one piece: the plain loop's losses, gradient norms and weights."""

from __future__ import annotations

import json

import pytest
import torch
from parity.test_ladder import PROGRAM, STAGES, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from parity.test_tensor import compare_with_the_plain_loop, references  # noqa: F401 (fixture)
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.tiny import save_decoder

from dstune.config.compose import compose

ULYSSES = ["parallel=ulysses", "model.config_overrides={attention_dropout:0.0}"]
"""Without dropout, whose random numbers belong to positions of a rank."""
STILL = "model.config_overrides={attention_dropout:0.0}"


def save_windowed(folder):
    """A tiny model whose first layer looks back 8 positions and whose second one at all: EXAONE 4, where both layers hold the
    window and the second is passed none."""
    import torch
    from transformers import Exaone4Config, Exaone4ForCausalLM

    save_decoder(folder)
    known = json.loads((folder / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")
    torch.manual_seed(0)
    settings = {key: known[key] for key in (*same, *tokens)}
    layers = {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    Exaone4ForCausalLM(Exaone4Config(**settings, **layers, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "size", "stages"),
    [(2, 2, STAGES), pytest.param(4, 4, (3,), marks=pytest.mark.ci), pytest.param(4, 2, (2, 3), marks=pytest.mark.ci)],
)
def test_shared_rows_equal_the_plain_loop(workshop, references, ranks, size, stages):  # noqa: F811
    """Two ranks with the four heads of queries and two of keys, two groups of them, and four ranks, for which a head of keys
    is repeated; packed rows, and rows of different lengths of which a rank may have no target."""
    compare_with_the_plain_loop(workshop, references, ranks, size, stages, ULYSSES)


def test_evaluation_lora_checkpointing_and_windows_of_attention(workshop):  # noqa: F811
    """What goes through other code than a plain step: the held-out loss, adapters with activations that are computed again
    (attention exchanges once more in the backward pass), and layers that look back a few positions only."""
    windowed = save_windowed(workshop.folder / "windowed")
    cases = {
        "lora": ["method=lora", "method.dropout=0", "trainer.activation_checkpointing=true", "optimizer.lr=2"],
        "window": [f"model.path={windowed}", "data.packing=true"],
    }
    common = ["zero=stage3", STILL, "evaluate.at_start=true", "trainer.max_steps=3"]
    plain = [workshop.case(f"plain-{name}", *common, *overrides) for name, overrides in cases.items()]
    run_ranks(PROGRAM, 1, plain)
    shared = [workshop.case(f"shared-{name}", *common, *overrides, *ULYSSES) for name, overrides in cases.items()]
    run_ranks(PROGRAM, 2, shared)
    for name in cases:
        one, two = (workshop.result(f"{kind}-{name}") for kind in ("plain", "shared"))
        for when in ("eval_initial", "eval_final"):
            assert two[when]["targets"] == one[when]["targets"]
            assert two[when]["loss"] == pytest.approx(one[when]["loss"], rel=5e-6), name
        assert two["tokens"] == one["tokens"]
        for key in ("loss", "grad_norm"):
            values = [[row[key] for row in workshop.rows(f"{kind}-{name}")] for kind in ("plain", "shared")]
            assert values[1] == pytest.approx(values[0], rel=1e-5), (name, key)
            assert abs(values[0][2] - values[0][0]) > 1e-3, "three steps change it"
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        left, right = (load_file(workshop.folder / f"{kind}-{name}" / "export" / file) for kind in ("plain", "shared"))
        assert all((left[key] - right[key]).abs().max() < 5e-6 for key in left), name


@pytest.mark.ci
def test_a_run_goes_on_with_shared_rows_and_without_them(workshop):  # noqa: F811
    """Stopped after a step with two ranks on each row, after another one with rows of their own, finished with the first."""
    limit = "run.time_limit=0.000001"
    common = ["optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", STILL, "trainer.max_steps=3"]
    own, shared = ["zero=stage2"], ["zero=stage3", "parallel=ulysses"]
    run_ranks(
        PROGRAM,
        2,
        [
            workshop.case("moved-1", *common, *shared, limit, directory="moved"),
            workshop.case("moved-2", *common, *own, limit, directory="moved"),
            workshop.case("moved-3", *common, *shared, directory="moved"),
            workshop.case("stays", *common, *own),
            workshop.case("again", *common, *shared),
            workshop.case("again-cut", *common, *shared, limit, directory="again-cut"),
            workshop.case("again-end", *common, *shared, directory="again-cut"),
        ],
    )
    moved, stays = (workshop.rows(name) for name in ("moved", "stays"))
    assert [row["step"] for row in moved] == [1, 2, 3]
    assert [row["loss"] for row in moved] == pytest.approx([row["loss"] for row in stays], rel=1e-5)
    assert exact(workshop.folder / "again-cut") == exact(workshop.folder / "again")
    left, right = (
        load_file(workshop.folder / name / "export" / "model.safetensors") for name in ("again", "again-cut")
    )
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert (
        compose([f"model.path={workshop.folder / 'again' / 'export'}", "data.train=x"]).config.parallel.name == "none"
    )
