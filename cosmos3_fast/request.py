"""One policy request: plain data, its checks, and the token layout that follows from it.

`layout(request)` and `check(request, config, …)` read nothing but the request and the checkpoint's
configuration, so every rank decides alike, before any collective and before any compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Any

import torch

from cosmos3_fast.config import TransformerConfig

MODES = ("policy", "forward_dynamics", "inverse_dynamics")
MAX_TEXT_TOKENS = 4096
MAX_STEPS = 1000  # training timesteps of the schedules: more steps would share timesteps
MAX_TOKENS = 1 << 20  # of video and actions; the masks of more are not even laid out
SPATIAL_FACTOR, TEMPORAL_FACTOR = 16, 4


def pixel_to_latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (t, h, w) of a clip in pixels: (T - 1) // 4 + 1, max(H // 16, 1), max(W // 16, 1)."""
    if min(num_frames, height, width) < 1:
        raise ValueError(
            f"a clip needs at least one frame and one pixel, got {(num_frames, height, width)}"
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
            f"{name} and its mask must both be [1, n], got {_shape(ids)} and {_shape(mask)}"
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


def check(request: Cosmos3ActionRequest, config: TransformerConfig, *, has_encoder: bool) -> None:
    """Raise ValueError, naming what was expected and what came, for a request that cannot run."""
    _check_numbers(request, config)
    _check_types(request)
    prompt_ids(request.text_ids, request.text_mask, "text_ids", config.vocab_size)
    if request.guidance_scale != 1.0:
        prompt_ids(request.neg_text_ids, request.neg_text_mask, "neg_text_ids", config.vocab_size)
    _check_video(request, config, has_encoder)
    _check_actions(request, config)
    tokens = layout(request, config).tokens
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"video_shape {request.video_shape} and action_chunk {request.action_chunk} make "
            f"{tokens} tokens, more than {MAX_TOKENS}"
        )


def _check_types(request: Cosmos3ActionRequest) -> None:
    needed = ["text_ids", "text_mask"]
    needed += ["neg_text_ids", "neg_text_mask"] if request.guidance_scale != 1.0 else []
    given = ("cond_video_latents", "cond_video_pixels", "cond_action", "clean_action")
    for name in (*needed, *(n for n in given if getattr(request, n) is not None)):
        if not isinstance(getattr(request, name), torch.Tensor):
            came = type(getattr(request, name)).__name__
            raise ValueError(f"{name} must be a tensor, got {came}")


