"""One policy request: plain data, and the token layout that follows from it.

What follows from a request reads nothing but it and the checkpoint's configuration, so every rank
decides alike, before any collective and before any compute. `checks.check` says whether it can run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch

from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.numeric import is_integer

MODES = ("policy", "forward_dynamics", "inverse_dynamics")
MAX_TEXT_TOKENS = 4096
SPATIAL_FACTOR, TEMPORAL_FACTOR = 16, 4


def pixel_to_latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (t, h, w) of a clip in pixels: (T - 1) // 4 + 1, max(H // 16, 1), max(W // 16, 1)."""
    if not all(is_integer(size) and size >= 1 for size in (num_frames, height, width)):
        raise ValueError(
            "a clip's frames, height and width must be positive integers, got "
            f"{(num_frames, height, width)}"
        )
    return (
        (num_frames - 1) // TEMPORAL_FACTOR + 1,
        max(height // SPATIAL_FACTOR, 1),
        max(width // SPATIAL_FACTOR, 1),
    )


@dataclass
class Cosmos3ActionRequest:
    """One request; PhyAI's fields, then ours. Every tensor has a batch axis of 1 and may lie on any
    device.

    text_ids, text_mask, neg_text_ids, neg_text_mask: `[1, n]` integers; mask zeros may only be a
    tail, which is cut. video_shape: latent `(t, h, w)`; t is action_chunk // 4 + 1, or 1.
    cond_video_latents `[1, C, t', h, w]` (normalised) or cond_video_pixels `[1, 3, T, H, W]` (float
    in [-1, 1] or uint8) hold the clean frames; t' and T may stop after the last clean frame; a
    latent larger than video_shape is cut to it at the right and bottom. cond_action `[1,
    action_chunk, action_dim]`: all rows of forward_dynamics; channels past raw_action_dim are not
    read, as in diffusers. fps in frames a second. clean_action
    `[1, r, raw_action_dim]`: r rows in front of the chunk, held clean and dropped from the result.
    action_frame_offset: video frame of the first action row; None is 1 - r. guidance_interval:
    `(lo, hi)` in timesteps 0..1000; the unconditional branch runs where lo < t < hi.
    num_inference_steps: 1 to 1000; a schedule may take fewer (`sampler.sigmas`).
    """

    text_ids: torch.Tensor
    text_mask: torch.Tensor
    neg_text_ids: torch.Tensor
    neg_text_mask: torch.Tensor
    video_shape: tuple[int, int, int]
    mode: str
    domain_id: int
    action_chunk: int
    raw_action_dim: int
    action_dim: int = 64
    cond_video_latents: torch.Tensor | None = None
    cond_video_pixels: torch.Tensor | None = None
    cond_action: torch.Tensor | None = None
    cond_frame_indexes: Sequence[int] | None = None
    fps: float = 24.0
    num_inference_steps: int = 30
    guidance_scale: float = 1.0
    seed: int = 42
    clean_action: torch.Tensor | None = None
    action_frame_offset: int | None = None
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Layout:
    """The tokens of one request: `frames x patch_rows x patch_cols` video tokens, then `rows`
    action tokens.

    `clean_frames` are latent frames that stay as given, `clean_rows` counts the leading action rows
    that do. `dropped_rows` of them do not belong to the result. `offset` is the video frame of
    action row 0.
    """

    frames: int
    height: int
    width: int
    rows: int
    clean_frames: tuple[int, ...]
    clean_rows: int
    dropped_rows: int
    offset: int
    channels: int
    patch: int
    action_dim: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens as (frames, rows, columns)."""
        return self.frames, -(-self.height // self.patch), -(-self.width // self.patch)

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.rows

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch**2

    @property
    def video_values(self) -> int:
        return self.video_tokens * self.patch_dim

    @property
    def values(self) -> int:
        """Numbers in the denoised state: every patch value and every action value."""
        return self.video_values + self.rows * self.action_dim


def clean_frames(request: Cosmos3ActionRequest) -> tuple[int, ...]:
    """Latent frames held clean: the request's own list, else all of them (inverse_dynamics) or
    frame 0.
    """
    if request.cond_frame_indexes is not None:
        return tuple(sorted({index(i) for i in request.cond_frame_indexes}))
    return tuple(range(request.video_shape[0])) if request.mode == "inverse_dynamics" else (0,)


def layout(request: Cosmos3ActionRequest, config: TransformerConfig) -> Layout:
    """The token layout of a checked request."""
    state_rows = 0 if request.clean_action is None else request.clean_action.shape[1]
    rows = state_rows + request.action_chunk
    offset = request.action_frame_offset
    frames, height, width = request.video_shape
    return Layout(
        frames=frames,
        height=height,
        width=width,
        rows=rows,
        clean_frames=clean_frames(request),
        clean_rows=rows if request.mode == "forward_dynamics" else state_rows,
        dropped_rows=state_rows,
        offset=1 - state_rows if offset is None else offset,
        channels=config.latent_channel,
        patch=config.latent_patch_size,
        action_dim=config.action_dim,
    )


def pixels_to_encode(request: Cosmos3ActionRequest, layout: Layout) -> torch.Tensor | None:
    """[1, 3, T, H, W]: the causal prefix of a checked request's last clean frame; None without
    one.
    """
    if request.cond_video_latents is not None or not layout.clean_frames:
        return None
    assert request.cond_video_pixels is not None
    return request.cond_video_pixels[:, :, : 1 + TEMPORAL_FACTOR * layout.clean_frames[-1]]


def prompt_ids(ids: torch.Tensor, mask: torch.Tensor, name: str, vocab_size: int) -> list[int]:
    """Token ids of one prompt, the masked tail cut; ValueError names the field and the numbers."""
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"{name} and its mask must both be [1, n], got {list(ids.shape)} and {list(mask.shape)}"
        )
    if ids.shape[0] != 1:
        raise ValueError(f"{name}: batch size must be 1, got {ids.shape[0]}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {ids.dtype}")
    keep = [bool(m) for m in mask[0].tolist()]
    count = sum(keep)
    if not all(keep[:count]):
        raise ValueError(f"{name}: zeros of the mask may only be a tail")
    values = [int(i) for i in ids[0, :count].tolist()]
    if not 1 <= count <= MAX_TEXT_TOKENS:
        raise ValueError(f"{name} must hold 1 to {MAX_TEXT_TOKENS} tokens, got {count}")
    if not 0 <= min(values) <= max(values) < vocab_size:
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), got {min(values)} to {max(values)}"
        )
    return values
