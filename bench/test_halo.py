"""Around the VAE's convolutions: microseconds a call, share of a copy's rate, ratio to torch.

`conv_input` writes their padded input, `interleave_add` puts an upsampling's four phases together.

On a GPU at the shapes of D's decoder, in bf16, in a captured graph by device events, in turn with
the torch reference; without one, small shapes through the CPU twin, so that the suite itself stays
alive. Every benchmark compares its result with the reference in float64 first and gives no number
if that fails. Exchange over several ranks: test_collectives.py.
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

from cosmos3_fast import ops
from cosmos3_fast.kernels import reference, reference_conv
from cosmos3_fast.ops import halo
from cosmos3_fast.testing.measure import repeated, timed

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    (torch.device("cuda:0"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
)
CALLS, ROTATED_BYTES = 6, 128 << 20 if GPU else 0

CASES = (
    Case("1024", (1024, 9, 33, 40)),
    Case("1024-plain", (1024, 33, 66, 80), "none", 0),
    Case("512", (512, 33, 132, 160)),
    Case("512-plain", (512, 33, 132, 160), "none", 0),
    Case("256", (256, 33, 264, 320)),
    Case("160-stride-2", (160, 5, 264, 320), "none", 0, RIGHT_BOTTOM),
)
SMALL = (
    Case("norm", (64, 2, 9, 7)),
    Case("plain", (64, 2, 9, 7), "none", 0),
    Case("stride-2", (20, 2, 9, 7), "none", 0, RIGHT_BOTTOM),
)


def gate(case: Case) -> None:
    """The first frames lie within the tests' bound of float64."""
    given = inputs(case, DTYPE, str(DEVICE))
    given["x"] = given["x"][:, :, :2]
    error, eager = errors(halo.conv_input(**given), given)
    assert error <= limit(DTYPE, eager), f"{case.name}: error {error:.3g}, eager's {eager:.3g}"


def compare(benchmark, recorded, figures, label, nbytes, plain, ours) -> None:
    """Calls of torch's and of ours in turn, each with inputs of its own, as a row of the table."""
    graphs = [repeated(calls, CALLS, DEVICE) for calls in (plain, ours)]
    others = []

    def measure() -> float:
        others.append(timed(graphs[0], DEVICE) / CALLS / 1e3)
        return timed(graphs[1], DEVICE, 2) / CALLS / 1e3

    seconds = recorded(measure, rounds=12, warmup_rounds=2)
    for graph in graphs:
        graph.reset()
    if seconds is None:
        return
    ratio = statistics.median(others[2:]) / seconds
    info = figures.kernel(*label, seconds, nbytes, 0, ratio, "torch")
    benchmark.extra_info.update(info)


@pytest.mark.parametrize("case", CASES if GPU else SMALL, ids=lambda case: case.name)
def test_conv_input(benchmark, recorded, figures, case):
    gate(case)
    given = inputs(case, DTYPE, str(DEVICE))
    nbytes = (given["x"].numel() + halo.conv_input(**given).numel()) * DTYPE.itemsize
    count = max(2, min(CALLS, ROTATED_BYTES // nbytes + 1))
    sets = [given | {"x": given["x"].clone(memory_format=LAST)} for _ in range(count)]
    plain, ours = (
        [partial(run, **x) for x in sets] for run in (reference_conv.conv_input, halo.conv_input)
    )
    compare(benchmark, recorded, figures, ("conv_input", case.name), nbytes, plain, ours)


# Of D's three upsamplings: channels out and in, factor of frames, source frames, height, width.
UPSAMPLINGS = {
    "1024-33x40": (1024, 1024, 2, 9, 33, 40),
    "1024-66x80": (1024, 1024, 2, 17, 66, 80),
    "512-132x160": (512, 1024, 1, 33, 132, 160),
}
SMALL_UPSAMPLINGS = {"doubled": (16, 16, 2, 2, 3, 5), "halved": (8, 16, 1, 2, 3, 5)}


def upsampling(out: int, into: int, time: int, sources: int, height: int, width: int) -> tuple:
    """Arguments of `interleave_add`; the bytes that a call must read and write."""
    frames = sources * time - (time - 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    phases = [random(frames, height + 1, width + 1, out).permute(0, 3, 1, 2) for _ in range(4)]
    source = random(sources, height, width, into).permute(3, 0, 1, 2)[None]
    nbytes = (8 * frames * height * width * out + source.numel()) * DTYPE.itemsize
    return (phases, source), {"time": time, "first": True}, nbytes


@pytest.mark.parametrize("name", UPSAMPLINGS if GPU else SMALL_UPSAMPLINGS)
def test_interleave_add(benchmark, recorded, figures, name):
    shape = (UPSAMPLINGS if GPU else SMALL_UPSAMPLINGS)[name]
    (phases, source), named, nbytes = upsampling(*shape)
    few = [phase[: named["time"] + 1] for phase in phases], source[:, :, :2]
    exact = [phase.double() for phase in few[0]], few[1].double()
    got, eager = (x.interleave_add(*few, **named) for x in (ops, reference))
    truth = reference.interleave_add(*exact, **named)
    error, eager_error = ((x - truth).abs().max().item() for x in (got, eager))
    assert error <= limit(DTYPE, eager_error), f"{name}: {error:.3g}, eager's {eager_error:.3g}"
    count = max(2, min(CALLS, ROTATED_BYTES // nbytes + 1))
    sets = [(phases, source), *(upsampling(*shape)[0] for _ in range(count - 1))]
    plain, ours = (
        [partial(x.interleave_add, *one, **named) for one in sets] for x in (reference, ops)
    )
    compare(benchmark, recorded, figures, ("interleave_add", name), nbytes, plain, ours)
