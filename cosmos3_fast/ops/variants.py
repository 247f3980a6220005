"""The ways that one operation can run on a GPU, by name: for tuning and for checks.

`ops.attention` takes one of them by the shapes; here each can be called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, und_k: torch.Tensor, und_v: torch.Tensor
) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> `ops.attention` that way, of all that take these; Hopper's kernel by tile."""
    module = importlib.import_module("cosmos3_fast.kernels.attention")
    hopper = importlib.import_module("cosmos3_fast.kernels.attention_hopper")
    ways = {"triton": module.attention_triton}
    if hopper.takes(q, k, v, und_k, und_v):
        for tile in hopper.TILES:
            run = functools.partial(module.attention_hopper, tile=tile)
            ways[f"hopper-{tile.consumers}"] = run
    return ways
