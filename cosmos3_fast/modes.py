"""The modes of torch in which the engine computes, whatever its caller's are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class _ExactProducts:
    """`with exact_products`: float32 products and convolutions in float32. The settings are the
    process's: they are put back when the last of all calls that overlap has left.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [one.fp32_precision for one in self._settings()]
                for one in self._settings():
                    one.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for one, precision in zip(self._settings(), self._before, strict=True):
                    one.fp32_precision = precision

    def _settings(self) -> tuple[Any, ...]:
        b: Any = torch.backends
        return b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv


exact_products = _ExactProducts()


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors, no autocast, float32 products in float32; tensors on the
    host unless a device is named, `device` the current GPU.

    What a request leaves behind (buffers, graphs, prompts, tables) serves later callers, who may be
    in other modes.
    """
    index = device.index if device.type == "cuda" else -1  # -1: no change
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(index),
        # This mode sees every call: where nobody has set a default, there is none.
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        exact_products,
    ):
        yield
