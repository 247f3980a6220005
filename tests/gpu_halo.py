"""The halo kernels on one GPU: `python tests/gpu_halo.py`.

Into NaN-filled results between guards: every case of halo_cases.py against float64, and ranks that
share this GPU against the slices of one. Exit status 1 on a failed check. bench/test_halo.py takes
the times.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from halo_cases import (
    DECODER,
    ENCODER,
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

from cosmos3_fast.ops import halo

DEVICE = "cuda:0"
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
    if sizes[-1] < max(1, *case.pad):
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


if __name__ == "__main__":
    sys.exit(bool(run_checks()))
