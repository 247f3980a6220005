"""The modes of torch in which the engine computes, whatever its caller's are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors, no autocast, float32 products in float32; tensors on the
    host unless a device is named, `device` the current GPU.

    What a request leaves behind (buffers, graphs, prompts, tables) serves later callers, who may be
    in other modes. The precision of products is the process's, and put back in the end.
    """
    backends: Any = torch.backends
    products = backends.cuda.matmul, backends.mkldnn.matmul
    before = [one.fp32_precision for one in products]
    index = device.index if device.type == "cuda" else -1  # -1: no change
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(index),
        # This mode sees every call: where nobody has set a default, there is none.
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
    ):
        try:
            for one in products:
                one.fp32_precision = "ieee"
            yield
        finally:
            for one, precision in zip(products, before, strict=True):
                one.fp32_precision = precision
