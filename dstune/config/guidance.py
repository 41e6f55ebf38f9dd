"""How to choose the values of the keys that are changed most often."""

from __future__ import annotations

GUIDANCE = {
    "optimizer.lr": (
        "Try a third and three times the default first. If the loss spikes or turns NaN, lower it; if the loss barely falls, raise"
        " it. Adapters take about ten times the rate of full fine-tuning."
    ),
    "trainer.epochs": (
        "3 for some hundred rows, 1 or 2 for some ten thousand. If the held-out loss rises while the training loss falls,"
        " there were too many."
    ),
    "trainer.max_steps": "For a quick look, 20.",
    "trainer.global_batch_size": (
        "8 to 32 for a few thousand rows or fewer, up to 128 for more. It decides the result; trainer.micro_batch_size only decides"
        " memory and speed."
    ),
    "trainer.micro_batch_size": "As large as memory allows; it does not change the result. `auto` measures it first.",
    "trainer.precision": "With fp16, watch for skipped steps; fp32 is the most exact and the slowest.",
    "trainer.activation_checkpointing": "If memory is short and rows are long: selective first, then true, which is slower.",
    "trainer.early_stopping.patience": "2 or 3 evaluations for small data; set evaluate.every too.",
    "data.max_length": "A little more than your longest row: `dstune data show` lists the lengths. Memory grows with it.",
    "data.packing": "Leave it on for many short rows. Turn it off for a few hundred rows, which would leave few steps.",
    "method.rank": "8 to 16 for style and format, 32 to 128 for new knowledge or another language.",
    "method.alpha": "Twice the rank is usual; a larger one acts like a higher rate.",
    "method.dropout": "0.05 to 0.1 for a few thousand rows or fewer, 0 for more.",
    "schedule.warmup_ratio": "0.03 to 0.1; more if the loss jumps in the first steps.",
    "optimizer.weight_decay": "0.01 to 0.1 for full fine-tuning, 0 for adapters.",
    "zero.stage": "`dstune plan` compares the stages: 2 for a model that fits, 3 for one that does not.",
    "evaluate.every": "About ten times a run: more often is slow, less often hides overfitting.",
    "checkpoint.every": "As many steps as you would accept to lose.",
    "task.beta": "0.1 stays close to the reference, 0.01 lets the model move further.",
}
"""By key."""

ONLY_OF = {"task.beta": {"preference"}, "method.rank": {"lora", "qlora"}}
"""Choices that the advice is for, where a key of that name means something else in others (`method.rank` of VeRA)."""


def advice_of(key: str, group: str) -> str:
    """Return the advice for a key; empty if there is none. group: the choices that have it, such as `method=lora|qlora`."""
    choices = set(group.partition("=")[2].split("|"))
    return GUIDANCE.get(key, "") if choices & ONLY_OF.get(key, choices) else ""
