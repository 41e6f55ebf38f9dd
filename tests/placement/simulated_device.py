"""A simulated accelerator: values in the host's memory, a device of their own.

`install()` makes `sim:0` the accelerator of this process, for torch, DeepSpeed and dstune alike. An operation that mixes
tensors of `sim:0` with tensors of the CPU raises, as it does on a GPU; what makes the host wait for a GPU is counted by the
line that asks for it. It cannot be taken back, so a test installs it in a process of its own.

A simulated tensor is a wrapper without memory around a tensor of the CPU (`SimulatedTensor.inner`), to which torch hands every
operation. Streams do nothing, and kernels are those of the CPU: placement and numbers are shown, speed and memory are not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._device import _device_constructors

NAME = "sim"
GIB = 2**30

Where = tuple[str, str]
"""(operation, file:function of whoever asked for it)."""

waits: Counter[Where] = Counter()
"""What made the host wait for the device, since the last `forget`."""

_forgotten = 0


def waited() -> int:
    """How often the host has waited for the device since the start."""
    return _forgotten + waits.total()


def forget() -> None:
    global _forgotten
    _forgotten = waited()
    waits.clear()


class MixedDevices(RuntimeError):
    """As torch raises "Expected all tensors to be on the same device"."""


class SimulatedTensor(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self, **unused: Any) -> str:
        return f"simulated {self.inner!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds the values."""
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """As torch copies parameters: without what DeepSpeed has hung on them."""
        copied: torch.Tensor = SimulatedTensor(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        elif self.requires_grad:
            copied.requires_grad_()
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation with at least one simulated tensor, or one that makes a tensor on the device."""
    name = operation._schema.name.removeprefix("aten::")
    leaves = list(_tensors((args, kwargs)))
    simulated = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
    plain = [leaf for leaf in leaves if not isinstance(leaf, SimulatedTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    _refuse_mixed(name, args, simulated, plain)
    if _waits(name, args, kwargs, simulated, plain, target):
        waits[name, _caller()] += 1
    if name in INSTEAD:
        operation = INSTEAD[name]
    if name == "mm" and operation._overloadname == "dtype":
        operation = _wide_product
    inner_args, inner_kwargs = _changed(_inner, (args, kwargs))
    output = operation(*inner_args, **inner_kwargs)
    on_device = bool(simulated) if target is None else target == NAME
    if name == "copy_":
        on_device = isinstance(args[0], SimulatedTensor)
    if not on_device:
        return output
    # What an operation in place returns is the tensor that it was given.
    wrappers = {id(tensor.inner): tensor for tensor in simulated}

    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        return wrappers[id(tensor)] if id(tensor) in wrappers else SimulatedTensor(tensor)

    return _changed(wrapped, output)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in arguments of an operation, which are tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _changed(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """As `torch.utils._pytree.tree_map_only`, in a tenth of its time: it was half of a step's."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_changed(change, one) for one in value])
    if isinstance(value, dict):
        return {key: _changed(change, one) for key, one in value.items()}
    return value


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


MOVES = {"copy_", "_to_copy", "set_"}
"""Operations that are there to bring values from one device to another."""
INDEXES = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


def _refuse_mixed(name: str, args: Sequence[Any], simulated: list[Any], plain: list[torch.Tensor]) -> None:
    """Raises MixedDevices. As on a GPU, a tensor of the CPU that holds a single number goes with all, and what lies on a GPU is
    indexed by tensors of either."""
    if not simulated or name in MOVES:
        return
    foreign = [tensor for tensor in plain if tensor.dim() > 0]
    if name in INDEXES and isinstance(args[0], SimulatedTensor):
        positions = {id(index) for index in args[1] if isinstance(index, torch.Tensor)}
        foreign = [tensor for tensor in foreign if id(tensor) not in positions]
    if foreign:
        problem = f"{name} of tensors on {NAME} and on the CPU, at {_caller()}"
        print(f"MIXED {problem}", file=sys.stderr, flush=True)
        raise MixedDevices(problem)


ALWAYS_WAITS = {
    *("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"),
}
"""The size or the value of the result has to be known on the host."""


def _waits(
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    simulated: list[Any],
    plain: list[torch.Tensor],
    target: str | None,
) -> bool:
    """Whether CUDA's version of the operation would wait for the stream (`torch.cuda.set_sync_debug_mode`)."""
    if name in ALWAYS_WAITS:
        return bool(simulated)
    if name == "_to_copy" and target is not None:
        moves = bool(simulated) if target == "cpu" else not simulated
        return moves and not kwargs.get("non_blocking", False)
    if name == "copy_":
        crosses = isinstance(args[0], SimulatedTensor) is not isinstance(args[1], SimulatedTensor)
        # A number is filled in, not copied.
        return crosses and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if name in INDEXES and simulated:
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        return any(
            index.dtype in (torch.bool, torch.uint8) or not isinstance(index, SimulatedTensor) for index in indices
        )
    return False


OWN = ("/torch/", "/simulated_device.py", "<frozen", "<string>", "/contextlib.py")


def _caller() -> str:
    """file:function of the innermost frame that is neither torch's nor of this folder."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in OWN):
            place = path.rpartition("site-packages/")[2] if "site-packages/" in path else path
            place = "dstune/" + place.rpartition("/dstune/")[2] if "/dstune/" in place else place
            place = "tests" if "/tests/" in place else place
            return f"{place}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "main"


# --- what a CPU has no kernel for ---------------------------------------------------------------------------------------


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """`torch_attn::_varlen_attn` by a loop over the sequences."""
    starts, _, _, _, causal, scale, window = (*rest, *(None,) * 7)[:7]
    output = torch.empty_like(query)
    for place in _sequences(starts):
        shares, _, v = _shares(query[place], key[place], value[place], causal, scale, window)
        output[place] = (shares @ v).transpose(0, 1).to(query.dtype)
    return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: Any, *rest: Any
) -> tuple[torch.Tensor, ...]:
    """By hand: below the dispatcher there is no autograd."""
    _, starts, _, _, _, causal, _, scale, window = (*rest, *(None,) * 9)[:9]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for place in _sequences(starts):
        shares, k, v = _shares(query[place], key[place], value[place], causal, scale, window)
        outward = gradient[place].float().transpose(0, 1)
        of_shares = outward @ v.transpose(1, 2)
        scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
        found[0][place] = (scores @ k).transpose(0, 1).to(query.dtype)
        for to, states in (
            (1, scores.transpose(1, 2) @ query[place].float().transpose(0, 1)),
            (2, shares.mT @ outward),
        ):
            found[to][place] = states.unflatten(0, (-1, groups)).sum(1).transpose(0, 1).to(query.dtype)
    return tuple(found)


def _sequences(starts: torch.Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(starts.tolist())]


def _shares(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None, window: Any
) -> tuple[torch.Tensor, ...]:
    """Probabilities, keys and values in fp32 [heads, positions, ...] of one sequence, [positions, heads, size]."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    behind = torch.arange(len(query))[:, None] - torch.arange(len(key))
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if right >= 0:
        hidden |= behind < -right
    if left >= 0:
        hidden |= behind > left
    groups = query.shape[1] // key.shape[1]
    q = query.float().transpose(0, 1)
    k, v = (part.float().transpose(0, 1).repeat_interleave(groups, dim=0) for part in (key, value))
    scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1), k, v


