"""RMSNorm of the residual stream, with the sum that a sharded layer left open."""

from __future__ import annotations

import torch
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.layers.linear import empty


class RMSNorm(nn.Module):
    """Normalise in float32, round, multiply by the weight [H] (rounded): the order of MODEL.md."""

    def __init__(
        self, size: int, eps: float, name: str, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps, self.name = eps, name
        self.weight = empty(size, device=device, dtype=dtype)

    def forward(self, residual: torch.Tensor, pending: torch.Tensor | None = None) -> torch.Tensor:
        """residual [M, H], to which `pending` [M, H] is first added in place -> [M, H]."""
        if pending is None:
            return ops.rms_norm(residual, self.weight, self.eps)
        return ops.add_rms_norm(pending, residual, self.weight, self.eps)

    def slots(self) -> dict[str, Slot]:
        return {f"{self.name}.weight": Slot(self.weight, tuple(self.weight.shape))}
