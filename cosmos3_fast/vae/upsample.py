"""Upsampling of the decoder's blocks, with the shortcut that duplicates around it.

Nearest upsampling by two and a 3x3 convolution is a function of the small picture: along one axis
an even pixel 2 i meets small pixels i - 1, i, i with taps w0, w1, w2, an odd one i, i, i + 1. So
each of the four phases (p, q) of the output is a 2x2 convolution of the small picture, with
(w0, w1 + w2) or (w0 + w1, w2) along either axis: 4/9 of the products, and no doubled picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.vae.blocks import BORDER, Pending, Place, Stage, TimeConv
from cosmos3_fast.vae.strips import Flow


def phase_taps(weight: torch.Tensor) -> torch.Tensor:
    """[out, into, 3, 3] -> [4, out, into, 2, 2], one channels-last weight for each phase 2 p + q.

    Tap a of phase p is the sum over two neighbours, from p + 2 a on, of (0, w0, w1, w2, 0), along
    both axes: summed in float32, rounded once.
    """
    out, into = weight.shape[:2]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    sums = F.avg_pool2d(wide, 2, stride=1, padding=1, divisor_override=1)
    shape = (2, 2, out, 2, 2, into)
    taps = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    taps.copy_(sums.view(out, into, 2, 2, 2, 2).permute(3, 5, 0, 2, 4, 1))
    return taps.flatten(0, 1).permute(0, 1, 4, 2, 3)


class PhaseConv(nn.Module):
    """Every frame doubled by nearest, then a 3x3 convolution, as its four phases; bias pending.

    The taps' sums are computed at each use (three launches), so they follow the weight.
    """

    def __init__(self, place: Place, into: int, out: int) -> None:
        super().__init__()
        self.weight = place.parameter(out, into, 3, 3)
        self.bias = place.wide.parameter(out)

    def forward(self, x: Pending, flow: Flow) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x [1, into, T, H, W] -> phases (0, 0), (0, 1), (1, 0), (1, 1), each [T, out, H + 1,
        W + 1], and the pending bias: phase (p, q) of pixel (i, j) is at (i + p, j + q).
        """
        padded = flow.strips.padded(x.x, prologue="none", bias=x.bias, pad=BORDER)
        frames = padded[0].transpose(0, 1)
        return [F.conv2d(frames, taps) for taps in phase_taps(self.weight)], self.bias


class Upsample(nn.Module):
    """Double frames (where asked), then height and width, and add the block's input, duplicated.

    The shortcut: output (channel o; frame a, row p, column q in its cell) is input channel
    ((o * time + a) * 4 + 2 p + q) // repeats, with repeats = out * 4 * time / into.
    """

    def __init__(self, place: Place, stage: Stage) -> None:
        super().__init__()
        into, width, time = stage.into, stage.out, stage.factors[0]
        if into % width or 4 * time % (into // width):
            raise ValueError(
                f"vae config: no up-shortcut from {into} to {width} channels, {time} x 2 x 2"
            )
        # Every position of a cell reads one channel, so a pending bias stays one vector.
        self.uniform, self.time = into == width, time
        self.resample = nn.ModuleDict({"1": PhaseConv(place, width, width)})
        self.time_conv = TimeConv(place, width, 2 * width) if stage.time else None

    def forward(self, x: Pending, whole: Pending, flow: Flow) -> Pending:
        """x [1, out, T, H, W] and the block's input `whole` [1, into, T, H, W] -> [1, out,
        T time - (time - 1 if flow.first else 0), 2 H, 2 W].
        """
        assert whole.bias is None or self.uniform, "settle the bias first"
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, flow)
        phases, bias = self.resample["1"](x, flow)
        y = ops.interleave_add(phases, whole.x, time=self.time, first=flow.first)
        return Pending(y, bias if whole.bias is None else bias + whole.bias)

    def _double_frames(self, x: Pending, conv: TimeConv, flow: Flow) -> Pending:
        """Frame 0 stays; each later one becomes two, halves of the convolution's channels."""
        lead = int(flow.first)
        later = x.x[:, :, lead:]
        if later.shape[2] == 0:
            return x
        padded = ops.conv_input(later, prologue="none", bias=x.bias, history=2)
        pairs = F.conv3d(flow.carry(self, padded, 2), conv.weight).unflatten(1, (2, -1))
        _, _, channels, frames, height, width = pairs.shape
        shape = (1, channels, lead + 2 * frames, height, width)
        out = torch.empty(
            shape, dtype=pairs.dtype, device=pairs.device, memory_format=torch.channels_last_3d
        )
        if lead:
            out[:, :, :1] = Pending(x.x[:, :, :1].clone(), x.bias).settle().x
        bias = conv.bias.view(2, channels).T[:, None, :, None, None]
        torch.add(
            pairs.permute(0, 2, 3, 1, 4, 5), bias, out=out[:, :, lead:].unflatten(2, (frames, 2))
        )
        return Pending(out)
