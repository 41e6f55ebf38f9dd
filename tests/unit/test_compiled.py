"""Gated activations and rotary positions as compiled kernels: what is recognised, what is proven, and what it changes."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.models import compiled
from dstune.models.compiled import compiled_functions, compiled_if_as_exact, use_compiled
from dstune.zero import accelerator
from tests.unit.test_attention import load

BOTH = ModelConfig(fused_activations=True, fused_rotary=True)


def mlp(kind: type[nn.Module] = LlamaMLP, activation: str = "silu") -> nn.Module:
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=16, mlp_bias=False, hidden_act=activation, hidden_activation=activation
    )
    return kind(config)


class Scaled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.slope * x


@pytest.mark.parametrize(
    ("layer", "known"),
    [(mlp(), True), (mlp(GemmaMLP, "gelu_pytorch_tanh"), True), (mlp(Scaled), False), (nn.Linear(8, 8), False)],
    ids=["Llama", "Gemma", "another forward", "no gate"],
)
def test_a_layer_is_known_by_what_it_computes(layer, known):
    assert compiled._is_gated(layer) == known


def test_an_activation_with_weights_is_left_to_the_model():
    layer = mlp()
    layer.act_fn = Learned()
    assert not compiled._is_gated(layer)


def test_its_layers_alone_take_the_kernels(tmp_path, monkeypatch):
    """Attention looks its rotary positions up in its file: those of another model of the process stay the model's own."""
    calls: list[str] = []

    def counting(own, **unused):
        def kernel(*states):
            calls.append("rotary" if len(states) == 4 else "gate")
            return own(*states)

        return kernel

    monkeypatch.setattr(torch, "compile", counting)
    model, other = load(save_decoder(tmp_path)).bfloat16(), load(tmp_path).bfloat16()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    assert list(use_compiled(other, BOTH)) == []
    assert compiled_functions(other) == {"activations": True, "rotary": True}
    assert compiled_functions(model) == {"activations": False, "rotary": False}
    stands = modeling_llama.apply_rotary_pos_emb
    assert isinstance(stands, compiled._Rotary) and not isinstance(stands.original, compiled._Rotary)
    calls.clear()
    assert torch.equal(other(input_ids=ids).logits, before)
    layers = model.config.num_hidden_layers
    assert calls == ["rotary", "gate"] * layers
    assert torch.equal(model(input_ids=ids).logits, before) and len(calls) == 2 * layers


def test_a_layer_that_is_computed_in_tiles_stays_so():
    layer = mlp()
    layer.forward = tiled = partial(layer.forward)
    (told,) = use_compiled(layer, ModelConfig(fused_activations=True))
    assert "its rows are computed in tiles already" in told and layer.forward is tiled


def test_weights_of_codes_leave_the_format_to_the_adapters(monkeypatch):
    """QLoRA: the projections' own weights are bytes."""
    formats = []
    monkeypatch.setattr(
        torch, "compile", lambda own, **unused: lambda *states: formats.append(states[0].dtype) or own(*states)
    )
    layer = mlp().bfloat16()
    for projection in (layer.gate_proj, layer.up_proj):
        projection.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.uint8), requires_grad=False)
    assert list(use_compiled(layer, ModelConfig(fused_activations=True))) == []
    assert formats == [torch.bfloat16]


def test_a_model_without_them_is_told():
    assert list(use_compiled(nn.Linear(8, 8), BOTH)) == [
        "model.fused_activations: the model has no gated activation of a known form; it is computed as the model has it",
        "model.fused_rotary: the model has no rotary position of a known form; it is computed as the model has it",
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda own: lambda gate, up: own(gate, up) * 1.01, "its compiled form is less exact here"),
        (lambda own: lambda gate, up: torch.ops.no.such(gate), "it does not compile here (AttributeError"),
    ],
    ids=["wrong by a hundredth", "no compiler"],
)
def test_what_is_not_proven_stays_as_the_model_has_it(monkeypatch, changed, reason):
    monkeypatch.setattr(torch, "compile", lambda own, **unused: changed(own))
    layer = mlp().bfloat16()
    (told,) = use_compiled(layer, ModelConfig(fused_activations=True))
    assert told.startswith(f"model.fused_activations: {reason}") and told.endswith(
        "; it is computed as the model has it"
    )
    assert compiled_functions(layer) == {"activations": False, "rotary": False}


def test_a_wrong_gradient_is_seen(monkeypatch):
    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value

        @staticmethod
        def backward(context, gradient):
            return gradient / 2

    monkeypatch.setattr(torch, "compile", lambda own, **unused: lambda gate, up: own(HalfGradient.apply(gate), up))
    states = [torch.randn(8, 8) for _ in range(2)]
    kernel, problem = compiled_if_as_exact(lambda a, b: ACT2FN["silu"](a) * b, states, (), torch.bfloat16)
    assert kernel is None and "less exact" in problem


def test_compiled_code_is_kept_where_nobody_else_can_put_some(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    accelerator.compiled(abs)
    folder = tmp_path / "cache" / f"compiled-{os.getuid()}"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        accelerator.compiled(abs)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="others may write to it"):
        accelerator.compiled(abs)
