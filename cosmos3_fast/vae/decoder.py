"""Decoder of Wan2.2's VAE: latents [1, z, t, h, w] -> patches [1, 12, 1 + 4 (t - 1), 8 h, 8 w].

All frames at once, or in groups of latent frames that carry each convolution's last input frames:
one function, equal up to rounding. Temporal upsampling leaves frame 0 as it is and convolves the
later frames alone, with zeros (not frame 0) as their history.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from cosmos3_fast.config import VAEConfig
from cosmos3_fast.vae.blocks import (
    CausalConv,
    MidBlock,
    Norm,
    Pending,
    Place,
    Stage,
    res_blocks,
    stage_frames,
)
from cosmos3_fast.vae.strips import Flow
from cosmos3_fast.vae.upsample import Upsample


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[1, 3 patch^2, T, H, W] -> [1, 3, T, H * patch, W * patch], the inverse of `patchify`."""
    split = x.unflatten(1, (-1, patch, patch))  # [1, colour, column, row, T, H, W]
    return split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


class UpBlock(nn.Module):
    """Residual blocks and an upsampling with its duplicating shortcut (not in the last block)."""

    def __init__(self, place: Place, stage: Stage, blocks: int) -> None:
        super().__init__()
        self.resnets = res_blocks(place, stage, blocks)
        self.upsampler = Upsample(place, stage) if stage.space else None

    def forward(self, x: Pending, flow: Flow) -> Pending:
        if self.upsampler is not None and not self.upsampler.uniform:
            x = x.settle()
        whole = x
        for block in self.resnets:
            x = block(x, flow)
        return x if self.upsampler is None else self.upsampler(x, whole, flow)


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
            if stage.space:  # of the small picture
                yield stage.out * plane * stage_frames(frames, time, first), 0
