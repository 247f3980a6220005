"""SwiGLU: down(silu(gate x) * up x), gate and up as one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.layers.linear import MergedColumnLinear, RowLinear
from cosmos3_fast.layers.residual import Residual
from cosmos3_fast.parallel import Mesh


class GatedMLP(nn.Module):
    """One tower's MLP in one layer; `name` is its prefix in the checkpoint."""

    def __init__(
        self,
        config: TransformerConfig,
        name: str,
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        parts = {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}
        self.gate_up = MergedColumnLinear(hidden, parts, mesh, **place)
        self.down = RowLinear(inner, hidden, f"{name}.down_proj", mesh, **place)

    def add_to(self, residual: Residual, x: torch.Tensor) -> None:
        """Add the MLP of x [M, H] to residual [M, H]."""
        self.down.add_to(residual, ops.gate_up_silu(x, self.gate_up.weight))

    def slots(self) -> dict[str, Slot]:
        return self.gate_up.slots() | self.down.slots()
