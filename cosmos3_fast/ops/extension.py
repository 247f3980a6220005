"""The extension `_C`, and where a tensor's call into it must run."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch


@cache
def extension() -> Any:
    """`cosmos3_fast._C`."""
    return importlib.import_module("cosmos3_fast._C")


def place(x: torch.Tensor) -> dict[str, int]:
    """`_C`'s arguments `device` (-1: the CPU) and `stream` for a call on x."""
    if x.device.type == "cpu":
        return {"device": -1, "stream": 0}
    return {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}
