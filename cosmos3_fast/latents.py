"""The denoised state as one flat vector: video patches, then action rows (docs/model.md, 1, 4
and 6).

A patch vector is ordered (row in patch, column in patch, channel); tokens run frame, row, column.
The halves of patches beyond an odd height or width, the clean frames, the clean rows and the action
channels past the robot's own are held at their given value (0 for padding) through the whole loop:
`Masks.values` says which numbers move.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from cosmos3_fast.request import Layout
from cosmos3_fast.transfer import upload


def to_patches(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """latents [1, C, T, H, W] -> [T * ceil(H/p) * ceil(W/p), p * p * C], zero-padded right and
    bottom.
    """
    channels, _, height, width = latents.shape[1:]
    padded = F.pad(latents[0], (0, -width % patch, 0, -height % patch))
    cells = padded.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # C T h p w p
    return cells.permute(1, 2, 4, 3, 5, 0).reshape(-1, patch * patch * channels)


def from_patches(patches: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Inverse of `to_patches`: [video_tokens, p * p * C] -> [1, C, T, H, W] in memory of its own,
    the padding cut.
    """
    frames, rows, cols = layout.grid
    p = layout.patch
    cells = patches.view(frames, rows, cols, p, p, layout.channels)
    latents = cells.permute(5, 0, 1, 3, 2, 4).reshape(layout.channels, frames, rows * p, cols * p)
    cut = latents[None, :, :, : layout.height, : layout.width]
    return cut.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Masks:
    """values uint8 [N]: 1 where the state is denoised; tokens uint8 [M] likewise per token;
    video_rows, action_rows int64: noisy video tokens and noisy action rows, each counted from 0."""

    values: torch.Tensor
    tokens: torch.Tensor
    video_rows: torch.Tensor
    action_rows: torch.Tensor


@lru_cache(maxsize=16)
def masks(layout: Layout, raw_action_dim: int) -> Masks:
    """The masks of a layout, on the CPU, kept for the next request: not to be written to."""
    frame_noisy = torch.ones(layout.frames, dtype=torch.uint8, device="cpu")
    frame_noisy[list(layout.clean_frames)] = 0
    shape = (1, layout.channels, layout.frames, layout.height, layout.width)
    moving = frame_noisy.view(1, 1, -1, 1, 1).expand(shape)
    per_frame = layout.grid[1] * layout.grid[2]
    video_tokens = frame_noisy.repeat_interleave(per_frame)
    row_noisy = (torch.arange(layout.rows, device="cpu") >= layout.clean_rows).to(torch.uint8)
    actions = row_noisy[:, None].repeat(1, layout.action_dim)
    actions[:, raw_action_dim:] = 0
    return Masks(
        values=torch.cat((to_patches(moving, layout.patch).flatten(), actions.flatten())),
        tokens=torch.cat((video_tokens, row_noisy)),
        video_rows=video_tokens.nonzero()[:, 0],
        action_rows=row_noisy.nonzero()[:, 0],
    )


def flatten(video: torch.Tensor, action: torch.Tensor, layout: Layout) -> torch.Tensor:
    """video [1, C, T, H, W] and action [1, rows, A] -> state [N] in the dtype of `video`."""
    patches = to_patches(video, layout.patch)
    return torch.cat((patches.flatten(), action.to(patches).flatten()))


def clean_state(
    layout: Layout,
    latents: torch.Tensor | None,
    actions: torch.Tensor | None,
    state_rows: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """float32 [N]: the values that stay, at their places, and 0 elsewhere.

    latents [1, C, >= frames that are clean, >= H, >= W], actions [1, chunk, raw]
    (forward_dynamics), state_rows [1, r, raw] in front of them.
    """
    place: dict[str, Any] = {"dtype": torch.float32, "device": device}
    video = torch.zeros(1, layout.channels, layout.frames, layout.height, layout.width, **place)
    if layout.clean_frames and latents is not None:
        last = layout.clean_frames[-1]
        cut = upload(latents[:, :, : last + 1, : layout.height, : layout.width], device)
        for frame in layout.clean_frames:  # a list of them as an index would wait for the device
            video[:, :, frame] = cut[:, :, frame]
    action = torch.zeros(1, layout.rows, layout.action_dim, **place)
    if state_rows is not None:
        action[:, : state_rows.shape[1], : state_rows.shape[2]] = upload(state_rows, device)
    if actions is not None:
        action[:, layout.dropped_rows :, : actions.shape[2]] = upload(actions, device)
    return flatten(video, action, layout)


def split(state: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """state [N] -> video latents [1, C, T, H, W] and action rows [1, rows, A]."""
    patches = state[: layout.video_values].view(layout.video_tokens, layout.patch_dim)
    rows = state[layout.video_values :].view(1, layout.rows, layout.action_dim)
    return from_patches(patches, layout), rows
