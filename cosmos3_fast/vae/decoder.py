"""Decoder of Wan2.2's VAE: latents [1, z, t, h, w] -> patches [1, 12, 1 + 4 (t - 1), 8 h, 8 w].

All frames at once, or in groups of latent frames that carry each convolution's last input frames:
one function, equal up to rounding. Temporal upsampling leaves frame 0 as it is and convolves the
later frames alone, with zeros (not frame 0) as their history.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.config import VAEConfig
from cosmos3_fast.vae.blocks import (
    CausalConv,
    MidBlock,
    Norm,
    Pending,
    Place,
    PlaneConv,
    Stage,
    TimeConv,
    res_blocks,
    stage_frames,
)
from cosmos3_fast.vae.strips import Flow


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[1, 3 patch^2, T, H, W] -> [1, 3, T, H * patch, W * patch], the inverse of `patchify`."""
    split = x.unflatten(1, (-1, patch, patch))  # [1, colour, column, row, T, H, W]
    return split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


class Duplicate:
    """The up-shortcut: output (channel o; frame a, row p, column q in its cell) is input channel
    ((o * time + a) * 4 + 2 p + q) // repeats, with repeats = out * 4 * time / into.

    Seen as axes: the input channels are [out, a', p', q'], where a primed axis is as long as its
    factor or 1, and the rest is a broadcast; nothing is gathered.
    """

    def __init__(self, stage: Stage) -> None:
        into, out, time = stage.into, stage.out, stage.factors[0]
        self.out, self.time = out, time
        share, axes = max(into // out, 1), []
        for factor in (time, 2, 2):
            axes.append(min(factor, share))
            share //= axes[-1]
        if into != out * axes[0] * axes[1] * axes[2]:
            raise ValueError(
                f"vae config: no up-shortcut from {into} to {out} channels, {time} x 2 x 2"
            )
        self.axes = tuple(axes)

    @property
    def uniform(self) -> bool:
        """Every position of a cell reads one channel, so a pending bias stays one vector."""
        return self.axes == (1, 1, 1)

    def add_to(self, y: Pending, x: Pending, *, first: bool) -> Pending:
        """y + duplicate(x), in place in y.x.

        `first`: the group's first frame yields only the last of its `time` frames.

        x [1, into, T, H, W]; y [1, out, T time - (time - 1 if first), 2 H, 2 W].
        """
        assert x.bias is None or self.uniform, "settle the bias first"
        lead = 1 if first and self.time > 1 else 0
        if lead:
            self._add(y.x[:, :, :1], x.x[:, :, :1], last_only=True)
        if x.x.shape[2] > lead:
            self._add(y.x[:, :, lead:], x.x[:, :, lead:], last_only=False)
        if x.bias is None:
            return y
        return Pending(y.x, x.bias if y.bias is None else y.bias + x.bias)

    def _add(self, y: torch.Tensor, x: torch.Tensor, *, last_only: bool) -> None:
        source = x.unflatten(1, (self.out, *self.axes)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        time = self.time
        if last_only:
            source, time = source[:, :, :, -1:], 1
        cells = y.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, time))
        cells.add_(source)


class Upsample(nn.Module):
    """Double frames (where asked), then height and width: nearest, then a 3x3 convolution."""

    def __init__(self, place: Place, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": PlaneConv(place, width, width)})
        self.time_conv = TimeConv(place, width, 2 * width) if time else None

    def forward(self, x: Pending, flow: Flow) -> Pending:
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, flow)
        return self.resample["1"](x, flow, prologue="nearest2x")

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


class UpBlock(nn.Module):
    """Residual blocks and an upsampling with its duplicating shortcut (not in the last block)."""

    def __init__(self, place: Place, stage: Stage, blocks: int) -> None:
        super().__init__()
        self.resnets = res_blocks(place, stage, blocks)
        self.upsampler = Upsample(place, stage.out, stage.time) if stage.space else None
        self.shortcut = Duplicate(stage) if stage.space else None

    def forward(self, x: Pending, flow: Flow) -> Pending:
        if self.shortcut is not None and not self.shortcut.uniform:
            x = x.settle()
        whole = x
        for block in self.resnets:
            x = block(x, flow)
        if self.upsampler is None or self.shortcut is None:
            return x
        return self.shortcut.add_to(self.upsampler(x, flow), whole, first=flow.first)


class Decoder(nn.Module):
    """conv_in, mid block, four up blocks, norm, conv_out."""

    def __init__(self, config: VAEConfig, place: Place) -> None:
        super().__init__()
        factors, last = config.dim_mult[::-1], len(config.dim_mult) - 1
        widths = [config.decoder_base_dim * factor for factor in (factors[0], *factors)]
        times = (*config.temperal_downsample[:last][::-1], False)
        self.stages = [
            Stage(widths[i], widths[i + 1], space=i < last, time=times[i]) for i in range(last + 1)
        ]
        self.blocks, self.scale = config.num_res_blocks + 1, 2**last
        self.conv_in = CausalConv(place, config.z_dim, widths[0])
        self.mid_block = MidBlock(place, widths[0])
        self.up_blocks = nn.ModuleList(UpBlock(place, s, self.blocks) for s in self.stages)
        self.norm_out = Norm(place.wide, widths[-1], 1, 1, 1)
        self.conv_out = CausalConv(place, widths[-1], config.out_channels)

    def forward(self, latents: torch.Tensor, flow: Flow) -> Pending:
        """latents: the whole image on every rank; the result is this rank's strip."""
        x = self.mid_block(self.conv_in.from_whole(latents, flow, 1), flow)
        for block in self.up_blocks:
            x = block(x, flow)
        return self.conv_out(x, flow, self.norm_out)

    def sizes(
        self, frames: int, height: int, width: int, *, first: bool
    ) -> Iterator[tuple[int, int]]:
        """Elements of each large convolution's input, and of one frame of it that groups carry on.

        For a group of `frames` latent frames, with or without frame 0, of `height` x `width`
        latent pixels.
        """
        time = scale = 1
        for stage in self.stages:
            plane = (height * scale + 2) * (width * scale + 2)
            for channels in (stage.into, *[stage.out] * (2 * self.blocks - 1)):
                yield channels * plane * (stage_frames(frames, time, first) + 2), channels * plane
            time, scale = time * stage.factors[0], scale * stage.factors[1]
            if stage.space:
                plane = (height * scale + 2) * (width * scale + 2)
                yield stage.out * plane * stage_frames(frames, time, first), 0
