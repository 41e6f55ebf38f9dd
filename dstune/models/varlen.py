"""Kernels that compute attention for all packed samples at once, without a mask of all pairs of positions.

A kernel gets the rows end to end as one sequence, and the start of each sample in it. There are flash-attn 4 and 3 if installed,
torch's own (2.10 and newer), flash-attn 2, and flex attention. Which arguments a kernel takes is read from its signature, not from
its version. `packed_attention.py` decides which one a run uses.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional

from dstune.core.errors import Problem, UserError
from dstune.zero import accelerator


class Boundaries(NamedTuple):
    """Boundaries of samples in rows that are laid end to end; padding counts as a sample."""

    starts: torch.Tensor
    """int32 [samples + 1]: the start of each sample, and the end of the last."""
    longest: int
    """Positions of the longest sample."""


def boundaries_of(inputs: Mapping[str, torch.Tensor]) -> Boundaries:
    """Return the boundaries of samples.

    inputs: as in `spans.spans_of`. The host waits for the device that they are on, so the loader calls this while they are on the
    host.
    """
    rows, width = inputs["input_ids"].shape
    if "position_ids" in inputs:
        begins = inputs["position_ids"] == 0
    else:
        mask = inputs["attention_mask"]
        begins = torch.zeros(rows, width, dtype=torch.bool, device=mask.device)
        begins[:, 1:] = mask[:, 1:] != mask[:, :-1]  # padding comes after the tokens
    begins[:, 0] = True
    starts = functional.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=rows * width).to(torch.int32)
    return Boundaries(starts, int(starts.diff().max()))


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Boundaries, float, "int | None"], torch.Tensor]
"""Maps (query [positions, heads, size], key, value, boundaries, scale, window) to [positions, heads, size], causal within each
sample. The number of heads of key and value divides that of the queries."""


@dataclass(frozen=True)
class Kernel:
    name: str
    """Name in `environment.json` and `dstune doctor`."""
    compute: Compute
    compiled: bool = False
    """Whether its first call compiles it, which takes a minute or more."""


def torch_varlen() -> Kernel | None:
    """Return the kernel of `torch.nn.attention.varlen`, whose arguments have changed with each version since 2.10."""
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    parameters = inspect.signature(varlen_attn).parameters

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: Boundaries,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if "scale" in parameters:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        if "window_size" in parameters:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in parameters:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        elif query.shape[1] != key.shape[1]:
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        starts, longest = boundaries
        output: torch.Tensor = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
        return output

    needs_window = "window_size" not in parameters
    return Kernel(f"torch {torch.__version__.partition('+')[0]} varlen", _refuses_windows(compute, needs_window))


FLASH_MODULES = {
    "flash-attn 4": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}
BUILT_FOR: dict[str, Callable[[int], bool]] = {
    "flash-attn 4": lambda major: major >= 9,
    "flash-attn 3": lambda major: major == 9,
}
"""Whether a kernel supports a GPU, by the major number of its compute capability. On another chip it may end the process instead
of raising an error."""


def flash_attn(name: str) -> Kernel | None:
    """Return the kernel of an installed flash-attn; None if it is missing, built for another GPU, or not deterministic in a run
    that must be."""
    capability = accelerator.capability()
    if name in BUILT_FOR and not (capability and BUILT_FOR[name](capability[0])):
        return None
    try:
        function = importlib.import_module(FLASH_MODULES[name]).flash_attn_varlen_func
    except Exception:  # a package built for another torch can raise anything
        return None
    if torch.are_deterministic_algorithms_enabled() and "deterministic" not in inspect.signature(function).parameters:
        return None
    return Kernel(name, _flash(function))


def _flash(function: Callable[..., Any]) -> Compute:
    parameters = inspect.signature(function).parameters
    unlimited = None if "None" in str(getattr(parameters.get("window_size"), "default", "")) else -1

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: Boundaries,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        elif "window_size" in parameters:
            options["window_size"] = (unlimited, unlimited)
        if "deterministic" in parameters:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        starts, longest = boundaries
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        lengths = {name: value for name, value in lengths.items() if name in parameters}
        output = function(query, key, value, **lengths, **options)
        attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return attended

    return _refuses_windows(compute, "window_size" not in parameters)


def flex() -> Kernel | None:
    """Return flex attention, compiled if there is an accelerator; each micro-batch gets a new mask. None if torch has no flex
    attention."""
    try:
        module = importlib.import_module("torch.nn.attention.flex_attention")
        attention, make_mask = module.flex_attention, module.create_block_mask
    except (ImportError, AttributeError):
        return None
    if accelerator.present():
        attention, make_mask = (
            accelerator.compiled(attention, dynamic=True),
            accelerator.compiled(make_mask, dynamic=True),
        )
    made: dict[Any, Any] = {}

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: Boundaries,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        length = len(query)
        cached_mask = made.get(window)
        if cached_mask is None or cached_mask[0] is not boundaries.starts:
            places = torch.arange(length, device=query.device)
            sample = torch.bucketize(places, boundaries.starts, right=True)

            def seen(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                inside = (sample[q] == sample[k]) & (k <= q)
                return inside if window is None else inside & (q - k < window)

            mask = make_mask(seen, None, None, length, length, device=str(query.device))
            cached_mask = made[window] = (boundaries.starts, mask)
        states = (part.transpose(0, 1)[None] for part in (query, key, value))
        groups = query.shape[1] != key.shape[1]
        output: torch.Tensor = attention(*states, block_mask=cached_mask[1], scale=scale, enable_gqa=groups)
        return output[0].transpose(0, 1)

    return Kernel("flex attention", compute, compiled=accelerator.present())


def _refuses_windows(compute: Compute, refuses: bool) -> Compute:
    def checked(*args: Any) -> torch.Tensor:
        if refuses and args[5] is not None:
            reason = "the kernel for packed rows that is installed here knows no sliding window"
            raise UserError(Problem("model.attention", reason, "a newer torch, or model.attention=sdpa"))
        return compute(*args)

    return checked


def kernels() -> Iterator[Kernel]:
    """Yield the kernels to try on this machine, best first.

    flash-attn 3 and 4 use new features of Hopper and Blackwell; torch's own kernel is flash-attn 2. Whether a kernel runs on this
    GPU at all is not decided here: `packed_attention.choose` tries each one before a run uses it, on ROCm as well as on CUDA.
    """
    if accelerator.present():
        candidates = (
            flash_attn("flash-attn 4"),
            flash_attn("flash-attn 3"),
            torch_varlen(),
            flash_attn("flash-attn 2"),
            flex(),
        )
        yield from filter(None, candidates)
