"""The halo convolution's input kernel: microseconds a call, GB/s, ratio to the torch reference.

On a GPU at the shapes of D's decoder, in bf16, in a captured graph; without one, small shapes
through the CPU twin, so that the suite itself stays alive. Every benchmark compares its result with
the reference in float64 first and gives no number if that fails. Several ranks: see
tests/gpu_halo_ranks.py, which times the exchange after checking it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.ops import halo

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda:0", torch.bfloat16) if GPU else ("cpu", torch.float32)
CALLS = 6
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


def repeated(run: Callable, inputs: dict) -> Callable[[], None]:
    """A function that makes CALLS calls, on two inputs in turn, and waits for them."""
    other = inputs | {"x": inputs["x"].clone(memory_format=LAST)}

    def calls() -> None:
        for i in range(CALLS):
            run(**(other if i % 2 else inputs))

    calls()
    if not GPU:
        return calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.parametrize("name", CASES if GPU else SMALL)
def test_conv_input(benchmark, name):
    case = (CASES if GPU else SMALL)[name]
    gate(case)
    inputs, times = make(case), []
    plain = repeated(reference_conv.conv_input, inputs)
    for _ in range(5):
        begin = time.perf_counter()
        plain()
        times.append((time.perf_counter() - begin) / CALLS)
    del plain
    ours = repeated(halo.conv_input, inputs)
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / CALLS
    elements = inputs["x"].numel() + halo.conv_input(**inputs).numel()
    info = {
        "us": seconds * 1e6,
        "GB/s": elements * DTYPE.itemsize / seconds / 1e9,
        "torch / ours": sorted(times)[2] / seconds,
    }
    benchmark.extra_info.update({k: round(v, 2) for k, v in info.items()})
