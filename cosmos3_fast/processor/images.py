"""Reads observations: paths, PIL images, arrays, tensors and lists of them -> uint8 [T,H,W,3]."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """One image file as RGB uint8 [H,W,3]. ValueError naming the file when it cannot be read."""
    try:
        with Image.open(path) as image:
            return _from_pil(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read an image from {os.fspath(path)!r}: {error}") from error


def read_video(path: str | os.PathLike[str], limit: int | None = None) -> torch.Tensor:
    """The first `limit` frames (all by default) of a video as RGB uint8 [T,H,W,3].

    Needs PyAV (the extra `video`). ValueError naming the file when it cannot be decoded or holds
    no frame.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install cosmos3-fast[video]") from (
            error
        )
    name = os.fspath(path)
    try:
        with av.open(name) as container:
            decoded = container.decode(video=0) if container.streams.video else iter(())
            frames = [f.to_ndarray(format="rgb24") for f in itertools.islice(decoded, limit)]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"cannot read a video from {name!r}: {error}") from error
    if not frames:
        raise ValueError(f"empty video: {name!r} holds no frame")
    return torch.from_numpy(np.stack(frames))


def _from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")))


def _to_uint8(array: torch.Tensor) -> torch.Tensor:
    """uint8 as it is; floats from [0,1], or from [-1,1] when any is negative."""
    if array.dtype == torch.uint8:
        return array
    if not array.is_floating_point():
        raise ValueError(f"image values must be uint8 or floating point, got {array.dtype}")
    low, high = (float(bound) for bound in array.aminmax())
    if not (low >= -1.0 and high <= 1.0):
        raise ValueError(
            f"floating point image values must lie in [0, 1] or [-1, 1], got {low} to {high}"
        )
    unit = array.float() if low >= 0 else array.float() * 0.5 + 0.5
    return (unit * 255).round().to(torch.uint8)


def _from_array(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """[H,W,C], [C,H,W], [T,H,W,C] or [T,C,H,W] with C 3 or 4 (alpha is dropped)."""
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(array))
    tensor = array.detach().cpu()
    if tensor.ndim not in (3, 4) or tensor.numel() == 0:
        raise ValueError(
            f"an image must have shape [H,W,3], a clip [T,H,W,3]; got {list(tensor.shape)}"
        )
    frames = tensor if tensor.ndim == 4 else tensor[None]
    if frames.shape[-1] not in (3, 4):
        if frames.shape[1] not in (3, 4):
            raise ValueError(f"an image must have 3 colours, got shape {list(tensor.shape)}")
        frames = frames.permute(0, 2, 3, 1)
    return _to_uint8(frames[..., :3]).contiguous()


def _one_source(source: Any, limit: int) -> torch.Tensor:
    if isinstance(source, (str, os.PathLike)):
        if Path(source).suffix.lower() in VIDEO_SUFFIXES:
            return read_video(source, limit)
        return read_image(source)[None]
    if isinstance(source, Image.Image):
        return _from_pil(source)[None]
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source)[:limit]
    raise ValueError(
        "images must be a path, a PIL image, an array, a tensor or a list of these; "
        f"got {type(source).__name__}"
    )


def load_frames(source: Any, limit: int) -> torch.Tensor:
    """At most `limit` (>= 1) frames of an observation, uint8 [T,H,W,3] on the CPU.

    `source` is a path (image or video), a PIL image, an array or tensor ([H,W,3], [3,H,W] or a
    clip with T in front; uint8, or floats in [0,1] or [-1,1]), or a list of single frames of one
    size. ValueError for what cannot be read, is empty, or has frames of different sizes.
    """
    if not isinstance(source, Sequence) or isinstance(source, str):
        return _one_source(source, limit)
    if not source:
        raise ValueError("images is an empty list; expected at least one frame")
    frames = [_one_source(item, 1) for item in source[:limit]]
    sizes = sorted({(int(f.shape[1]), int(f.shape[2])) for f in frames})
    if len(sizes) > 1:
        raise ValueError(f"the frames of a clip must have one size, got (H, W) {sizes}")
    return torch.cat(frames)


def fit_length(frames: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` frames: the last one repeated, or the clip cut."""
    missing = count - frames.shape[0]
    if missing <= 0:
        return frames[:count]
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])
