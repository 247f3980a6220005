"""The halo convolution's input kernel: microseconds a call, share of a copy's rate, ratio to torch.

On a GPU at the shapes of D's decoder, in bf16, in a captured graph by device events, in turn with
the torch reference; without one, small shapes through the CPU twin, so that the suite itself stays
alive. Every benchmark compares its result with the reference in float64 first and gives no number
if that fails. Several ranks: see tests/gpu_halo_ranks.py, which times the exchange after checking
it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.ops import halo
from cosmos3_fast.testing.measure import repeated, timed

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    (torch.device("cuda:0"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
)
CALLS, ROTATED_BYTES = 6, 128 << 20 if GPU else 0
BORDER, RIGHT_BOTTOM = (1, 1, 1, 1), (0, 1, 0, 1)
LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Case:
    """Channels, frames, height, width; how the convolution that reads the result is padded."""

    shape: tuple[int, int, int, int]
    prologue: str = "norm_silu"
    history: int = 2
    pad: tuple[int, int, int, int] = BORDER


CASES = {
    "1024": Case((1024, 9, 33, 40)),
    "1024-doubled": Case((1024, 33, 66, 80), "nearest2x", 0),
    "512": Case((512, 33, 132, 160)),
    "512-doubled": Case((512, 33, 132, 160), "nearest2x", 0),
    "256": Case((256, 33, 264, 320)),
    "160-stride-2": Case((160, 5, 264, 320), "none", 0, RIGHT_BOTTOM),
}
SMALL = {
    "norm": Case((64, 2, 9, 7)),
    "doubled": Case((64, 2, 9, 7), "nearest2x", 0),
    "stride-2": Case((20, 2, 9, 7), "none", 0, RIGHT_BOTTOM),
}


def make(case: Case) -> dict:
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    channels, frames, height, width = case.shape
    x = random(1, frames, height, width, channels).to(DTYPE).movedim(-1, 1)
    gamma = random(channels) if case.prologue == "norm_silu" else None
    rest = {"prologue": case.prologue, "history": case.history, "pad": case.pad}
    return {"x": x, "gamma": gamma, "bias": random(channels), **rest}


def gate(case: Case) -> None:
    """The first frames lie within twice the reference's own error, or two ulp, of float64."""
    inputs = make(case)
    inputs["x"] = inputs["x"][:, :, :2]
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    truth = reference_conv.conv_input(**wide)
    eager = (reference_conv.conv_input(**inputs) - truth).abs().max()
    floor = 2 * torch.finfo(DTYPE).eps * truth.abs().max()
    assert (halo.conv_input(**inputs) - truth).abs().max() <= max(2 * eager, floor)


@pytest.mark.parametrize("name", CASES if GPU else SMALL)
def test_conv_input(benchmark, recorded, figures, name):
    case = (CASES if GPU else SMALL)[name]
    gate(case)
    inputs = make(case)
    nbytes = (inputs["x"].numel() + halo.conv_input(**inputs).numel()) * DTYPE.itemsize
    count = max(2, min(CALLS, ROTATED_BYTES // nbytes + 1))
    sets = [inputs | {"x": inputs["x"].clone(memory_format=LAST)} for _ in range(count)]
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
    info = figures.kernel("conv_input", name, seconds, nbytes, 0, ratio, "torch")
    benchmark.extra_info.update(info)
