"""Checks and times the halo kernels on one GPU: `python tests/gpu_halo.py [--check]`.

Correctness first, into NaN-filled results between guards: every case of halo_cases.py against
float64, and ranks that share this GPU against the slices of one. Then a captured graph of calls
whose inputs rotate past L2, beside copy bandwidth and the torch sequence of the same run. Exit
status 1 on a failed check, before any time is taken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from halo_cases import (
    DECODER,
    ENCODER,
    LAST,
    ODD,
    Case,
    Guarded,
    Ranks,
    edge_bytes,
    errors,
    inputs,
    limit,
    result_shape,
    strip,
    strip_result,
)

from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.ops import halo

DEVICE = "cuda:0"
L2_BYTES = 256 << 20
HALVES = (torch.bfloat16, torch.float16)


def check_values(case: Case, dtype: torch.dtype) -> str | None:
    """What is wrong with a case's result, if anything."""
    given = inputs(case, dtype, DEVICE)
    guarded = Guarded(result_shape(case), dtype, DEVICE)
    halo.conv_input(**given, out=guarded.out)
    torch.cuda.synchronize()
    if not guarded.intact():
        return "wrote outside its result"
    again = halo.conv_input(**given)
    if not torch.equal(again, guarded.out):
        return "a second call gives other bits"
    del again
    # Frame by frame: the float64 truth of a whole D activation would not fit beside its parts.
    for frame in range(case.shape[1]):
        part = given | {"x": given["x"][:, :, frame : frame + 1], "history": 0}
        at = case.history + frame
        error, eager = errors(guarded.out[:, :, at : at + 1], part)
        if not error <= limit(dtype, eager):
            return f"frame {frame}: error {error:.3g}, eager's {eager:.3g}"
    if guarded.out[:, :, : case.history].abs().sum().item() != 0:
        return "history is not zero"
    return None


def check_ranks(case: Case, dtype: torch.dtype, axis: int, count: int) -> str | None:
    """Ranks on one stream: all send, then all fill; three exchanges, so both parities serve."""
    size = case.shape[axis - 1]
    sizes = [size // count + (rank < size % count) for rank in range(count)]
    scale = 2 if case.prologue == "nearest2x" else 1
    if scale * sizes[-1] < max(1, *case.pad):
        return None  # too narrow to give an edge
    ranks = Ranks(count, edge_bytes(case, axis, dtype), device=DEVICE)
    for seed in range(3):
        given = inputs(case, dtype, DEVICE, seed)
        x = given.pop("x")
        whole = halo.conv_input(x, **given)
        sent = []
        for rank, slots in enumerate(ranks.slots):
            shape = strip_result(whole, sizes, rank, axis, case).shape
            out = Guarded(shape, dtype, DEVICE).out
            mine = strip(x, sizes, rank, axis)
            sent.append(halo.send_edges(mine, slots, **given, axis=axis, out=out))
        for rank, slots in enumerate(ranks.slots):
            halo.fill_edges(*sent[rank], slots)
            if not torch.equal(sent[rank][0], strip_result(whole, sizes, rank, axis, case)):
                return f"rank {rank} of {count}, axis {axis}, exchange {seed}: not the slice"
    failed = [slots.failure() for slots in ranks.slots]
    return next((text for text in failed if text), None)


def run_checks() -> list[str]:
    wrong, done = [], 0

    def note(label: str, problem: str | None) -> None:
        nonlocal done
        done += 1
        if problem:
            wrong.append(f"{label}: {problem}")
            print(f"FAILED {wrong[-1]}", flush=True)

    for dtype in (torch.float32, *HALVES):
        for case in ODD:
            note(f"{case.name} {dtype}", check_values(case, dtype))
            for axis in (3, 4):
                note(f"{case.name} {dtype}", check_ranks(case, dtype, axis, 2))
    for case in (*DECODER, *ENCODER):
        note(case.name, check_values(case, torch.bfloat16))
        torch.cuda.empty_cache()
        smaller = replace(case, shape=(case.shape[0], min(case.shape[1], 5), *case.shape[2:]))
        for axis, count in ((3, 3), (4, 2), (3, 8)):
            note(case.name, check_ranks(smaller, torch.bfloat16, axis, count))
        torch.cuda.empty_cache()
    print(f"{done - len(wrong)} of {done} checks passed")
    return wrong


def torch_sequence(
    x: torch.Tensor, prologue: str, gamma, bias, history: int, pad: tuple[int, int, int, int]
) -> torch.Tensor:
    """What eager torch does for the same result, pass by pass, in x's dtype."""
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, 1, 1, 1)
    if prologue == "norm_silu":
        scale = gamma.to(x.dtype).view(-1, 1, 1, 1)
        x = F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * scale)
    elif prologue == "nearest2x":
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
    if history:
        batch, channels, _, height, width = x.shape
        front = x.new_zeros((batch, channels, history, height, width))
        x = torch.cat((front, x), 2)
    return F.pad(x, pad)


def time_us(make: Callable[[], Callable[[], object]], nbytes: int) -> float:
    """Median microseconds of a call; make() gives a call on inputs of its own."""
    calls = [make() for _ in range(min(max(2, -(-L2_BYTES // nbytes)), 12))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    size = 2 << 30

    def make():
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return 2 * size / time_us(make, size) / 1e3


def time_case(case: Case, rate: float) -> None:
    given = inputs(case, torch.bfloat16, DEVICE)
    shape = result_shape(case)
    nbytes = 2 * (given["x"].numel() + shape.numel())

    def ours():
        x = given["x"].clone(memory_format=LAST)
        out = torch.empty(shape, dtype=x.dtype, device=DEVICE, memory_format=LAST)
        return lambda: halo.conv_input(**(given | {"x": x}), out=out)

    def plain(run):
        x = given["x"].clone(memory_format=LAST)
        return lambda: run(**(given | {"x": x}))

    us = time_us(ours, nbytes)
    sequence = time_us(lambda: plain(torch_sequence), nbytes)
    eager = time_us(lambda: plain(reference_conv.conv_input), nbytes)
    reached = nbytes / us / 1e3
    print(
        f"{case.name:22} {us:9.1f} us {reached:7.0f} GB/s {100 * reached / rate:5.1f} % of copy"
        f"   torch sequence {sequence / us:5.2f} x   reference {eager / us:5.2f} x",
        flush=True,
    )
    torch.cuda.empty_cache()


def time_exchange() -> None:
    """Both kernels between two ranks that share this GPU: what an exchange costs but the wire."""
    case = replace(DECODER[6], shape=(256, 33, 66, 320))
    given = inputs(case, torch.bfloat16, DEVICE)
    first, second = Ranks(2, edge_bytes(case, 3, torch.bfloat16), device=DEVICE).slots
    alone = time_us(lambda: lambda: halo.conv_input(**given), 1 << 40)

    def both():
        halves = [halo.send_edges(slots=slots, **given) for slots in (first, second)]
        for half, slots in zip(halves, (first, second), strict=True):
            halo.fill_edges(*half, slots)

    pair = time_us(lambda: both, 1 << 40)
    print(f"\nstrip {case.shape}: alone {alone:.1f} us, with its exchange {pair / 2:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="take no times")
    only_check = parser.parse_args().check
    wrong = run_checks()
    if wrong or only_check:
        return bool(wrong)
    rate = copy_rate()
    print(f"\n{torch.cuda.get_device_name()}, bf16, copy {rate:.0f} GB/s")
    for case in (*DECODER, *ENCODER):
        time_case(case, rate)
    time_exchange()
    return 0


if __name__ == "__main__":
    sys.exit(main())
