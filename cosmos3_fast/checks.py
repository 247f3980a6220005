"""Whether a request can run: every field against the checkpoint's configuration.

Everything is decided on the host from data that is equal on all ranks, before any collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.numeric import is_finite, is_integer, is_number
from cosmos3_fast.request import (
    MODES,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    Cosmos3ActionRequest,
    clean_frames,
    layout,
    prompt_ids,
)

MAX_STEPS = 1000  # training timesteps of the schedules: more steps would share timesteps
MAX_TOKENS = 1 << 20  # of video and actions; the masks of more are not even laid out
MAX_OFFSET = 1 << 20  # video frames: positions are float32
PIXEL_SLACK = 1 / 128  # beyond [-1, 1]: half precision, resampling


def check(request: Cosmos3ActionRequest, config: TransformerConfig, *, has_encoder: bool) -> None:
    """Raise ValueError, naming what was expected and what came, for a request that cannot run."""
    if not isinstance(request, Cosmos3ActionRequest):
        raise ValueError(f"a request must be a Cosmos3ActionRequest, got {type(request).__name__}")
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
        value = getattr(request, name)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} must be dense, got a {value.layout} tensor on {value.device}")


def _check_numbers(request: Cosmos3ActionRequest, config: TransformerConfig) -> None:
    if request.mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {request.mode!r}")
    steps = request.num_inference_steps
    if not is_integer(steps) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"num_inference_steps must be an integer in [1, {MAX_STEPS}], got {steps!r}"
        )
    if not is_integer(request.seed) or not 0 <= request.seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {request.seed!r}")
    if not is_finite(request.guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {request.guidance_scale!r}")
    if not is_finite(request.fps) or request.fps <= 0:
        raise ValueError(f"fps must be a positive, finite number, got {request.fps!r}")
    domains = config.num_embodiment_domains
    if not is_integer(request.domain_id) or not 0 <= request.domain_id < domains:
        raise ValueError(
            f"domain_id must be an integer in [0, {domains}), got {request.domain_id!r}"
        )
    interval = request.guidance_interval
    if interval is not None and not _is_interval(interval):
        raise ValueError(
            "guidance_interval must be timesteps (lo, hi) with 0 <= lo < hi <= 1000, "
            f"got {interval!r}"
        )


def _check_video(
    request: Cosmos3ActionRequest, config: TransformerConfig, has_encoder: bool
) -> None:
    chunk = request.action_chunk
    shape = _tuple(request.video_shape)
    if not is_integer(chunk) or chunk < 1 or (chunk % 4 and chunk != 1):
        raise ValueError(f"action_chunk must be 1 or an integer multiple of 4, got {chunk!r}")
    if len(shape) != 3 or not all(is_integer(s) and s >= 1 for s in shape):
        raise ValueError(f"video_shape must be three positive integers (t, h, w), got {shape}")
    if shape[0] not in (1, chunk // 4 + 1):
        raise ValueError(
            f"video_shape has {shape[0]} latent frames; action_chunk {chunk} needs "
            f"{chunk // 4 + 1} (or 1)"
        )
    frames = _clean_frames_of(request)
    if frames and not 0 <= frames[0] <= frames[-1] < shape[0]:
        raise ValueError(
            f"cond_frame_indexes must lie in [0, {shape[0]}) (latent frames), got {frames}"
        )
    if request.cond_video_latents is not None and request.cond_video_pixels is not None:
        raise ValueError("cond_video_latents and cond_video_pixels are both given; one is needed")
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


def _clean_frames_of(request: Cosmos3ActionRequest) -> tuple[int, ...]:
    """`clean_frames` of indexes that can be read more than once."""
    indexes = request.cond_frame_indexes
    try:
        if indexes is not None:
            len(indexes)  # an iterator has none: it would be empty when it is read again
        return clean_frames(request)
    except TypeError as error:
        raise ValueError(
            f"cond_frame_indexes must be a sequence of integers, got {indexes!r}"
        ) from error


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
        _check_floats(pixels, "cond_video_pixels")
        low, high = (float(x) for x in torch.aminmax(pixels[:, :, :least]))  # NaN if one is
        if not -1 - PIXEL_SLACK <= low <= high <= 1 + PIXEL_SLACK:
            raise ValueError(
                f"cond_video_pixels must be uint8 or lie in [-1, 1], got {low:g} to {high:g}"
            )


def _check_actions(request: Cosmos3ActionRequest, config: TransformerConfig) -> None:
    if request.action_dim != config.action_dim:
        raise ValueError(
            f"action_dim must be the model's {config.action_dim}, got {request.action_dim}"
        )
    if (
        not is_integer(request.raw_action_dim)
        or not 1 <= request.raw_action_dim <= config.action_dim
    ):
        raise ValueError(
            f"raw_action_dim must be an integer in [1, {config.action_dim}], "
            f"got {request.raw_action_dim!r}"
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
    offset = request.action_frame_offset
    if offset is not None and not (is_integer(offset) and abs(offset) <= MAX_OFFSET):
        raise ValueError(
            f"action_frame_offset must be an integer in [-{MAX_OFFSET}, {MAX_OFFSET}], "
            f"got {offset!r}"
        )


def _check_floats(tensor: torch.Tensor, name: str) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must hold floating-point numbers, got {tensor.dtype}")


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    _check_floats(tensor, name)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds values that are not finite")


def _is_interval(value: Any) -> bool:
    try:
        low, high = value
    except (TypeError, ValueError):
        return False
    return is_number(low) and is_number(high) and bool(0 <= low < high <= 1000)


def _tuple(value: Any) -> tuple[Any, ...]:
    """Its items; of what has none, itself alone."""
    try:
        return () if value is None else tuple(value)
    except TypeError:
        return (value,)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