def _wide_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return left.to(dtype) @ right.to(dtype)


INSTEAD: dict[str, Callable[..., Any]] = {
    "_fused_sdp_choice": lambda *args, **kwargs: 0,  # the plain way: what is chosen has to have a kernel on a CPU
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


# --- the device ---------------------------------------------------------------------------------------------------------


class _Event:
    """One that is timed is over when the host has waited for anything since."""

    def __init__(self, enable_timing: bool = False, **unused: Any) -> None:
        self._timed, self._after = enable_timing, 0

    def record(self, stream: Any = None) -> None:
        self._after = waited()

    def synchronize(self) -> None:
        if not self.query():
            waits["synchronize", _caller()] += 1

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return not self._timed or waited() > self._after

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Stream:
    def __init__(self, *unused: Any, **more: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *unused: Any) -> None: ...

    def synchronize(self) -> None:
        waits["synchronize", _caller()] += 1

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)


STREAM = _Stream()
"""The one that everything is computed on."""


class Device(backend_registration._DummyBackendModule):
    """`torch.sim`, with what `torch.cuda` has."""

    Event, Stream = _Event, _Stream

    def set_device(self, device: Any) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return STREAM

    default_stream = current_stream

    def stream(self, stream: _Stream) -> _Stream:
        return stream

    def synchronize(self, device: Any = None) -> None:
        waits["synchronize", _caller()] += 1

    def get_device_name(self, device: Any = None) -> str:
        return "simulated accelerator"

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return (9, 0)

    def is_bf16_supported(self, **unused: Any) -> bool:
        return True

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 8 * GIB, 8 * GIB

    def memory_allocated(self, device: Any = None) -> int:
        return GIB

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


GROWING = ("arange", "eye", "randperm")

