"""Reads observations: paths, PIL images, arrays, tensors and lists of them -> uint8 [T,H,W,3]."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """One image file, upright by its EXIF orientation, as RGB uint8 [H,W,3].

    ValueError naming the file when it cannot be read, and for grey of more than 8 bits or floats
    (PIL itself reduces colours of 16 bits).
    """
    try:
        with Image.open(path) as image:
            return _from_pil(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read an image from {os.fspath(path)!r}: {error}") from error


def read_video(path: str | os.PathLike[str], limit: int | None = None) -> torch.Tensor:
    """The first `limit` frames (all by default) of a video as RGB uint8 [T,H,W,3], turned as
    players turn them.

    Needs PyAV (the extra `video`). ValueError naming the file when it cannot be decoded, holds no
    frame, or is turned by anything but quarters.
    """
    av, name = _pyav(), os.fspath(path)
    try:
        with open(name, "rb") as file, av.open(file) as container:  # never an address
            decoded = container.decode(video=0) if container.streams.video else iter(())
            frames = [_upright_frame(frame) for frame in itertools.islice(decoded, limit)]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"cannot read a video from {name!r}: {error}") from error
    if not frames:
        raise ValueError(f"empty video: {name!r} holds no frame")
    return torch.from_numpy(np.stack(frames))


def video_length(path: str | os.PathLike[str]) -> int | None:
    """Frames of a video that can be read, by its header; None where that says nothing."""
    with open(path, "rb") as file, _pyav().open(file) as container:
        return container.streams.video[0].frames or None


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install cosmos3-fast[video]") from (
            error
        )
    return av


def _upright_frame(frame: Any) -> np.ndarray:
    """RGB uint8 [H,W,3] of a decoded frame, by its display matrix, as phones write it: what stands
    at (x, y), to the right and down, is shown at (a x + c y, b x + d y).
    """
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, across) > 0.01 * max(straight, across):
        raise ValueError(f"it is turned by {frame.rotation} degrees; expected quarter turns")
    if across > straight:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _from_pil(image: Image.Image) -> torch.Tensor:
    """RGB uint8 [H,W,3]; alpha is dropped. PIL would clip wider channels to 255."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"image mode {image.mode!r} has more than 8 bits a channel; expected 8 (L, RGB, ...)"
        )
    return torch.from_numpy(np.array(_upright(image).convert("RGB")))


def _upright(image: Image.Image) -> Image.Image:
    """As `PIL.ImageOps.exif_transpose`, which however rewrites all metadata, and fails on some."""
    image.load()  # a PNG's may stand behind its pixels
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except SyntaxError as error:
        raise ValueError(f"its EXIF data cannot be read: {error}") from error
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_uint8(array: torch.Tensor, signed: bool) -> torch.Tensor:
    """uint8 as it is; floats from [-1,1] where `signed`, else from [0,1]."""
    if array.dtype == torch.uint8:
        return array
    if not array.is_floating_point():
        raise ValueError(f"image values must be uint8 or floating point, got {array.dtype}")
    low, high = (float(bound) for bound in array.aminmax())
    if not (low >= -1.0 and high <= 1.0):
        raise ValueError(
            f"floating point image values must lie in [0, 1] or [-1, 1], got {low} to {high}"
        )
    unit = array.float() * 0.5 + 0.5 if signed else array.float()
    return (unit * 255).round().to(torch.uint8)


def _colours(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """[T,H,W,3] from [H,W,C], [C,H,W], [T,H,W,C] or [T,C,H,W] with C 3 or 4 (alpha is dropped)."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "uif":
            raise ValueError(f"image values must be uint8 or floating point, got {array.dtype}")
        # Writable, too: torch warns of others.
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
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
    return frames[..., :3]


def on_host(source: Any) -> Any:
    """An observation whose arrays and tensors are `_colours`, copied once; else as it is."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _colours(source)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [on_host(item) for item in source]
    return source


def holds_negative(source: Any) -> bool:
    """Whether the floats of an observation `on_host`, all together, lie in [-1,1]: any is
    negative.
    """
    if isinstance(source, torch.Tensor):
        return source.is_floating_point() and bool((source < 0).any())
    return isinstance(source, list) and any(map(holds_negative, source))


def _one_source(source: Any, limit: int, signed: bool) -> torch.Tensor:
    if isinstance(source, (str, os.PathLike)):
        if Path(source).suffix.lower() in VIDEO_SUFFIXES:
            return read_video(source, limit)
        return read_image(source)[None]
    if isinstance(source, Image.Image):
        return _from_pil(source)[None]
    if isinstance(source, torch.Tensor):
        return _to_uint8(source, signed).contiguous()[:limit]
    raise ValueError(
        "images must be a path, a PIL image, an array, a tensor or a list of these; "
        f"got {type(source).__name__}"
    )


def load_frames(source: Any, limit: int, signed: bool | None = None) -> torch.Tensor:
    """At most `limit` (>= 1) frames of an observation, uint8 [T,H,W,3] on the CPU.

    `source` is a path (image or video), a PIL image, an array or tensor ([H,W,3], [3,H,W] or a
    clip with T in front; uint8 or floats), or a list of single frames of one size, which are all
    read. Floats lie in [0,1], unless any value of the whole source is negative: then all of them
    lie in [-1,1] (`signed` says it for a source that is part of an observation). ValueError for
    what cannot be read, is empty, has frames of different sizes, and for a clip in a list.
    """
    source = on_host(source)
    signed = holds_negative(source) if signed is None else signed
    if not isinstance(source, list):
        return _one_source(source, limit, signed)
    if not source:
        raise ValueError("images is an empty list; expected at least one frame")
    frames: list[torch.Tensor] = []
    sizes: set[tuple[int, int]] = set()
    for place, item in enumerate(source):
        frame = _one_source(item, 2, signed)
        if len(frame) > 1:
            raise ValueError(f"images[{place}] is a clip; a list must hold single frames")
        sizes.add((int(frame.shape[1]), int(frame.shape[2])))
        frames += [frame] if place < limit else []
    if len(sizes) > 1:
        raise ValueError(f"the frames of a clip must have one size, got (H, W) {sorted(sizes)}")
    return torch.cat(frames)


def fit_length(frames: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` frames: the last one repeated, or the clip cut."""
    missing = count - frames.shape[0]
    if missing <= 0:
        return frames[:count]
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])
