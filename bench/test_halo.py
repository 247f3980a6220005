"""The halo convolution's input kernel: microseconds a call, share of a copy's rate, ratio to torch.

On a GPU at the shapes of D's decoder, in bf16, in a captured graph by device events, in turn with
the torch reference; without one, small shapes through the CPU twin, so that the suite itself stays
alive. Every benchmark compares its result with the reference in float64 first and gives no number
if that fails. Over several ranks: test_collectives.py.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from halo_cases import LAST, RIGHT_BOTTOM, Case, errors, inputs, limit

from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.ops import halo
from cosmos3_fast.testing.measure import repeated, timed

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    (torch.device("cuda:0"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
)
CALLS, ROTATED_BYTES = 6, 128 << 20 if GPU else 0

CASES = (
    Case("1024", (1024, 9, 33, 40)),
    Case("1024-doubled", (1024, 33, 66, 80), "nearest2x", 0),
    Case("512", (512, 33, 132, 160)),
    Case("512-doubled", (512, 33, 132, 160), "nearest2x", 0),
    Case("256", (256, 33, 264, 320)),
    Case("160-stride-2", (160, 5, 264, 320), "none", 0, RIGHT_BOTTOM),
)
SMALL = (
    Case("norm", (64, 2, 9, 7)),
    Case("doubled", (64, 2, 9, 7), "nearest2x", 0),
    Case("stride-2", (20, 2, 9, 7), "none", 0, RIGHT_BOTTOM),
)


def gate(case: Case) -> None:
    """The first frames lie within the tests' bound of float64."""
    given = inputs(case, DTYPE, str(DEVICE))
    given["x"] = given["x"][:, :, :2]
    error, eager = errors(halo.conv_input(**given), given)
    assert error <= limit(DTYPE, eager), f"{case.name}: error {error:.3g}, eager's {eager:.3g}"


@pytest.mark.parametrize("case", CASES if GPU else SMALL, ids=lambda case: case.name)
def test_conv_input(benchmark, recorded, figures, case):
    gate(case)
    given = inputs(case, DTYPE, str(DEVICE))
    nbytes = (given["x"].numel() + halo.conv_input(**given).numel()) * DTYPE.itemsize
    count = max(2, min(CALLS, ROTATED_BYTES // nbytes + 1))
    sets = [given | {"x": given["x"].clone(memory_format=LAST)} for _ in range(count)]
    plain, ours = (
        repeated([partial(run, **x) for x in sets], CALLS, DEVICE)
        for run in (reference_conv.conv_input, halo.conv_input)
    )
    others = []

    def measure() -> float:
        others.append(timed(plain, DEVICE) / CALLS / 1e3)
        return timed(ours, DEVICE, 2) / CALLS / 1e3

    seconds = recorded(measure, rounds=12, warmup_rounds=2)
    plain.reset()
    ours.reset()
    if seconds is None:
        return
    ratio = statistics.median(others[2:]) / seconds
    info = figures.kernel("conv_input", case.name, seconds, nbytes, 0, ratio, "torch")
    benchmark.extra_info.update(info)
