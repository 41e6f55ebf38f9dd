"""Chooses the kernel that computes attention in packed rows on an accelerator.

It is the first kernel whose output and gradients, for the heads of this model on this device, equal those of attention by its
definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.config.schema import Attention, RunConfig
from dstune.core.distributed import World
from dstune.models import varlen
from dstune.models.attention import SamplesApart, SpanAttention
from dstune.models.spans import attention_problem, with_spans
from dstune.models.varlen import Boundaries, Kernel, boundaries_of
from dstune.protocols import method_of, task_of
from dstune.zero import accelerator

SIZES = 8
"""Flash kernels take heads whose size is a multiple of this; others are padded with zeros."""

LENGTHS = (9, 23)
"""Positions of the two samples with which each kernel is tried."""
WINDOW = 5
"""Sliding window with which each kernel is tried if the model has one."""
CLOSE = 0.05
"""Largest accepted difference from fp32, relative to the largest entry: half precision rounds inputs, probabilities and outputs."""


class Heads(NamedTuple):
    """The attention heads that a kernel has to compute."""

    queries: int
    keys: int
    sizes: tuple[int, ...] = (128,)
    """All sizes that a head has in some layer, rounded up to a multiple of `SIZES`."""
    window: bool = False
    """Whether some layer has a sliding window."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (None, WINDOW) if self.window else (None,)

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> Heads:
        names = ("head_dim", "qk_head_dim", "v_head_dim")
        sizes_of_modules = {
            max(module_sizes)
            for module in model.modules()
            if (module_sizes := [_number(module, name) for name in names]) and any(module_sizes)
        }
        sizes = sizes_of_modules or {config.hidden_size // config.num_attention_heads}
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        rounded = sorted({-(-size // SIZES) * SIZES for size in sizes})
        return cls(config.num_attention_heads, keys, tuple(rounded), bool(getattr(config, "sliding_window", None)))


def _number(module: nn.Module, name: str) -> int:
    value = getattr(module, name, 0)
    return value if isinstance(value, int) else 0


def choose(kernels: Iterable[Kernel], heads: Heads, dtype: torch.dtype) -> tuple[Kernel | None, list[str]]:
    """Return the first kernel that computes these heads on this rank's device (None if none does), and why each one before it does
    not."""
    given_up: list[str] = []
    for kernel in kernels:
        tried = (problem_of(kernel, heads, size, window, dtype) for size in heads.sizes for window in heads.windows)
        if not (problem := next(filter(None, tried), "")):
            return kernel, given_up
        given_up.append(f"{kernel.name}: {problem}")
    return None, given_up


def problem_of(kernel: Kernel, heads: Heads, size: int, window: int | None, dtype: torch.dtype) -> str:
    """Compute two samples with the kernel. Return how its output or a gradient differs from attention by its definition, or what it
    raises; empty if it is correct."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads.queries, heads.keys, heads.keys, heads.queries)
    drawn = [torch.randn(sum(LENGTHS), count, size, generator=generator).to(dtype) for count in counts]
    starts = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    scale = size**-0.5
    boundaries = Boundaries(starts.to(accelerator.current()), max(LENGTHS))
    try:
        inputs = [part.to(accelerator.current()) for part in drawn]
        outputs = _with_gradients(lambda q, k, v: kernel.compute(q, k, v, boundaries, scale, window), inputs)
        outputs = [part.cpu().float() for part in outputs]
    except Exception as error:  # any error of a library, a compiler or a driver
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__} {first}".strip()
    expected = _with_gradients(
        lambda q, k, v: by_definition(q, k, v, starts.tolist(), scale, window), [part.float() for part in drawn]
    )
    differences = [
        float((output - true).abs().max() / true.abs().max()) for output, true in zip(outputs, expected, strict=True)
    ]
    worst = max(differences, key=lambda value: (value != value, value))
    return "" if worst <= CLOSE else f"differs by {worst:.1%} of the largest"


def _with_gradients(compute: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output for queries, keys and values, and their gradients. tensors: these three, and the gradient of the output."""
    *states, incoming = tensors
    states = [part.detach().requires_grad_() for part in states]
    with torch.enable_grad():
        output = compute(*states)
    return [output.detach(), *torch.autograd.grad(output, states, incoming)]


def by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: list[int], scale: float, window: int | None
) -> torch.Tensor:
    """Compute causal attention by its definition, one sample at a time; returns [positions, heads, size].

    query: [positions, heads, size]; key, value: the same, with a number of heads that divides that of the queries. starts: first
    position of each sample, then the number of positions.
    """
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for begin, end in pairwise(starts):
        q = query[begin:end].transpose(0, 1)
        k, v = (part[begin:end].transpose(0, 1).repeat_interleave(groups, dim=0) for part in (key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (distance < 0) | (distance >= (window or end))
        outputs.append(((q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


class PackedAttention(SpanAttention):
    """Attention of packed rows by one kernel. The head of the language model passes it the boundaries of samples."""

    NAME = "dstune_packed"

    def __init__(self, model: PreTrainedModel, kernel: Kernel, requested: str = Attention.auto.value):
        self.kernel, self.title, self._requested = kernel, kernel.name, requested
        self.install(model)

    @classmethod
    def of(
        cls, config: RunConfig, model: PreTrainedModel, world: World, message: Callable[[str], None]
    ) -> PackedAttention | None:
        """Install the first kernel that computes the rows of this run on the accelerator. Return None, and change nothing, if no
        kernel does or ranks would choose different ones.

        Every rank must call it. message: called with each line that the user should read."""
        requested = config.model.attention
        if requested not in (Attention.auto, Attention.flash_attention_2) or not accelerator.present():
            return None
        if not task_of(config.task).language or model.dtype not in (torch.bfloat16, torch.float16):
            return None
        dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
        if dropout or method_of(config.method).in_front or model.config.is_encoder_decoder or attention_problem(model):
            return None
        kernels = list(varlen.kernels())
        if requested is Attention.flash_attention_2:
            kernels.sort(key=lambda kernel: kernel.name not in varlen.FLASH_MODULES)
        kernel, given_up = choose(kernels, Heads.of(model, model.config.get_text_config()), model.dtype)
        for problem in given_up:
            message(f"model.attention={requested.value}: not by {problem}")
        names = world.gather("" if kernel is None else kernel.name)
        if len(set(names)) > 1:
            kinds = ", ".join(sorted({name or "none" for name in names}))
            message(f"model.attention={requested.value}: by masks, since ranks have different kernels ({kinds})")
            return None
        return None if kernel is None else cls(model, kernel, requested.value)

    def boundaries(self, inputs: Mapping[str, torch.Tensor]) -> Boundaries:
        return boundaries_of(inputs)

    def model_inputs(
        self,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        boundaries: tuple[torch.Tensor, int] | None = None,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the model's inputs and the labels. boundaries: from the loader; computed here if None."""
        spans = boundaries_of(inputs) if boundaries is None else Boundaries(*boundaries)
        return with_spans(inputs, labels, spans), labels

    def refuse(self, reason: str) -> str:
        """Give the model back the attention that it was loaded with, and return the message about it."""
        self.uninstall()
        return (
            f"model.attention={self._requested}: {self._original}, since rows have other logits than their samples alone by"
            f" {self.kernel.name} ({reason})"
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Any,
        *,
        dropout: float,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        rows, _, positions, size = query.shape
        of_value = value.shape[-1]
        width, dtype = max(size, of_value), self._model.dtype  # peft may leave norms in fp32
        q, k, v = (_flat(states, width).to(dtype) for states in (query, key, value))
        output = self.kernel.compute(q, k, v, spans, scale, window)[..., :of_value].to(query.dtype)
        return output.view(rows, positions, -1, of_value).transpose(1, 2)


def _flat(states: torch.Tensor, size: int) -> torch.Tensor:
    """Flatten states: [rows, heads, positions, size] -> [rows * positions, heads, size rounded up]."""
    flat = states.transpose(1, 2).flatten(0, 1)
    missing = -(-size // SIZES) * SIZES - states.shape[-1]
    return functional.pad(flat, (0, missing)) if missing else flat


def attention_of_samples(
    config: RunConfig, model: PreTrainedModel, world: World, message: Callable[[str], None]
) -> PackedAttention | SamplesApart | None:
    """Return the attention that keeps packed samples apart in this run and on this device; None if masks do. Every rank must
    call it."""
    return PackedAttention.of(config, model, world, message) or SamplesApart.of(config, model)
