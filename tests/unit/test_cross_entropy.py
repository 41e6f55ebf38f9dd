"""Chunked cross entropy against torch's own, and what it keeps in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from dstune.models import cross_entropy
from dstune.models.cross_entropy import projected_cross_entropy

ROWS, HIDDEN, VOCABULARY = 23, 12, 50


class Adapted(nn.Module):
    """A projection with something trained beside the layer, as an adapter on it has."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(HIDDEN, 2), nn.Linear(2, VOCABULARY)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden) + self.up(self.down(hidden))


def projection(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=kind == "bias")
    if kind == "frozen":
        layer.requires_grad_(False)
    return Adapted(layer.requires_grad_(False)) if kind == "adapted" else layer


def plain(module: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(module(hidden).float(), targets, reduction="sum")


def gradients(module: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, compute) -> list[torch.Tensor]:
    """The loss, and the gradients of a multiple of it: for the hidden states and each trained weight."""
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    loss = compute(module, hidden, targets)
    (0.37 * loss).backward()
    return [loss.detach(), hidden.grad, *(weight.grad for weight in module.parameters() if weight.requires_grad)]


def chunked(module: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return projected_cross_entropy(module, module.forward, hidden, targets).loss_sum


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("chunk", [3, 7, 1000])
@pytest.mark.parametrize("kind", ["linear", "frozen", "bias", "adapted"])
def test_loss_and_gradients_are_those_of_the_whole_logits(kind, chunk, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    monkeypatch.setitem(cross_entropy.BLOCK_ELEMENTS, "cpu", 2 * VOCABULARY)
    monkeypatch.setattr(cross_entropy, "SCALED_ROWS", 8)
    module = projection(kind)
    hidden, targets = torch.randn(rows, HIDDEN), torch.randint(0, VOCABULARY, (rows,))
    expected, found = (gradients(module, hidden, targets, compute) for compute in (plain, chunked))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-6)


def test_a_weight_that_is_embedding_and_projection_gets_both_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    tokens, targets = torch.randint(0, VOCABULARY, (ROWS,)), torch.randint(0, VOCABULARY, (ROWS,))
    found = []
    for compute in (plain, chunked):
        layer = projection("linear")
        compute(layer, functional.embedding(tokens, layer.weight).tanh(), targets).backward()
        found.append(layer.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=2e-6, atol=2e-6)


def test_bf16_gradients_are_as_close_to_fp32_as_the_plain_ones(monkeypatch):
    """Chunks are summed in fp32 and the scale of the loss is not rounded, so that nothing is lost beside bf16 itself."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 2 * VOCABULARY)
    layer = projection("linear")
    hidden, targets = torch.randn(512, HIDDEN), torch.randint(0, VOCABULARY, (512,))
    exact = gradients(layer, hidden, targets, plain)
    layer, hidden = layer.bfloat16(), hidden.bfloat16()
    errors = []
    for compute in (plain, chunked):
        found = gradients(layer, hidden, targets, compute)
        errors.append([float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert all(ours < 1.5 * theirs + 1e-4 for theirs, ours in zip(*errors, strict=True)), errors


def test_products_with_fp32_output_are_closer_to_fp32(monkeypatch):
    """As CUDA has them, and a CPU has not: logits are never rounded to bf16."""
    module = projection("linear").bfloat16().float()
    hidden, targets = torch.randn(ROWS, HIDDEN), torch.randint(VOCABULARY, (ROWS,))
    exact = gradients(module, hidden.bfloat16().float(), targets, plain)
    half = module.bfloat16()
    mm = torch.mm

    def wide(left, right, *, out_dtype=None, **more):
        return mm(left, right, **more) if out_dtype is None else mm(left.to(out_dtype), right.to(out_dtype))

    errors = []
    for wanted in (False, True):
        monkeypatch.setattr(cross_entropy, "supports_fp32_products", lambda *unused, wanted=wanted: wanted)
        monkeypatch.setattr(torch, "mm", wide)
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 2 * VOCABULARY)
        found = gradients(half, hidden.bfloat16(), targets, chunked)
        errors.append(
            [float((one.float() - true).norm() / true.norm()) for one, true in zip(found, exact, strict=True)]
        )
    (rounded_loss, *rounded), (loss, *wide_errors) = errors
    assert loss < rounded_loss / 2 and max(wide_errors) < 0.02 and max(rounded) < 0.02


def test_chunks_on_an_accelerator_are_whole_blocks_of_a_product():
    """512 MiB of fp32 logits, at least 256 rows."""
    for vocabulary, rows in ((128_256, 1024), (32_000, 4096), (1_000_000, 256)):
        assert cross_entropy.chunk_rows(torch.empty(0, device="meta"), vocabulary) == rows


def test_evaluation_counts_hits_over_all_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 2 * VOCABULARY)
    module = projection("linear")
    hidden = torch.randn(ROWS, HIDDEN)
    targets = module(hidden).argmax(dim=-1)
    targets[::3] = (targets[::3] + 1) % VOCABULARY
    with torch.no_grad():
        found = projected_cross_entropy(module, module.forward, hidden, targets)
    assert int(found.correct) == ROWS - len(targets[::3])
    torch.testing.assert_close(found.loss_sum, plain(module, hidden, targets))


MEMORY = """
import torch
from pathlib import Path
from torch import nn
from dstune.models.cross_entropy import projected_cross_entropy
def highest():  # not ru_maxrss, which begins with what the process had that started this one
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
torch.set_num_threads(1)
targets, hidden_size, vocabulary = 4096, 16, 151936
layer = nn.Linear(hidden_size, vocabulary, bias=False)
hidden = torch.randn(targets, hidden_size, requires_grad=True)
wanted = torch.randint(0, vocabulary, (targets,))
projected_cross_entropy(layer, layer.forward, hidden[:8], wanted[:8]).loss_sum.backward()
before = highest()
projected_cross_entropy(layer, layer.forward, hidden, wanted).loss_sum.backward()
with torch.no_grad():
    projected_cross_entropy(layer, layer.forward, hidden, wanted)
grown = highest() - before
print(grown * 1024 / (4 * targets * vocabulary))
"""


def test_no_more_than_a_tenth_of_the_logits_is_ever_in_memory():
    """4,096 targets of a vocabulary of 151,936: the share of the full fp32 logits by which the process grows."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 0.1, done.stdout


@pytest.mark.parametrize(("capping", "in_chunks"), [(None, True), (30.0, False)])
def test_a_model_that_changes_its_logits_keeps_them(capping, in_chunks):
    """Gemma 2 caps its logits softly: its loss is made of what comes out of the model, with the same figures either way."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from dstune.models.heads.language import CausalLmHead

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8, "sliding_window": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": capping}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, **sizes, **heads)).eval()
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    labels = tokens.clone()
    labels[:, :3] = -100
    logits = model(input_ids=tokens).logits
    expected = functional.cross_entropy(logits[:, 2:-1].flatten(0, 1), labels[:, 3:].flatten(), reduction="sum")
    head = CausalLmHead(model)
    assert head.examine(model, torch.device("cpu")) is in_chunks
    found = head(model, {"input_ids": tokens, "labels": labels})
    torch.testing.assert_close(found.loss_sum, expected)
    torch.testing.assert_close(model(input_ids=tokens).logits, logits)  # others get the logits as before

    def failing(**inputs):
        model(**inputs)
        raise MemoryError

    with pytest.raises(MemoryError):
        head(failing, {"input_ids": tokens, "labels": labels})
    # What was found in the pass that failed is not taken for that of the next one, which tells single rows.
    with torch.no_grad():
        again = head(model, {"input_ids": tokens, "labels": labels, "index": torch.arange(2)})
    torch.testing.assert_close(again.loss_sum, expected)
