"""Program of the tests of shared weights, on every rank: tiny models whole and in slices, their losses and gradients.

Prints a line of JSON: by the name of a case the largest difference of a gradient, relative to the largest gradient of its
parameter; those of the loss and of the norm over all gradients; whether gradients of what is whole are the same on all ranks;
how many parameters are cut; and how many bytes of activations the ranks have summed.
"""

from __future__ import annotations

import json
import sys

import torch
from support.ranks import end_with, start_rank
from transformers import AutoConfig, AutoModelForCausalLM

from dstune.config.schema import Selective
from dstune.models.lora_sum import use_joint_sums
from dstune.models.norms import use_lean_norms
from dstune.models.recompute import checkpointing_options
from dstune.models.tensor import slice_model
from dstune.models.tiles import tile_feed_forward
from dstune.zero.slices import Slices

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
KINDS = {kind: {} for kind in ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")}
CASES = {
    **{kind: (kind, changes, "") for kind, changes in KINDS.items()},
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, ""),
    "tied": ("llama", {"tie_word_embeddings": True}, ""),
    "checkpointing": ("qwen3", {}, "checkpointing"),
    "selective": ("qwen3", {}, "selective"),
    "tiles": ("llama", {}, "tiles"),
    "lora": ("qwen2", {}, "lora"),
    "lora on some": ("llama", {"attention_bias": True, "mlp_bias": True}, "lora on some"),
}


def built(kind: str, changes: dict, how: str):
    """The model, and what is trained: adapters with weights that are not their first ones."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if kind == "gemma2" else "sdpa"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are zero, norms one or zero
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if how == "tiles":
        tile_feed_forward(model, 3)
    if how in ("checkpointing", "selective"):
        kept = Selective.selective if how == "selective" else True
        model.gradient_checkpointing_enable(checkpointing_options(kept))
    module = model
    if how.startswith("lora"):
        import peft

        targets = "all-linear" if how == "lora" else ["q_proj", "o_proj", "down_proj"]
        settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).double()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.2)
    return model, module.train()


def gradients(module, slices=None):
    use_lean_norms(module)
    use_joint_sums(module)
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    loss = module(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    values = list(trained.values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in values]) if slices is None else slices.norm(values)
    return float(loss.detach()), float(norm), {name: parameter.grad for name, parameter in trained.items()}


def main() -> None:
    world = start_rank()
    (size,) = json.loads(sys.argv[1])
    found: dict[str, list] = {}
    summed: list[torch.Tensor] = []
    one_sum = Slices.sum

    def counted(slices, tensor):
        summed.append(tensor)
        return one_sum(slices, tensor)

    Slices.sum = counted
    for name, (kind, changes, how) in CASES.items():
        _, whole = built(kind, changes, how)
        loss, norm, whole_gradients = gradients(whole)
        model, module = built(kind, changes, how)
        slices = Slices(world, size)
        slice_model(module, model, slices)
        summed.clear()
        own_loss, own_norm, own = gradients(module, slices)
        activations = sum(8 * tensor.numel() for tensor in summed if tensor.dim() == 3)
        assert own.keys() == whole_gradients.keys()
        worst = 0.0
        for key, gradient in own.items():
            dim = slices.cuts.get(key)
            expected = whole_gradients[key] if dim is None else whole_gradients[key].chunk(size, dim)[slices.part]
            assert expected.shape == gradient.shape, key
            worst = max(worst, float((gradient - expected).abs().max() / whole_gradients[key].abs().max()))
        alike = [gradient for key, gradient in own.items() if key not in slices.cuts]
        first = [gradient.clone() for gradient in alike]
        for gradient in first:
            torch.distributed.broadcast(gradient, group=slices.group, group_src=0)
        equal = all(torch.equal(one, other) for one, other in zip(alike, first, strict=True))
        cut = sum(key in slices.cuts for key in dict(module.named_parameters()))
        found[name] = [worst, abs(own_loss - loss) / loss, abs(own_norm - norm) / norm, equal, cut, activations]
    print(json.dumps(found))


if __name__ == "__main__":
    end_with(main)
