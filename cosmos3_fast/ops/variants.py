"""The ways that one operation can run on a GPU, by the names that its table gives them: for tuning.

`ops.attention` takes the one that the table names for a shape; here each can be called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch


def attention(dtype: torch.dtype) -> dict[str, Callable[..., torch.Tensor]]:
    """Name in ATTENTION_CHOICE -> `ops.attention` that way; cuDNN has 2-byte dtypes alone."""
    module = importlib.import_module("cosmos3_fast.kernels.attention")
    ways = {"triton": module.attention_triton}
    return ways | ({"cudnn": module.attention_cudnn} if dtype.itemsize == 2 else {})
