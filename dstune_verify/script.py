"""Scripts that show a wrong case without this package, for an issue upstream.

A script has a small model of the case's kind, the case's DeepSpeed configuration, one step of SGD, and the same step in plain
PyTorch. It exits with 1 if the gradients differ.
"""

from __future__ import annotations

import pprint
import textwrap
from pathlib import Path
from typing import Any

from dstune_verify.environment import packages
from dstune_verify.training import TrainingCase

HEAD = '''\
"""{engine} applies another gradient than plain PyTorch:
{settings}.

    torchrun --nproc_per_node 2 {file}

SGD changes a weight by learning rate times gradient, so the weights before and after a step show the gradient that was applied.
Seen with {versions}.
"""

import os

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint  # noqa: F401

RATE, ACCUMULATION, CLIPPING, DTYPE = 4.0, {accumulation}, {clipping}, torch.{dtype}
'''

BLOCK = """\
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))
"""

LORA_BLOCK = """\
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.lora_a, self.lora_b = nn.Linear(24, 24), nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False)
        self.base.requires_grad_(False)

    def forward(self, hidden):
        return hidden + torch.tanh(self.base(hidden) + self.lora_b(self.lora_a(hidden)))
"""

MODEL = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(61, 24){frozen}
        self.blocks = nn.ModuleList(Block() for _ in range({blocks}))
        self.head = nn.Linear(24, 61, bias=False){frozen}{tied}

    def run(self, hidden, rank):
        for block in {calls}:
            hidden = {call}
        return hidden

    def forward(self, tokens, rank):
        hidden = self.run(self.embedding(tokens[:, :-1]){requires_grad}, rank){second}
        return nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), tokens[:, 1:].flatten())
"""

NETWORK = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**NETWORK))
        self.network.train(){recomputation}

    def forward(self, tokens, rank):
        logits = self.network(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
"""

COMMON = """\
def make_model():
    torch.manual_seed(1)
    return Model().to(device, DTYPE)


def batch(rank, micro):
    return torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(100 * rank + micro)).to(device)


cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
"""

DEEPSPEED = """\
os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
import deepspeed  # noqa: E402

deepspeed.init_distributed("nccl" if cuda else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = make_model()
start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
trained = [weight for weight in model.parameters() if weight.requires_grad]
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=RATE), config=CONFIG)
for micro in range(ACCUMULATION):
    engine.backward(engine(batch(rank, micro), rank))
    engine.step()
partitioned = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
with deepspeed.zero.GatheredParameters(partitioned):
    after = {name: weight.detach().clone() for name, weight in model.named_parameters()}
"""

DDP = """\
dist.init_process_group("nccl" if cuda else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = make_model()
start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
for micro in range(ACCUMULATION):
    wrapped.require_backward_grad_sync = micro == ACCUMULATION - 1
    (wrapped(batch(rank, micro), rank) / ACCUMULATION).backward()
if CLIPPING:
    nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
torch.optim.SGD(model.parameters(), lr=RATE).step()
after = {name: weight.detach().clone() for name, weight in model.named_parameters()}
"""

PLAIN = """\
plain = make_model()  # all micro-batches of all ranks, one after another
total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in plain.named_parameters() if weight.requires_grad}
for other in range(ranks):
    for micro in range(ACCUMULATION):
        plain.zero_grad()
        plain(batch(other, micro), other).backward()
        for name, weight in plain.named_parameters():
            if weight.grad is not None:
                total[name] += weight.grad.float() / (ranks * ACCUMULATION)
norm = torch.cat([gradient.flatten() for gradient in total.values()]).norm()
factor = min(1.0, CLIPPING / float(norm)) if CLIPPING else 1.0
expected = torch.cat([factor * gradient.flatten() for gradient in total.values()])
measured = torch.cat([(start[name].float() - after[name].float()).flatten() / RATE for name in total])
error = float((measured - expected).norm() / expected.norm())
if rank == 0:
    print(f"relative error of the gradient: {error:.3g}; norm: {float(measured.norm() / expected.norm()):.3g} of the expected")
dist.barrier()
raise SystemExit(int(not error < {bound}))
"""


