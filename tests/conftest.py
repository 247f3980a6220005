"""Tests that need GPUs are skipped, with the reason, on a machine that has too few."""

from __future__ import annotations

import pytest
import torch

GPUS = {"gpu": 1, "gpu2": 2, "gpu4": 4, "gpu8": 8}  # marker -> GPUs it needs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = max((n for name, n in GPUS.items() if item.get_closest_marker(name)), default=0)
        if needed > there:
            reason = f"needs {needed} CUDA GPU{'s' * (needed > 1)}, this machine has {there}"
            item.add_marker(pytest.mark.skip(reason=reason))
