"""RMSNorm of the residual stream, with the product that the layer before left open."""

from __future__ import annotations

import torch
from torch import nn

from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.layers.linear import empty
from cosmos3_fast.layers.residual import Residual


class RMSNorm(nn.Module):
    """Normalise in float32, round, multiply by the weight [H] (rounded): see docs/model.md, 1."""

    def __init__(
        self, size: int, eps: float, name: str, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps, self.name = eps, name
        self.weight = empty(size, device=device, dtype=dtype)

    def forward(self, residual: Residual, *, whole: bool = False) -> torch.Tensor:
        """residual [M, H] -> [M, H]; see `Residual.norm`."""
        return residual.norm(self.weight, self.eps, whole=whole)

    def slots(self) -> dict[str, Slot]:
        return {f"{self.name}.weight": Slot(self.weight, tuple(self.weight.shape))}
