"""What launchers ask of a GPU, by its index; asked once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def is_hopper(index: int) -> bool:
    """Whether its compute capability is 9.x: TMA and warpgroup products."""
    return torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def processors(index: int) -> int:
    """How many multiprocessors it has."""
    return torch.cuda.get_device_properties(index).multi_processor_count
