"""What it costs to sum the gradients of a step in bf16 and not in fp32 (`zero.gradient_dtype=model`), on a CPU.

    python benchmarks/gradient_dtype.py

Gradients of a random two-layer Llama in bf16 for each of a step's micro-batches, summed in either format; the error is that of
the whole gradient beside the sum in fp64 of the same bf16 gradients.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).bfloat16()
    sums: dict[torch.dtype, torch.Tensor] = {}
    print("| micro-batches | error in fp32 | error in bf16 |\n| --- | --- | --- |")
    for number in range(1, 65):
        tokens = torch.randint(512, (2, 32))
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            sums[dtype] = sums.get(dtype, torch.zeros((), dtype=dtype)) + gradient.to(dtype)
        if number in (1, 4, 16, 64):
            exact = sums[torch.float64]
            errors = [
                float((sums[dtype].double() - exact).norm() / exact.norm()) for dtype in (torch.float32, torch.bfloat16)
            ]
            print(f"| {number} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
