"""Tests that need a process of their own: kernels compiled ahead, scripts over GPUs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_LIMIT = 227 * 1024  # bytes a block may use on sm_90


@functools.cache
def printed(script: str) -> dict[str, Any]:
    """What a script prints as JSON, run without TRITON_INTERPRET, which would turn every kernel
    into an object that cannot be compiled.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_over_gpus(count: int, name: str) -> None:
    """A script of this folder by torchrun, which must end well; skipped where GPUs are too few."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    script = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
