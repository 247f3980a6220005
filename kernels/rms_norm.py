"""RMSNorm, alone and after a residual addition.

    y = round(x * rsqrt(mean(x^2) + eps)) * weight          x [M, H], weight [H] -> y [M, H]
    residual += x (one rounding), then the same of residual

The mean and the product are float32; the normalised row is rounded to x.dtype before the weight, as
the model does it (as Qwen3). One program a row, which stays in registers: one read, one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Warps by row length; a row longer than the last entry is refused.
WARPS = ((512, 1), (2048, 4), (8192, 8), (32768, 16))


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual_ptr += row * residual_stride
        residual = tl.load(residual_ptr + columns, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normalised = (wide * scale).to(x.dtype).to(tl.float32)
    y = (normalised * weight.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + row * out_stride + columns, y, mask=inside)


def _warps(width: int) -> int:
    return next(warps for limit, warps in WARPS if width <= limit)


def _check(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> None:
    rows, width = x.shape
    assert width <= WARPS[-1][0], f"row length {width} > {WARPS[-1][0]}"
    assert weight.shape == (width,) and weight.is_contiguous(), (weight.shape, width)
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    for tensor in (x, *others):
        assert tensor.shape == (rows, width), (tensor.shape, x.shape)
        assert tensor.stride(1) == 1 or width == 1, tensor.stride()
        assert tensor.dtype == x.dtype and tensor.device == x.device, (tensor.dtype, tensor.device)


def _launch(x, residual, weight, eps, out, warps=None) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    added = x if residual is None else residual
    _check(x, weight, added, out)
    rows, width = x.shape
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            added,
            weight,
            out,
            x.stride(0),
            added.stride(0),
            out.stride(0),
            width,
            eps,
            ADD=residual is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=warps or _warps(width),
        )
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    warps: int | None = None,
) -> torch.Tensor:
    """x [M, H], weight [H] -> [M, H], all of one dtype; rows may be strided. out may be x."""
    return _launch(x, None, weight, eps, out, warps)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    warps: int | None = None,
) -> torch.Tensor:
    """residual [M, H] += x [M, H] in place, then rms_norm(residual, weight [H]) -> [M, H].

    All of one dtype; rows may be strided; out may be x.
    """
    return _launch(x, residual, weight, eps, out, warps)
