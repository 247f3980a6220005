"""Encoder of Wan2.2's VAE: patches [1, 12, 1 + 4 k, 8 h, 8 w] -> moments [1, 2 z, 1 + k, h, w].

All frames at once, or in groups of latent frames that carry each convolution's last input frames:
one function, equal up to rounding. Spatial downsampling pads right and bottom only; temporal
downsampling passes frame 0 and convolves windows (0, 1, 2), (2, 3, 4), … of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cosmos3_fast.config import VAEConfig
from cosmos3_fast.vae.blocks import (
    CausalConv,
    HalvingConv,
    MidBlock,
    Norm,
    Pending,
    Place,
    Stage,
    TimeConv,
    res_blocks,
    stage_frames,
)
from cosmos3_fast.vae.strips import Flow


def patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[1, 3, T, H, W] -> [1, 3 patch^2, T, H / patch, W / patch].

    Channels are ordered colour, column in the patch, row in the patch.
    """
    split = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    rows = split.permute(0, 2, 3, 5, 1, 6, 4).flatten(4)
    return rows.movedim(-1, 1)


def average_down(x: torch.Tensor, out: int, time: int, space: int) -> torch.Tensor:
    """The down-shortcut: each output channel is the mean of its share of the cell's values.

    Values are ordered channel, frame, row, column of the cell. x [1, C, T, H, W] -> [1, out, ceil(T
    / time), H / space, W / space]; zero frames in front fill up T.
    """
    lead = -x.shape[2] % time
    rows = F.pad(x.movedim(1, -1), (0, 0, 0, 0, 0, 0, lead, 0)) if lead else x.movedim(1, -1)
    split = (
        rows.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
    )  # [1, T, t, H, r, W, c, C]
    values = split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
    return values.unflatten(4, (out, -1)).mean(-1).movedim(-1, 1)


class Downsample(nn.Module):
    """Halve height and width by a stride-2 3x3, then, where asked, frames likewise."""

    def __init__(self, place: Place, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": HalvingConv(place, width, width)})
        self.time_conv = TimeConv(place, width, width) if time else None

    def forward(self, x: Pending, flow: Flow) -> Pending:
        x = self.resample["1"](x, flow)
        return x if self.time_conv is None else self._halve_frames(x, self.time_conv, flow)

    def _halve_frames(self, x: Pending, conv: TimeConv, flow: Flow) -> Pending:
        if flow.at_once and x.x.shape[2] == 1:
            return x
        frames = x.settle().x
        if not flow.first:
            assert flow.history is not None, "a later group needs the frames before it"
            frames = torch.cat((flow.history[self], frames), 2)
        if flow.history is not None:
            flow.history[self] = frames[:, :, -1:].clone()
        if frames.shape[2] == 1:
            return Pending(frames)
        halved = F.conv3d(frames, conv.weight, conv.bias, stride=(2, 1, 1))
        return Pending(torch.cat((frames[:, :, :1], halved), 2) if flow.first else halved)


class DownBlock(nn.Module):
    """Residual blocks and a downsampling (not in the last block), around the averaging shortcut."""

    def __init__(self, place: Place, stage: Stage, blocks: int) -> None:
        super().__init__()
        time, space = stage.factors
        if stage.into * time * space**2 % stage.out:
            raise ValueError(
                f"vae config: no down-shortcut from {stage.into} to {stage.out} channels, "
                f"{time} x {space} x {space}"
            )
        self.resnets = res_blocks(place, stage, blocks)
        self.downsampler = Downsample(place, stage.out, stage.time) if stage.space else None
        self.stage = stage

    def forward(self, x: Pending, flow: Flow) -> Pending:
        whole = x.settle()
        x = whole
        for block in self.resnets:
            x = block(x, flow)
        if self.downsampler is not None:
            x = self.downsampler(x, flow)
        return x.add(Pending(average_down(whole.x, self.stage.out, *self.stage.factors)))


class Encoder(nn.Module):
    """conv_in, four down blocks, mid block, norm, conv_out."""

    def __init__(self, config: VAEConfig, place: Place) -> None:
        super().__init__()
        place = place._replace(taps_outermost=True)
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        last, times = len(config.dim_mult) - 1, (*config.temperal_downsample, False)
        self.stages = [
            Stage(widths[i], widths[i + 1], space=i < last, time=i < last and times[i])
            for i in range(last + 1)
        ]
        self.blocks, self.scale = config.num_res_blocks, 2**last
        self.conv_in = CausalConv(place, config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(place, s, self.blocks) for s in self.stages)
        self.mid_block = MidBlock(place, widths[-1])
        self.norm_out = Norm(place.wide, widths[-1], 1, 1, 1)
        self.conv_out = CausalConv(place, widths[-1], 2 * config.z_dim)

    def forward(self, patches: torch.Tensor, flow: Flow) -> Pending:
        """patches: the whole image on every rank; the result is this rank's strip."""
        x = self.conv_in.from_whole(patches, flow, self.scale)
        for block in self.down_blocks:
            x = block(x, flow)
        return self.conv_out(self.mid_block(x, flow), flow, self.norm_out)

    def sizes(
        self, frames: int, height: int, width: int, *, first: bool
    ) -> Iterator[tuple[int, int]]:
        """Elements of each large convolution's input, and of one frame of it that groups carry on.

        For a group of `frames` latent frames, with or without frame 0, of `height` x `width`
        latent pixels.
        """
        time, scale = 2 ** sum(stage.time for stage in self.stages), self.scale
        for stage in self.stages:
            plane = (height * scale + 2) * (width * scale + 2)
            for channels in (stage.into, *[stage.out] * (2 * self.blocks - 1)):
                yield channels * plane * (stage_frames(frames, time, first) + 2), channels * plane
            time, scale = time // stage.factors[0], scale // stage.factors[1]
