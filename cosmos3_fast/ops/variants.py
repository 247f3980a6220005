"""The ways that one operation can run on a GPU, by name: for tuning and for checks.

`ops.attention` and `ops.gate_up_silu` take one of them by the shapes; here each can be called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, und_k: torch.Tensor, und_v: torch.Tensor
) -> dict[str, Callable[..., torch.Tensor]]:
    """Name in ATTENTION_CHOICE -> `ops.attention` that way, of all that take these."""
    module = importlib.import_module("cosmos3_fast.kernels.attention")
    hopper = importlib.import_module("cosmos3_fast.kernels.attention_hopper")
    ways = {}
    if hopper.takes(q, k, v, und_k, und_v):
        for name, tile in hopper.TILES.items():
            ways[name] = functools.partial(module.attention_hopper, tile=tile)
    return ways | {"triton": module.attention_triton}


def gate_up_silu(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """Name in GATE_UP_CHOICE -> `ops.gate_up_silu` that way, of all that take these."""
    module = importlib.import_module("cosmos3_fast.kernels.gate_up_silu")
    fused = {"fused": module.gate_up_silu_fused} if module.takes(x, weight) else {}
    return fused | {"pair": module.gate_up_silu_pair}
