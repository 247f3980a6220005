"""What encoder and decoder share: convolutions with pending bias, residual and attention blocks.

Activations are [1, C, T, H, W] in channels_last_3d, one strip a rank. Parameter names and shapes
are those of diffusers' checkpoint (AutoencoderKLWan, is_residual).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.vae.strips import Flow

BORDER = (1, 1, 1, 1)
RIGHT_BOTTOM = (0, 1, 0, 1)


class Pending(NamedTuple):
    """The activation x + bias, the addition left to whoever reads x next.

    Passes over x for biases alone cost 9 ms of a decode of D. x [1, C, T, H, W]; bias [C] float32,
    or None for 0.
    """

    x: torch.Tensor
    bias: torch.Tensor | None = None

    def settle(self) -> Pending:
        """The same value with the bias added, in place."""
        if self.bias is None:
            return self
        self.x.add_(self.bias.to(self.x.dtype).view(-1, 1, 1, 1))
        return Pending(self.x)

    def add(self, other: Pending) -> Pending:
        """self + other, in place in self.x; the biases stay pending."""
        biases = [bias for bias in (self.bias, other.bias) if bias is not None]
        self.x.add_(other.x)
        return Pending(self.x, sum(biases[1:], biases[0]) if biases else None)


class Place(NamedTuple):
    """Where and how parameters are kept.

    `taps_outermost`: 3x3x3 weights are stored tap by tap in time, so that one tap is a 2-D
    channels-last weight as it stands. The encoder's case, which mostly sees one frame; a clip then
    copies each weight once, 0.3 GB in all.
    """

    device: torch.device
    dtype: torch.dtype
    taps_outermost: bool = False

    @property
    def wide(self) -> Place:
        """The same with float32 at least: norms' gammas and pending biases."""
        return self._replace(dtype=torch.promote_types(self.dtype, torch.float32))

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter in the memory order that cuDNN reads: channels last."""
        if len(shape) == 5 and self.taps_outermost:
            out, into, taps, height, width = shape
            stored = (taps, out, height, width, into)
            data = torch.empty(stored, device=self.device, dtype=self.dtype).permute(1, 4, 0, 2, 3)
            return nn.Parameter(data, requires_grad=False)
        orders = {4: torch.channels_last, 5: torch.channels_last_3d}
        order = orders.get(len(shape), torch.contiguous_format)
        data = torch.empty(shape, device=self.device, dtype=self.dtype, memory_format=order)
        return nn.Parameter(data, requires_grad=False)


class Stage(NamedTuple):
    """One resolution of encoder or decoder: widths in channels, and what is resampled."""

    into: int
    out: int
    space: bool
    time: bool

    @property
    def factors(self) -> tuple[int, int]:
        """(frames, height and width) by which the stage resamples."""
        return 1 + self.time, 1 + self.space


def stage_frames(latents: int, time: int, first: bool) -> int:
    """Frames of a group of latent frames at a stage with `time` frames a latent: frame 0 is one."""
    return latents * time - (time - 1 if first else 0)


def res_blocks(place: Place, stage: Stage, count: int) -> nn.ModuleList:
    """`count` residual blocks, the first of which changes the width."""
    return nn.ModuleList(
        ResBlock(place, stage.out if i else stage.into, stage.out) for i in range(count)
    )


class Norm(nn.Module):
    """x / max(||x||_2, 1e-12) * sqrt(C) * gamma over the channels; `ops.conv_input` applies it."""

    def __init__(self, place: Place, *shape: int) -> None:
        super().__init__()
        self.gamma = place.parameter(*shape)


class CausalConv(nn.Module):
    """3x3x3 convolution, causal in time (zeros or earlier frames as history), bias left pending."""

    def __init__(self, place: Place, into: int, out: int) -> None:
        super().__init__()
        self.weight = place.parameter(out, into, 3, 3, 3)
        self.bias = place.wide.parameter(out)

    def forward(self, x: Pending, flow: Flow, norm: Norm | None = None) -> Pending:
        """conv(x), or conv(silu(norm(x)))."""
        history = self._history(x.x, flow)
        padded = flow.strips.padded(
            x.x,
            prologue="none" if norm is None else "norm_silu",
            gamma=None if norm is None else norm.gamma.flatten(),
            bias=x.bias,
            history=history,
            pad=BORDER,
        )
        return self._convolve(padded, flow, history)

    def from_whole(self, x: torch.Tensor, flow: Flow, scale: int) -> Pending:
        """conv of a tensor that every rank holds in full: the halo is sliced, not exchanged."""
        strip, before, after = flow.strips.cut(x, scale)
        history, axis = self._history(x, flow), flow.strips.axis
        padded = ops.conv_input(
            strip,
            prologue="none",
            history=history,
            pad=BORDER,
            axis=axis,
            before=before,
            after=after,
        )
        return self._convolve(padded, flow, history)

    def _history(self, x: torch.Tensor, flow: Flow) -> int:
        """One frame without a past needs the last temporal tap alone: the others meet zeros."""
        return 0 if flow.at_once and x.shape[2] == 1 else 2

    def _convolve(self, padded: torch.Tensor, flow: Flow, history: int) -> Pending:
        if history == 0:
            return Pending(F.conv2d(padded[:, :, 0], self.weight[:, :, -1]).unsqueeze(2), self.bias)
        return Pending(F.conv3d(flow.carry(self, padded, history), self.weight), self.bias)


class HalvingConv(nn.Module):
    """3x3 convolution with stride 2 of every frame by itself, bias left pending."""

    def __init__(self, place: Place, into: int, out: int) -> None:
        super().__init__()
        self.weight = place.parameter(out, into, 3, 3)
        self.bias = place.wide.parameter(out)

    def forward(self, x: Pending, flow: Flow) -> Pending:
        """Pads right and bottom only, so it needs the next strip's edge alone."""
        padded = flow.strips.padded(x.x, prologue="none", bias=x.bias, pad=RIGHT_BOTTOM)
        frames = F.conv2d(padded[0].transpose(0, 1), self.weight, stride=2)
        return Pending(frames.transpose(0, 1)[None], self.bias)


