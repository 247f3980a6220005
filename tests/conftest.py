"""Tests that need GPUs are skipped, with the reason, on a machine that has too few; what the tests
of the processor share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosmos3_fast.processor import Cosmos3PolicyProcessor
from cosmos3_fast.testing.tokenizer import make_tokenizer

GPUS = {"gpu": 1, "gpu2": 2, "gpu4": 4, "gpu8": 8}  # marker -> GPUs it needs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = max((n for name, n in GPUS.items() if item.get_closest_marker(name)), default=0)
        if needed > there:
            reason = f"needs {needed} CUDA GPU{'s' * (needed > 1)}, this machine has {there}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text_tokenizer")
    make_tokenizer(path)
    return path


@pytest.fixture
def processor_of(tokenizer_folder: Path) -> Callable[..., Cosmos3PolicyProcessor]:
    """A small processor of domain umi in float32; arguments replace those."""

    def make(**changes: object) -> Cosmos3PolicyProcessor:
        arguments = {"image_size": 256, "domain_name": "umi", "params_dtype": torch.float32}
        given = {"tokenizer_name_or_path": tokenizer_folder, **arguments, **changes}
        return Cosmos3PolicyProcessor(**given)

    return make
