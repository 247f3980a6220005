"""Timestep embedding and the per-embodiment action adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.layers.linear import ReplicatedLinear, empty

SINUSOIDS = 256


class TimestepEmbedding(nn.Module):
    """t -> 256 sinusoids (cosines first) -> linear, SiLU, linear; wholly in float32, whatever was
    stored.
    """

    def __init__(self, config: TransformerConfig, name: str, *, device: torch.device) -> None:
        super().__init__()
        self.scale = config.timestep_scale
        hidden = config.hidden_size
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.first = ReplicatedLinear(SINUSOIDS, hidden, f"{name}.linear_1", **place)
        self.second = ReplicatedLinear(hidden, hidden, f"{name}.linear_2", **place)

    def forward(self, timesteps: Sequence[int]) -> torch.Tensor:
        """timesteps in 0..1000 -> [len(timesteps), H] float32."""
        half = SINUSOIDS // 2
        device = self.first.weight.device
        index = torch.arange(half, dtype=torch.float32, device=device)
        frequencies = torch.exp(-math.log(10000) * index / half)
        t = torch.tensor(timesteps, dtype=torch.float32, device=device) * self.scale
        angles = t[:, None] * frequencies
        return self.second(F.silu(self.first(torch.cat((angles.cos(), angles.sin()), dim=1))))

    def slots(self) -> dict[str, Slot]:
        return self.first.slots() | self.second.slots()


class DomainLinear(nn.Module):
    """One `[in, out]` weight row and one bias a domain."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        domains: int,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.shape = name, (in_features, out_features)
        self.weight = empty(domains, in_features * out_features, device=device, dtype=dtype)
        self.bias = empty(domains, out_features, device=device, dtype=dtype)

    def of_domain(self, domain: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [in, out] and bias [out] of one domain."""
        return self.weight[domain].view(self.shape), self.bias[domain]

    def slots(self) -> dict[str, Slot]:
        return {
            f"{self.name}.fc.weight": Slot(self.weight, tuple(self.weight.shape)),
            f"{self.name}.bias.weight": Slot(self.bias, tuple(self.bias.shape)),
        }
