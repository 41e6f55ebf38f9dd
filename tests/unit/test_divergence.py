"""The chunked divergence against autograd on whole logits, in the formula of GKD."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dstune.models import cross_entropy
from dstune.models.divergence import BlockDivergence, Objective, measured_divergence, projected_divergence
from dstune.models.logit_transform import LogitTransform
from dstune.tasks.distillation.teacher import ChunkedLogits

TARGETS, HIDDEN, VOCABULARY = 23, 12, 50


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.more = nn.Linear(HIDDEN, VOCABULARY), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden) + self.more(hidden)


def whole(objective: Objective, transform, own, taught, targets) -> torch.Tensor:
    """float64; the teacher has more rows than the student, which stand for no token."""
    own = own.double() * transform.scale
    own = own if transform.cap is None else transform.cap * torch.tanh(own / transform.cap)
    s, t = (own / objective.temperature).softmax(-1), (taught[:, :VOCABULARY] / objective.temperature).softmax(-1)
    if objective.beta == 0:
        apart = (t * (t / s).log()).sum()
    elif objective.beta == 1:
        apart = (s * (s / t).log()).sum()
    else:
        m = objective.beta * t + (1 - objective.beta) * s
        apart = (objective.beta * t * (t / m).log() + (1 - objective.beta) * s * (s / m).log()).sum()
    text = nn.functional.cross_entropy(own, targets, reduction="sum")
    return (1 - objective.text_weight) * apart + objective.text_weight * text


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["linear", "adapted"])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, beta, chunk, kind):
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    monkeypatch.setitem(cross_entropy.BLOCK_ELEMENTS, "cpu", 3 * VOCABULARY)
    projection = Adapted() if kind == "adapted" else nn.Linear(HIDDEN, VOCABULARY, bias=False)
    teacher = nn.Linear(HIDDEN + 4, VOCABULARY + 6).requires_grad_(False)
    states, targets = torch.randn(TARGETS, HIDDEN + 4), torch.randint(0, VOCABULARY, (TARGETS,))
    for cap, temperature, weight in itertools.product((None, 1.5), (1.0, 1.7), (0.0, 0.4)):
        objective, transform = Objective(beta, temperature, weight), LogitTransform(0.7, cap)
        hidden = torch.randn(TARGETS, HIDDEN, requires_grad=True)
        parameters = [hidden, *projection.parameters()]
        taught = ChunkedLogits(states, teacher, LogitTransform(), 5)
        block_loss = BlockDivergence(objective, transform, taught, targets)
        found = projected_divergence(projection, projection.forward, hidden, block_loss)
        expected = whole(objective, transform, projection(hidden), teacher(states).double(), targets)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        gradients = torch.autograd.grad(3 * found, parameters)
        for one, other in zip(gradients, torch.autograd.grad(3 * expected, parameters), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
        with torch.no_grad():
            loss, measured = measured_divergence(projection.forward, hidden, block_loss, 4)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
        final = transform(projection(hidden))
        assert float(measured.text_loss) == pytest.approx(float(nn.functional.cross_entropy(final, targets)) * TARGETS)
        assert int(measured.correct) == int((final.argmax(-1) == targets).sum())


def test_no_targets_give_every_weight_a_gradient_of_zeros():
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    taught = ChunkedLogits(torch.empty(0, HIDDEN), projection, LogitTransform(), 5)
    block_loss = BlockDivergence(Objective(0.5, 1.0), LogitTransform(), taught, torch.empty(0, dtype=torch.long))
    projected_divergence(projection, projection.forward, torch.empty(0, HIDDEN), block_loss).backward()
    assert projection.weight.grad is not None and not projection.weight.grad.any()


def test_a_loss_of_zero_where_student_and_teacher_agree():
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, targets = torch.randn(TARGETS, HIDDEN), torch.zeros(TARGETS, dtype=torch.long)
    for beta in (0.0, 0.5, 1.0):
        taught = ChunkedLogits(hidden, projection, LogitTransform(), 5)
        block_loss = BlockDivergence(Objective(beta, 1.0), LogitTransform(), taught, targets)
        loss = projected_divergence(projection, projection.forward, hidden, block_loss)
        (gradient,) = torch.autograd.grad(loss, projection.weight)
        assert abs(float(loss)) < 1e-5 and float(gradient.abs().max()) < 1e-6


def test_a_probe_finds_caps_and_scales(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

    from dstune.tasks.distillation.teacher import ProbedHead

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 40}
    capped = Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0)
    scaled = GraniteConfig(**sizes, logits_scaling=4.0)
    for config, expected in ((capped, (1.0, 3.0)), (scaled, (0.25, None))):
        model = AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.arange(6)[None]
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0]
            head = ProbedHead(model)
            assert head.examine(model, torch.device("cpu"))
            assert (head.transform.scale, head.transform.cap) == expected
            kept = torch.tensor([1, 4])
            hidden = head.hidden_states(model, {"input_ids": tokens}, kept, 6)
            taught = head.transform(model.get_output_embeddings()(hidden))
        torch.testing.assert_close(taught, logits[kept])
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits[0], logits), "it is as it was"