def script_of(case: TrainingCase, file: str) -> str | None:
    """Return a script that shows what a training case compares; None if there is none for its engine."""
    if case.engine not in ("deepspeed", "ddp") or (case.network is not None and case.lora):
        return None
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[case.precision]
    versions = ", ".join(f"{name} {version}" for name, version in packages().items())
    head = HEAD.format(
        engine="DeepSpeed" if case.engine == "deepspeed" else "DistributedDataParallel", settings=description(case), file=file,
        versions=textwrap.fill(versions, 110, break_on_hyphens=False),
        accumulation=case.accumulation, clipping=case.clipping or 0.0, dtype=dtype,
    )  # fmt: skip
    parts = [head]
    if case.engine == "deepspeed":
        parts[0] += f"CONFIG = {literal(case.deepspeed)}\n"
    parts += network_model(case) if case.network is not None else tiny_model(case)
    parts += [
        COMMON + (DEEPSPEED if case.engine == "deepspeed" else DDP) + "\n" + PLAIN.replace("{bound}", bound_of(case))
    ]
    return "\n\n".join(parts)


def description(case: TrainingCase) -> str:
    """Return the settings of a case in words."""
    words = [f"ZeRO-{case.zero_stage}"] if case.engine == "deepspeed" else []
    words += [case.precision, f"{case.accumulation} micro-batch{'es' * (case.accumulation > 1)}"]
    words += [f"a {case.model} model"] if case.network is None and case.model != "plain" else []
    words += [f"{case.recomputation} recomputation"] if case.recomputation else []
    words += ["the optimizer on the host"] if case.offloads else []
    return ", ".join([*words, *(["LoRA"] if case.lora else [])])


def literal(value: Any) -> str:
    """Return a value as Python writes it, in short lines."""
    return pprint.pformat(value, width=110, sort_dicts=False)


def bound_of(case: TrainingCase) -> str:
    return "0.0001" if case.precision == "fp32" else "0.05"


def tiny_model(case: TrainingCase) -> list[str]:
    """Return the source of a model of the case's kind."""
    call = "block(hidden)"
    if case.recomputation:
        call = f"checkpoint(block, hidden, use_reentrant={case.recomputation == 'reentrant'})"
    calls = {"repeated": "[*self.blocks, *self.blocks]", "experts": "[self.blocks[rank % 2]]"}.get(
        case.model, "self.blocks"
    )
    model = MODEL.format(
        blocks=1 if case.model in ("repeated", "two-inputs") else 2,
        frozen=".requires_grad_(False)" if case.lora else "",
        tied="\n        self.head.weight = self.embedding.weight" if case.model == "repeated" else "",
        calls=calls, call=call,
        requires_grad=".requires_grad_()" if case.lora and case.recomputation == "reentrant" else "",
        second=" + self.run(self.embedding(tokens[:, :-1].flip(0)), rank)" if case.model == "two-inputs" else "",
    )  # fmt: skip
    return [LORA_BLOCK if case.lora else BLOCK, model]


def network_model(case: TrainingCase) -> list[str]:
    """Return the source of the user's model, shrunken."""
    from dstune_verify.network import shrink

    assert case.network is not None
    calls = ""
    if case.recomputation:
        reentrant = case.recomputation == "reentrant"
        calls = f'\n        self.network.gradient_checkpointing_enable({{"use_reentrant": {reentrant}}})'
        calls += "\n        self.network.enable_input_require_grads()" if reentrant else ""
    return [f"NETWORK = {literal(shrink(case.network))}\n\n", NETWORK.format(recomputation=calls)]


def write(folder: Path, case: TrainingCase) -> Path | None:
    """Write the script of a case into a folder, and return its file; None if there is none. Raises OSError."""
    file = folder / f"{case.name}.py"
    content = script_of(case, file.name)
    if content is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file
