"""Three-axis interleaved rotary positions: text, video and action tokens (docs/model.md, 2)."""

from __future__ import annotations

import torch

from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.request import TEMPORAL_FACTOR, Layout


def inverse_frequencies(config: TransformerConfig) -> torch.Tensor:
    """[D/2] float32 on the CPU, in the one form whose rounding the model was trained with."""
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    return 1.0 / (config.rope_theta ** (index / config.head_dim))


def axis_of_frequency(config: TransformerConfig) -> torch.Tensor:
    """[D/2] int64: which axis (0 time, 1 height, 2 width) turns each frequency."""
    axes = torch.zeros(config.head_dim // 2, dtype=torch.int64, device="cpu")
    for axis in (1, 2):
        axes[axis : 3 * config.rope_axes_dim[axis] : 3] = axis
    return axes


def text_positions(count: int, device: torch.device) -> torch.Tensor:
    """[3, count] float32: token i at (i, i, i)."""
    return torch.arange(count, dtype=torch.float32, device=device).expand(3, count)


def media_positions(
    layout: Layout, text_tokens: int, fps: float, config: TransformerConfig, device: torch.device
) -> torch.Tensor:
    """[3, tokens] float32: video tokens (frame, row, column), then action rows.

    Media start at m = text_tokens + the temporal margin. With fps modulation a latent frame
    advances (base_fps / 4) / (fps / 4) and an action row (base_fps / 4) / fps; without it both
    advance 1.
    """
    start = text_tokens + config.unified_3d_mrope_temporal_modality_margin
    base = config.base_fps / TEMPORAL_FACTOR
    frames, rows, cols = layout.grid

    def steps(count: int, first: int, rate: float, modulated: bool) -> torch.Tensor:
        index = torch.arange(count, dtype=torch.float32, device=device) + first
        return index / rate * base + start if modulated else index + start

    modulated = config.enable_fps_modulation
    time = steps(frames, 0, fps / TEMPORAL_FACTOR, modulated)
    row = torch.arange(rows, dtype=torch.float32, device=device)
    col = torch.arange(cols, dtype=torch.float32, device=device)
    video = torch.stack([a.flatten() for a in torch.meshgrid(time, row, col, indexing="ij")])
    action = torch.zeros(3, layout.rows, dtype=torch.float32, device=device)
    action[0] = steps(layout.rows, layout.offset, fps, modulated)
    return torch.cat((video, action), dim=1)


class Rotary:
    """Tables of cosines and sines for given positions; the frequencies are computed once."""

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(config).to(device)
        self.axes = axis_of_frequency(config).to(device)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n] float32 -> cos, sin [n, D/2] float32; column i serves elements i and i +
        D/2.
        """
        angles = positions[self.axes].t().contiguous() * self.frequencies
        return angles.cos(), angles.sin()
