"""Plain torch reference of the VAE's convolution input: prologue, history and padding in one.

A 3x3x3 or 3x3 convolution of the VAE pads nothing itself: `conv_input` makes the padded
channels-last tensor that it reads, `conv_edges` what a rank sends to its neighbours so that they
can pad with true pixels. Both share one prologue, which acts on pixels one by one, so an edge
equals the row it is a copy of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["PROLOGUES", "conv_edges", "conv_input"]

PROLOGUES = ("none", "norm_silu", "nearest2x")
NORM_FLOOR = 1e-12


def _prologue(
    x: torch.Tensor, prologue: str, gamma: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """prologue(x + bias) without the doubling of "nearest2x"; computed in float32."""
    assert prologue in PROLOGUES, f"prologue must be one of {PROLOGUES}, got {prologue!r}"
    assert (gamma is not None) == (prologue == "norm_silu"), "gamma belongs to norm_silu"
    if prologue != "norm_silu" and bias is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide, copy=True) if bias is None else x + bias.to(wide).view(-1, 1, 1, 1)
    if gamma is None:
        return y.to(x.dtype)
    y.div_(torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(NORM_FLOOR))
    y.mul_((gamma.to(wide).flatten() * x.shape[1] ** 0.5).view(-1, 1, 1, 1))
    return F.silu(y.to(x.dtype), inplace=True)


def _doubled(y: torch.Tensor, prologue: str) -> torch.Tensor:
    """Nearest upsampling as a view [B, C, T, H, 2, W, 2]; other prologues: 1 for 2."""
    factor = 2 if prologue == "nearest2x" else 1
    batch, channels, frames, height, width = y.shape
    shape = (batch, channels, frames, height, factor, width, factor)
    return y[:, :, :, :, None, :, None].expand(shape)


def conv_input(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    history: int = 0,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    axis: int = 3,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [1, C, T, H, W] -> [1, C, history + T, top + H' + bottom, left + W' + right].

    The result is channels_last_3d. Inside stands prologue(x + bias), bias [C] the one that the
    convolution before left out:

        none       x + bias; H' = H, W' = W
        norm_silu  silu(x / max(||x||_2 over C, 1e-12) * sqrt(C) * gamma), gamma [C];
                   the norm in float32, rounded to x.dtype before SiLU
        nearest2x  every pixel four times; H' = 2 H, W' = 2 W

    `history` zero frames stand in front. `pad` = (left, right, top, bottom) is zero, except along
    strip `axis` (3 = H, 4 = W), where `before` (top or left) and `after` (bottom or right), when
    given, fill it: the neighbours' edges after the prologue, [1, C, T, pad, W'] resp. [1, C, T, H',
    pad]. gamma and bias: any floating dtype.
    """
    left, right, top, bottom = pad
    inside = _doubled(_prologue(x, prologue, gamma, bias), prologue)
    batch, channels, frames, height, up, width, _ = inside.shape
    height, width = height * up, width * up
    shape = (batch, channels, history + frames, top + height + bottom, left + width + right)
    out = torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    ).zero_()
    body = out[:, :, history:]
    inner = body[:, :, :, top : top + height, left : left + width]
    inner.unflatten(4, (-1, up)).unflatten(3, (-1, up)).copy_(inside)
    across = body.narrow(7 - axis, left if axis == 3 else top, width if axis == 3 else height)
    if before is not None:
        across.narrow(axis, 0, top if axis == 3 else left).copy_(before)
    if after is not None:
        size = bottom if axis == 3 else right
        across.narrow(axis, across.shape[axis] - size, size).copy_(after)
    return out


def conv_edges(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    axis: int = 3,
    before: int = 0,
    after: int = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The first `before` and last `after` rows (along `axis`, 3 = H, 4 = W) of prologue(x + bias).

    x [1, C, T, H, W] -> [1, C, T, before, W'] and [1, C, T, after, W'] (axis 4: [1, C, T, H', n]);
    None for 0 rows. They are the neighbours' `after` and `before` of `conv_input`.
    """

    def edge(count: int, *, at_end: bool) -> torch.Tensor | None:
        if count == 0:
            return None
        need = -(-count // 2) if prologue == "nearest2x" else count
        part = x.narrow(axis, x.shape[axis] - need if at_end else 0, need)
        full = _doubled(_prologue(part, prologue, gamma, bias), prologue)
        full = full.flatten(5, 6).flatten(3, 4)
        return full.narrow(axis, full.shape[axis] - count if at_end else 0, count)

    return edge(before, at_end=False), edge(after, at_end=True)