def _check_numbers(request: Cosmos3ActionRequest, config: TransformerConfig) -> None:
    if request.mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {request.mode!r}")
    steps = request.num_inference_steps
    if not _is_int(steps) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps must be an integer in [1, {MAX_STEPS}], got {steps}")
    if not _is_int(request.seed) or not 0 <= request.seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {request.seed}")
    if not _is_finite(request.guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {request.guidance_scale}")
    if not _is_finite(request.fps) or request.fps <= 0:
        raise ValueError(f"fps must be positive and finite, got {request.fps}")
    domains = config.num_embodiment_domains
    if not _is_int(request.domain_id) or not 0 <= request.domain_id < domains:
        raise ValueError(f"domain_id must lie in [0, {domains}), got {request.domain_id}")
    interval = request.guidance_interval
    if interval is not None and not _is_interval(interval):
        raise ValueError(f"guidance_interval must be (lo, hi) with lo < hi, got {interval}")


def _check_video(
    request: Cosmos3ActionRequest, config: TransformerConfig, has_encoder: bool
) -> None:
    chunk = request.action_chunk
    shape = _tuple(request.video_shape)
    if not _is_int(chunk) or chunk < 1 or (chunk % 4 and chunk != 1):
        raise ValueError(f"action_chunk must be 1 or a multiple of 4, got {chunk}")
    if len(shape) != 3 or not all(_is_int(s) and s >= 1 for s in shape):
        raise ValueError(f"video_shape must be three positive integers (t, h, w), got {shape}")
    if shape[0] not in (1, chunk // 4 + 1):
        raise ValueError(
            f"video_shape has {shape[0]} latent frames; action_chunk {chunk} needs "
            f"{chunk // 4 + 1} (or 1)"
        )
    try:
        frames = clean_frames(request)
    except TypeError as error:
        raise ValueError(
            f"cond_frame_indexes must be integers, got {request.cond_frame_indexes}"
        ) from error
    if frames and not 0 <= frames[0] <= frames[-1] < shape[0]:
        raise ValueError(
            f"cond_frame_indexes must lie in [0, {shape[0]}) (latent frames), got {frames}"
        )
    if request.cond_video_latents is not None:
        _check_latents(request.cond_video_latents, shape, frames, config.latent_channel)
    elif request.cond_video_pixels is not None:
        _check_pixels(request.cond_video_pixels, shape, frames)
        if not has_encoder:
            raise ValueError("cond_video_pixels need the checkpoint's vae/, which is missing")
    elif frames:
        raise ValueError(
            f"clean frames {frames} need cond_video_latents or cond_video_pixels; neither came"
        )


def _check_latents(
    latents: torch.Tensor, shape: tuple[int, ...], frames: Sequence[int], channels: int
) -> None:
    least = (1, channels, frames[-1] + 1 if frames else 1, *shape[1:])
    good = latents.ndim == 5 and latents.shape[:2] == least[:2]
    if not good or any(a < b for a, b in zip(latents.shape, least, strict=True)):
        raise ValueError(
            f"cond_video_latents must be {list(least)} (or longer in t, h, w), "
            f"got {_shape(latents)}"
        )
    _check_finite(latents, "cond_video_latents")


def _check_pixels(pixels: torch.Tensor, shape: tuple[int, ...], frames: Sequence[int]) -> None:
    least = 1 + TEMPORAL_FACTOR * (frames[-1] if frames else 0)
    if pixels.ndim != 5 or pixels.shape[0] != 1 or pixels.shape[1] != 3:
        raise ValueError(f"cond_video_pixels must be [1, 3, T, H, W], got {_shape(pixels)}")
    if pixels.shape[2] < least:
        raise ValueError(
            f"cond_video_pixels need {least} frames for clean latent frame {frames[-1]}, "
            f"got {pixels.shape[2]}"
        )
    height, width = pixels.shape[3:]
    if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
        raise ValueError(
            f"cond_video_pixels must be a multiple of {SPATIAL_FACTOR} high and wide, "
            f"got {height}x{width}"
        )
    if height // SPATIAL_FACTOR < shape[1] or width // SPATIAL_FACTOR < shape[2]:
        raise ValueError(
            f"cond_video_pixels of {height}x{width} give "
            f"{height // SPATIAL_FACTOR}x{width // SPATIAL_FACTOR} latents, "
            f"fewer than video_shape {shape}"
        )
    if pixels.dtype != torch.uint8:
        _check_finite(pixels, "cond_video_pixels")


def _check_actions(request: Cosmos3ActionRequest, config: TransformerConfig) -> None:
    if request.action_dim != config.action_dim:
        raise ValueError(
            f"action_dim must be the model's {config.action_dim}, got {request.action_dim}"
        )
    if not _is_int(request.raw_action_dim) or not 1 <= request.raw_action_dim <= config.action_dim:
        raise ValueError(
            f"raw_action_dim must lie in [1, {config.action_dim}], got {request.raw_action_dim}"
        )
    action, want = request.cond_action, (1, request.action_chunk, config.action_dim)
    if request.mode == "forward_dynamics":
        if action is None:
            raise ValueError(f"forward_dynamics needs cond_action {list(want)}; none came")
        if tuple(action.shape) != want:
            raise ValueError(f"cond_action must be {list(want)}, got {_shape(action)}")
        _check_finite(action, "cond_action")
    state = request.clean_action
    if state is not None:
        if state.ndim != 3 or state.shape[0] != 1 or state.shape[2] != request.raw_action_dim:
            raise ValueError(
                f"clean_action must be [1, r, {request.raw_action_dim}], got {_shape(state)}"
            )
        _check_finite(state, "clean_action")
    if request.action_frame_offset is not None and not _is_int(request.action_frame_offset):
        raise ValueError(
            f"action_frame_offset must be an integer, got {request.action_frame_offset}"
        )


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must hold floating-point numbers, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds values that are not finite")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_interval(value: Any) -> bool:
    try:
        low, high = value
    except (TypeError, ValueError):
        return False
    numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in (low, high))
    return numbers and bool(low < high)


def _tuple(value: Any) -> tuple[Any, ...]:
    """Its items; of what has none, itself alone."""
    try:
        return () if value is None else tuple(value)
    except TypeError:
        return (value,)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
