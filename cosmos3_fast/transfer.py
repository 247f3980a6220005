"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device. From the host it goes in stream order, through pinned memory that torch
    keeps until it has been read: nothing here waits for the device.
    """
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)
