"""What cannot be rounded to 4 bits."""

from __future__ import annotations

from dstune.core.errors import Problem


def rounded_experts_problem(share: float) -> Problem:
    """Return the problem with a mixture of experts. share: the share of the weights that are in experts."""
    reason = f"rounds linear layers, and the experts, {share:.0%} of this model's weights, are none"
    return Problem("method", reason, "method=lora", "qlora")
