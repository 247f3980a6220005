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

PROLOGUES = ("none", "norm_silu")
NORM_FLOOR = 1e-12


def _prologue(
    x: torch.Tensor, prologue: str, gamma: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """prologue(x + bias), computed in float32."""
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
    """x [1, C, T, H, W] -> [1, C, history + T, top + H + bottom, left + W + right].

    The result is channels_last_3d. Inside stands prologue(x + bias), bias [C] the one that the
    convolution before left out:

        none       x + bias
        norm_silu  silu(x / max(||x||_2 over C, 1e-12) * sqrt(C) * gamma), gamma [C];
                   the norm in float32, rounded to x.dtype before SiLU

    `history` zero frames stand in front. `pad` = (left, right, top, bottom) is zero, except along
    strip `axis` (3 = H, 4 = W), where `before` (top or left) and `after` (bottom or right), when
    given, fill it: the neighbours' edges after the prologue, [1, C, T, pad, W] resp. [1, C, T, H,
    pad]. gamma and bias: any floating dtype.
    """
    left, right, top, bottom = pad
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, history + frames, top + height + bottom, left + width + right)
    out = torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    ).zero_()
    body = out[:, :, history:]
    inner = body[:, :, :, top : top + height, left : left + width]
    inner.copy_(_prologue(x, prologue, gamma, bias))
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

    x [1, C, T, H, W] -> [1, C, T, before, W] and [1, C, T, after, W] (axis 4: [1, C, T, H, n]);
    None for 0 rows. They are the neighbours' `after` and `before` of `conv_input`.
    """

    def edge(count: int, *, at_end: bool) -> torch.Tensor | None:
        if count == 0:
            return None
        part = x.narrow(axis, x.shape[axis] - count if at_end else 0, count)
        return _prologue(part, prologue, gamma, bias)

    return edge(before, at_end=False), edge(after, at_end=True)