class TimeConv(nn.Module):
    """Weights of a 3x1x1 convolution over frames; the resampling blocks run it."""

    def __init__(self, place: Place, into: int, out: int) -> None:
        super().__init__()
        self.weight = place.parameter(out, into, 3, 1, 1)
        self.bias = place.parameter(out)


class PointConv(nn.Module):
    """1x1 convolution as a matrix product; `kernel`: the checkpoint's ones, two or three."""

    def __init__(self, place: Place, into: int, out: int, *kernel: int) -> None:
        super().__init__()
        self.weight = place.parameter(out, into, *kernel)
        self.bias = place.parameter(out)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., into] -> [..., out]."""
        return F.linear(rows, self.weight.flatten(1), self.bias)

    def pending(self, x: Pending) -> Pending:
        """The product of x alone; what it makes of x's bias joins its own as the pending bias."""
        matrix = self.weight.flatten(1)
        y = F.linear(x.x.movedim(1, -1), matrix).movedim(-1, 1)
        bias = self.bias.to(torch.promote_types(matrix.dtype, torch.float32))
        if x.bias is not None:
            bias = torch.addmv(bias, matrix.to(bias.dtype), x.bias)
        return Pending(y, bias)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1x1x1 where the width changes."""

    def __init__(self, place: Place, into: int, out: int) -> None:
        super().__init__()
        self.norm1 = Norm(place.wide, into, 1, 1, 1)
        self.conv1 = CausalConv(place, into, out)
        self.norm2 = Norm(place.wide, out, 1, 1, 1)
        self.conv2 = CausalConv(place, out, out)
        self.conv_shortcut = PointConv(place, into, out, 1, 1, 1) if into != out else None

    def forward(self, x: Pending, flow: Flow) -> Pending:
        y = self.conv1(x, flow, self.norm1)
        y = self.conv2(y, flow, self.norm2)
        return y.add(x if self.conv_shortcut is None else self.conv_shortcut.pending(x))


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))) over each frame's positions; one head, ranks share keys."""

    def __init__(self, place: Place, width: int) -> None:
        super().__init__()
        self.norm = Norm(place, width, 1, 1)
        self.to_qkv = PointConv(place, width, 3 * width, 1, 1)
        self.proj = PointConv(place, width, width, 1, 1)

    def forward(self, x: Pending, flow: Flow) -> Pending:
        x = x.settle()
        rows = x.x.movedim(1, -1)
        width = rows.shape[-1]
        # mean + eps instead of max(norm, 1e-12): equal up to rounding, and 0 stays 0.
        flat = ops.rms_norm(rows.reshape(-1, width), self.norm.gamma.flatten(), 1e-24 / width)
        qkv = self.to_qkv(flat).view(*rows.shape[:-1], 3 * width)
        whole = flow.strips.gather(qkv[..., width:].movedim(-1, 1)).movedim(1, -1)
        q, k, v = (
            part.flatten(2, 3).transpose(0, 1)
            for part in (qkv[..., :width], whole[..., :width], whole[..., width:])
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        x.x.movedim(1, -1).add_(self.proj(mixed).view(rows.shape))
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the latent's resolution."""

    def __init__(self, place: Place, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(place, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(place, width)])

    def forward(self, x: Pending, flow: Flow) -> Pending:
        x = self.resnets[0](x, flow)
        x = self.attentions[0](x, flow)
        return self.resnets[1](x, flow)
