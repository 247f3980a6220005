"""The observation of `run` and `info`. The flag says what a file is, not the end of its name:
--image reads pictures, --video a clip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cosmos3_fast.cli.flags import Settings, named
from cosmos3_fast.processor import compose_droid_views
from cosmos3_fast.processor.images import read_image, read_video
from cosmos3_fast.processor.policy import warn_of_surplus
from cosmos3_fast.processor.views import DROID_SIZE, droid_mosaic

ASPECT_TOLERANCE = 0.01  # of a mosaic's height over width; what it leaves is stretched


def add_observation_flags(parser: argparse.ArgumentParser) -> None:
    """A picture or a clip."""
    add = parser.add_argument
    add("--image", nargs="+", help="one image; with --preset droid a mosaic, or wrist left right")
    add("--video", help="observation clip instead of --image; its first frames are read")


def check_observation(args: argparse.Namespace) -> None:
    """ValueError unless at most one of the flags is there, --image with as many as are read."""
    if args.image is not None and args.video is not None:
        raise ValueError("pass exactly one of --image and --video, got both")
    droid = args.preset == "droid"
    if args.image is not None and len(args.image) not in ((1, 3) if droid else (1,)):
        allowed = "1 or 3 images" if droid else "1 image"
        raise ValueError(f"--image takes {allowed} here, got {len(args.image)}")


def observe(settings: Settings, limit: int) -> torch.Tensor:
    """uint8 [T,H,W,3]: the picture, or at most `limit` frames of the clip (a warning says so where
    it holds more); with the DROID preset mosaics of its size. ValueError names the flag.
    """
    args, droid = settings.args, settings.args.preset == "droid"
    if args.video is not None:
        with named("--video"):
            frames = read_video(args.video, limit + 1)
            if len(frames) > limit:
                warn_of_surplus(args.mode, limit, args.video)
                frames = frames[:limit]
            return torch.stack([_mosaic(frame) for frame in frames]) if droid else frames
    with named("--image"):
        first, *others = [_picture(path) for path in args.image]
        if others:
            return compose_droid_views(first, *others)[None]
        return (_mosaic(first) if droid else first)[None]


def blank(settings: Settings) -> torch.Tensor:
    """uint8 [1,H,W,3]: a black picture of the DROID preset's size, else of height x width."""
    droid, values = settings.args.preset == "droid", settings.values
    height, width = DROID_SIZE if droid else (values["height"], values["width"])
    return torch.zeros(1, height, width, 3, dtype=torch.uint8)


def _picture(path: str) -> torch.Tensor:
    try:
        return read_image(path)
    except ValueError as error:
        hint = " (a clip goes to --video)" if Path(path).is_file() else ""
        raise ValueError(f"{error}{hint}") from error


def _mosaic(picture: torch.Tensor) -> torch.Tensor:
    """A picture of the mosaic's shape in its size; one of another shape shows a single camera."""
    height, width = picture.shape[:2]
    want = DROID_SIZE[0] / DROID_SIZE[1]
    if abs(height / width / want - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"the DROID policy sees a mosaic of three cameras, {DROID_SIZE[0]}x{DROID_SIZE[1]} "
            f"(height x width) or of that shape, got {height}x{width}: pass three pictures "
            "(--image WRIST LEFT RIGHT) or one composed of them"
        )
    return droid_mosaic(picture)
