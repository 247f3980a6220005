"""SwiGLU's product: silu(gate) * up.

    y = round(g / (1 + exp(-g))) * u        gate_up [M, 2 I] = [g | u] -> y [M, I]

The sigmoid is float32; silu is rounded to the dtype before the product, as eager torch does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (columns a program, warps) by bytes of an element.
TILES = {2: (1024, 4), 4: (2048, 8)}


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, in_stride, out_stride, width, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_up_ptr += row * in_stride
    gate = tl.load(gate_up_ptr + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    y = (silu * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * out_stride + columns, y, mask=inside)


def silu_mul(
    gate_up: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """gate_up [M, 2 I] -> [M, I] of the same dtype; rows may be strided."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width)) if out is None else out
    assert gate_up.shape[1] == 2 * width, gate_up.shape
    assert out.shape == (rows, width), (out.shape, gate_up.shape)
    assert out.dtype == gate_up.dtype and out.device == gate_up.device, (out.dtype, out.device)
    assert gate_up.stride(1) == 1 and out.stride(1) == 1, (gate_up.stride(), out.stride())
    block, warps = tile or TILES[gate_up.element_size()]
    block = min(block, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    if rows:
        _silu_mul_kernel[(blocks * rows,)](
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            width,
            blocks,
            BLOCK=block,
            num_warps=warps,
        )
    return out
