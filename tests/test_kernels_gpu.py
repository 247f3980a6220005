"""The kernels on a GPU: the scripts that check them at real sizes, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("command", [("gpu_kernels.py", "--check"), ("gpu_halo.py",)], ids=" ".join)
def test_kernels_at_real_sizes(command):
    script, *options = command
    line = [sys.executable, str(Path(__file__).with_name(script)), *options]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
