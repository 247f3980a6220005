"""The timestep embedding, added to the noisy tokens and to no others.

    x[m] += table[step]   where noisy[m]        x [M, H], table [S, H], step [1], noisy [M]

The sum is float32, rounded once. The step is read on the device, so one graph serves every step;
rows that are not noisy are neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Warps by row length; a row longer than the last entry is refused.
WARPS = ((1024, 2), (32768, 8))


@triton.jit
def _timestep_add_kernel(
    x_ptr, table_ptr, step_ptr, noisy_ptr, x_stride, table_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(noisy_ptr + row) != 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        table_ptr += tl.load(step_ptr).to(tl.int64) * table_stride
        x_ptr += row * x_stride
        x = tl.load(x_ptr + columns, mask=inside, other=0.0)
        added = tl.load(table_ptr + columns, mask=inside, other=0.0)
        y = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + columns, y, mask=inside)


def timestep_add(
    x: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    noisy: torch.Tensor,
    *,
    warps: int | None = None,
) -> torch.Tensor:
    """x [M, H] += table [S, H][step] in place where noisy [M] uint8 is not 0; returns x.

    step int32 [1] on the device must lie in [0, S): it is not checked.
    """
    rows, width = x.shape
    assert table.ndim == 2 and table.shape[1] == width, (table.shape, x.shape)
    assert x.stride(1) == 1 and table.stride(1) == 1, (x.stride(), table.stride())
    assert noisy.shape == (rows,) and noisy.is_contiguous(), (noisy.shape, x.shape)
    assert noisy.dtype == torch.uint8 and step.dtype == torch.int32, (noisy.dtype, step.dtype)
    assert step.numel() == 1 and width <= WARPS[-1][0], (step.shape, width)
    assert x.device == table.device == step.device == noisy.device
    if rows:
        _timestep_add_kernel[(rows,)](
            x,
            table,
            step,
            noisy,
            x.stride(0),
            table.stride(0),
            width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=warps or next(warps for limit, warps in WARPS if width <= limit),
        )
    return x
