"""Linear layers over the tensor-parallel group: merged columns, rows, and replicated ones.

Weights are `[out, in]` as in the checkpoint. A layer keeps this rank's part and says in `slots()`
where it is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.layers.residual import Residual
from cosmos3_fast.parallel import Mesh


def empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without a value yet: the loader fills it, or raises."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)


def share(size: int, mesh: Mesh, what: str) -> int:
    """This rank's part of `size` heads or columns; ValueError if tp_size does not divide it."""
    if size % mesh.tp_size:
        raise ValueError(f"tp_size {mesh.tp_size} does not divide {what} {size}")
    return size // mesh.tp_size


class MergedColumnLinear(nn.Module):
    """Several `[out_i, in]` weights over the same input as one product; each is cut along `out`.

    x [M, in] -> [M, sum(out_i) / tp_size], the parts one after the other in the order of `parts`.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.parts, self.mesh = dict(parts), mesh
        local = sum(share(out, mesh, name) for name, out in parts.items())
        self.weight = empty(local, in_features, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def slots(self) -> dict[str, Slot]:
        slots, start = {}, 0
        for name, out in self.parts.items():
            local = share(out, self.mesh, name)
            first = self.mesh.tp_rank * local
            slots[f"{name}.weight"] = Slot(
                target=self.weight[start : start + local],
                shape=(out, self.weight.shape[1]),
                index=(slice(first, first + local), slice(None)),
            )
            start += local
        return slots


class RowLinear(nn.Module):
    """A weight cut along its input; the ranks' products are summed where they meet the residual."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.mesh, self.in_features = name, mesh, in_features
        local = share(in_features, mesh, name)
        self.weight = empty(out_features, local, device=device, dtype=dtype)

    def add_to(self, residual: Residual, x: torch.Tensor) -> None:
        """Add x [M, in / tp] times the weight, summed over the ranks, to residual [M, out]."""
        residual.add_product(x, self.weight)

    def slots(self) -> dict[str, Slot]:
        out, local = self.weight.shape
        first = self.mesh.tp_rank * local
        index = (slice(None), slice(first, first + local))
        return {f"{self.name}.weight": Slot(self.weight, (out, self.in_features), index)}


class ReplicatedLinear(nn.Module):
    """A linear layer with bias that every rank holds whole: x [..., in] -> [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.weight = empty(out_features, in_features, device=device, dtype=dtype)
        self.bias = empty(out_features, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def slots(self) -> dict[str, Slot]:
        return {
            f"{self.name}.{part}": Slot(tensor, tuple(tensor.shape))
            for part, tensor in (("weight", self.weight), ("bias", self.bias))
        }
