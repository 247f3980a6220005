"""The ways that one operation can run on a GPU, by name: for tuning and for checks.

`ops.attention` takes one of them by the shapes; here each can be called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch


def attention(dtype: torch.dtype) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> `ops.attention` that way; Hopper GPUs have a kernel for bfloat16, by tile."""
    module = importlib.import_module("cosmos3_fast.kernels.attention")
    ways = {"triton": module.attention_triton}
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] == 9:
        tiles = importlib.import_module("cosmos3_fast.kernels.attention_hopper").TILES
        for tile in tiles:
            run = functools.partial(module.attention_hopper, tile=tile)
            ways[f"hopper-{tile.consumers}"] = run
    return ways