_library: list[torch.library.Library] = []


def install() -> None:
    """Make `sim:0` the accelerator of this process."""
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=Device())
    library = torch.library.Library("_", "IMPL", "PrivateUse1")
    library.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    _library.append(library)  # it ends with its last reference
    _patch_torch()
    _tell_deepspeed()


def _patch_torch() -> None:
    """What torch does below its dispatcher."""
    data = torch._C.TensorBase.data

    def set_data(tensor: torch.Tensor, new: torch.Tensor) -> None:
        if isinstance(tensor, SimulatedTensor) is isinstance(new, SimulatedTensor):
            if isinstance(tensor, SimulatedTensor):
                tensor.inner = new.inner
            data.__set__(tensor, new)
            return
        kept = {name: value for name, value in vars(tensor).items() if name != "inner"}
        fresh: torch.Tensor = SimulatedTensor(new.inner) if isinstance(new, SimulatedTensor) else new.detach()
        if isinstance(tensor, torch.nn.Parameter):
            fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad:
            fresh.requires_grad_(True)
        # As `torch.utils.swap_tensors`, which refuses tensors with weak references: these go on to the same object.
        tensor.__class__, fresh.__class__ = fresh.__class__, tensor.__class__
        tensor.__dict__, fresh.__dict__ = vars(fresh) | kept, vars(tensor)
        torch._C._swap_tensor_impl(tensor, fresh)

    torch.Tensor.data = property(data.__get__, set_data)  # type: ignore[assignment]

    def apply(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for one in module.modules() if recurse else [module]:
            for parameter in one._parameters.values():
                if parameter is not None:
                    with torch.no_grad():
                        parameter.data = change(parameter.detach())
            for name, buffer in one._buffers.items():
                if buffer is not None:
                    one._buffers[name] = change(buffer)
        return module

    torch.nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    make, to_list = torch.tensor, torch.Tensor.tolist
    _device_constructors()  # remembers torch's own `tensor`, which has to follow `with torch.device("meta")`

    def tensor(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    def tolist(values: torch.Tensor) -> Any:
        if not isinstance(values, SimulatedTensor):
            return to_list(values)
        waits["tolist", _caller()] += 1
        return to_list(values.inner)

    def new_tensor(
        like: torch.Tensor, values: Any, *, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        return tensor(values, device=like.device if device is None else device, dtype=dtype or like.dtype, **kwargs)

    def growing(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """torch makes an empty tensor on the device and lets it grow, which a wrapper cannot."""

        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            on_device = device is not None and torch.device(device).type == NAME
            return SimulatedTensor(make(*args, **kwargs)) if on_device else make(*args, device=device, **kwargs)

        return made

    torch.tensor = tensor
    for name in GROWING:
        setattr(torch, name, growing(getattr(torch, name)))
    torch.Tensor.new_tensor = new_tensor  # type: ignore[method-assign, assignment]
    torch.Tensor.tolist = tolist  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = lambda tensor, *unused: tensor  # type: ignore[method-assign, assignment]


def _tell_deepspeed() -> None:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        def __init__(self) -> None:
            super().__init__()
            self._name = NAME

        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(NAME, device_index or 0)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{NAME}:0"

        def device_count(self) -> int:
            return 1

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == NAME

        def is_synchronized_device(self) -> bool:
            return False  # what CUDA answers too: DeepSpeed takes its ways with streams and events

        Stream, Event = property(lambda self: _Stream), property(lambda self: _Event)

        def stream(self, stream: Any) -> Any:
            return stream or nullcontext()

        def current_stream(self, device_index: int | None = None) -> _Stream:
            return STREAM

        default_stream = current_stream

        def synchronize(self, device_index: int | None = None) -> None:
            Device.synchronize(self)

        def _of(self, dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
            return lambda values: torch.tensor(values, dtype=dtype, device=NAME)

        FloatTensor = property(lambda self: self._of(torch.float32))
        DoubleTensor = property(lambda self: self._of(torch.float64))
        BFloat16Tensor = property(lambda self: self._of(torch.bfloat16))
        HalfTensor = property(lambda self: self._of(torch.float16))
        ByteTensor = property(lambda self: self._of(torch.uint8))
        IntTensor = property(lambda self: self._of(torch.int32))
        LongTensor = property(lambda self: self._of(torch.int64))

    set_accelerator(Accelerator())
    # What `zero.Init` puts back when it is left.
    from deepspeed.runtime.zero import partition_parameters

    for name in ("tensor", *GROWING):
        setattr(partition_parameters, f"_orig_torch_{name}", getattr(torch, name))
