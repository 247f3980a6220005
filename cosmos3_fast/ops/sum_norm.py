"""Launcher of `_C`'s sum over ranks with the residual's addition and the RMSNorm that follows.

`csrc/sum.h` has the formula. It runs `_C` on the device of its tensors, the CPU twin for CPU
tensors (tests); `ops` decides when it is called. Nothing here waits for the device, so it may be
captured, any number of times: its epoch lives on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosmos3_fast.ops.extension import extension, place

if TYPE_CHECKING:
    from cosmos3_fast.parallel_sum import SumMemory

__all__ = ["DTYPES", "sum_add_rms_norm"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def sum_add_rms_norm(
    part: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    memory: SumMemory,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """residual [M, H] += the ranks' parts [M, H], in this rank's share of the rows; RMSNorm of all
    rows -> [M, H], memory that the next sum writes to.

    `part` must be the first rows of `memory.part`. `whole`: every row of the residual, which must
    be the first rows of `memory.residual`, is complete afterwards. The sum is float32 and rounded
    once, with the residual. Every rank must make the same sequence of calls on `memory`, with equal
    M and `whole`. A rank that does not come in time leaves a failure that `memory.failure()` tells.
    Raises ValueError for shapes, dtypes and memory that disagree.
    """
    rows, columns = part.shape
    _require("part", part, memory.part[:rows])
    if whole:
        _require("residual", residual, memory.residual[:rows])
    agrees = residual.shape == part.shape and weight.shape == (columns,)
    same = {(t.dtype, t.device) for t in (part, residual, weight)}
    if not agrees or len(same) > 1 or part.dtype not in DTYPES:
        raise ValueError(
            f"residual must be {part.dtype} {[rows, columns]} and weight [{columns}], got "
            f"{residual.dtype} {list(residual.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    if not residual.is_contiguous() or not weight.is_contiguous():
        raise ValueError("residual and weight must be contiguous")
    extension().sum_norm(
        residual=residual.data_ptr(),
        weight=weight.data_ptr(),
        eps=eps,
        dtype=DTYPES[part.dtype],
        rows=rows,
        columns=columns,
        **memory.arguments(whole),
        **place(part),
    )
    return memory.normed[:rows]


def _require(name: str, given: torch.Tensor, held: torch.Tensor) -> None:
    same = given.data_ptr() == held.data_ptr() and given.stride() == held.stride()
    if not same or given.shape != held.shape or given.dtype != held.dtype:
        raise ValueError(
            f"{name} {given.dtype} {list(given.shape)} is not the ranks' memory of "
            f"{held.dtype} {list(held.shape)}"
        )
