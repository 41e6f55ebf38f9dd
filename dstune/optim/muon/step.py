"""Muon as a torch optimizer, over whole parameters or over partitions of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dstune.optim._beside_adamw import BesideAdamW
from dstune.optim.muon.config import MATRIX

if TYPE_CHECKING:
    from dstune.optim.muon.config import MuonConfig
    from dstune.zero.matrices import Matrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's quintic iteration (kellerjordan.github.io/posts/muon), the same as in `torch.optim.Muon`."""


class MuonStep(BesideAdamW):
    """Orthogonalizes the updates of groups of the kind `MATRIX`, matrix by matrix; each stacked expert is a separate matrix. Other
    groups are updated by AdamW."""

    kind = MATRIX

    def __init__(self, groups: list[dict[str, Any]], config: MuonConfig):
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps}
        super().__init__(groups, {**defaults, "momentum": config.momentum, "fused": True})
        self._iterations = config.orthogonalization_steps
        self._matrices: Matrices | None = None

    def use_matrices(self, matrices: Matrices) -> None:
        """Update partitions of parameters from now on; `matrices` assembles complete matrices from them."""
        self._matrices = matrices

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov momentum
        if self._matrices is None:
            orthogonal = self._orthogonal(update)
        else:
            orthogonal = self._matrices.change(parameter, update, self._orthogonal)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonal, alpha=-group["lr"])

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """Approximate the nearest orthogonal matrix to each matrix [..., rows, columns], and scale it to the root mean square of
        AdamW's updates (arXiv:2502.16982, section 2.2). In fp32: in bf16, the rounding of a sum over ranks would show."""
        rows, columns = matrix.shape[-2:]
        orthogonal = matrix.mT if rows > columns else matrix
        orthogonal = orthogonal / orthogonal.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        a, b, c = COEFFICIENTS
        for _ in range(self._iterations):
            gram = orthogonal @ orthogonal.mT
            orthogonal = a * orthogonal + (b * gram + c * gram @ gram) @ orthogonal
        return (orthogonal.mT if rows > columns else orthogonal) * (0.2 * math.sqrt(max(rows, columns)))
