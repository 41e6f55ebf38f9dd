"""A norm as transformers writes it beside `dstune/models/norms.py`: seconds of its passes, and what is kept between them.

    python benchmarks/norms.py
    python benchmarks/norms.py --rows 4096 --width 4096

Both on one thread, or on a GPU where there is one; rounds alternate, medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dstune.models.norms import use_lean_norms
from dstune.trainer.memory import keep_freed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--keep-freed", action="store_true", help="as training does: freed memory is not given back")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.keep_freed:
        keep_freed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    hf_norm = LlamaRMSNorm(options.width).to(device, dtype)
    lean_norm_module = copy.deepcopy(hf_norm)
    use_lean_norms(lean_norm_module)
    norms = {"transformers": hf_norm, "dstune": lean_norm_module}
    rows = torch.randn(options.rows, options.width, device=device).to(dtype).requires_grad_()
    incoming = torch.randn_like(rows)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in norms}
    for _ in range(options.rounds + 3):
        for name, norm in norms.items():
            rows.grad = norm.weight.grad = None
            began = now(device)
            output = norm(rows)
            between = now(device)
            output.backward(incoming)
            taken[name].append((between - began, now(device) - between))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one core"
    print(f"{options.rows} rows of {options.width}, {options.precision}, {where}, torch {torch.__version__}")
    print("| norm | forward ms | backward ms | bytes kept for an element |\n| --- | --- | --- | --- |")
    for name, norm in norms.items():
        forward, backward = (statistics.median(part) * 1e3 for part in zip(*taken[name][3:], strict=True))
        print(f"| {name} | {forward:.2f} | {backward:.2f} | {kept(norm, rows):.2f} |")


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def kept(norm: torch.nn.Module, rows: torch.Tensor) -> float:
    """Return bytes between the passes, for an element of `rows`."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = norm(rows)
    del output
    return sum(storages.values()) / rows.numel()


if __name__ == "__main__":
    main()
