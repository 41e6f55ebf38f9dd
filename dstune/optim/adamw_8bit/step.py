"""AdamW with 8-bit moments as a torch optimizer, with the kernels of bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dstune.optim._beside_adamw import BesideAdamW
from dstune.optim.adamw_8bit.config import BLOCK, ROUNDED

if TYPE_CHECKING:
    from dstune.optim.adamw_8bit.config import AdamW8bitConfig


class AdamW8bitStep(BesideAdamW):
    """Keeps 8-bit moments for groups of the kind `ROUNDED`, with a scale for each block of 256 consecutive elements of this rank's
    part of the group. Other groups have fp32 moments."""

    kind = ROUNDED

    def __init__(self, groups: list[dict[str, Any]], config: AdamW8bitConfig):
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps}
        super().__init__(groups, {**defaults, "fused": True})
        self._codes: dict[tuple[torch.device, bool], Tensor] = {}

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state = self.state[parameter]
        if "step" not in state:
            blocks = -(-parameter.numel() // BLOCK)
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{moment}_scale"] = torch.zeros(blocks, device=parameter.device)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        optimizer_update_8bit_blockwise(
            "adam",
            gradient.contiguous(),
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,
            0.0,
            group["eps"],
            int(state["step"]),
            group["lr"],
            self._code(parameter.device, signed=True),
            self._code(parameter.device, signed=False),
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            group["weight_decay"],
        )

    def _code(self, device: torch.device, *, signed: bool) -> Tensor:
        """Return the 256 numbers that a byte can stand for."""
        from bitsandbytes.functional import create_dynamic_map

        if (device, signed) not in self._codes:
            self._codes[device, signed] = create_dynamic_map(signed=signed).to(device)
        return self._codes[device, signed]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has converted the states to the parameter's type. Bytes survive that: every type represents integers up to 255.
        for index, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype is torch.uint8:
                    self.state[parameter][name] = self.state[parameter][name].to(torch.uint8)
