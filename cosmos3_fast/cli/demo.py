"""Run all three modes on a tiny random checkpoint and a rendered scene: no download, no GPU."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cosmos3_fast.cli.flags import DEVICE
from cosmos3_fast.cli.output import require_folder, tell, write_video, writing
from cosmos3_fast.testing import make_tiny_checkpoint

PROMPT = "robot picks up the red cup"
FRAMES, HEIGHT, WIDTH, FPS = 17, 240, 320, 24.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the results go, and how long the loops are."""
    add = parser.add_argument
    add("--out", default="out", metavar="DIR", help="folder of the results (default: out)")
    add("--steps", type=int, default=8, help="denoising steps of each request (default: 8)")
    add("--device", help=DEVICE)


def main(args: argparse.Namespace) -> None:
    """Checkpoint, scene, then policy, forward dynamics of its actions, inverse dynamics of the
    clip.
    """
    from cosmos3_fast.cli import parser, perform  # the commands are what a user would type

    require_folder("--out", args.out)
    begin, out = time.perf_counter(), Path(args.out)
    checkpoint = out / "checkpoint"
    frames = [render(index) for index in range(FRAMES)]
    clip = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        make_tiny_checkpoint(checkpoint)
        frames[0].save(out / "observation.png")
        write_video(out / "observation.mp4", clip.permute(3, 0, 1, 2)[None] / 255, FPS)
    common = ["--checkpoint", str(checkpoint), "--prompt", PROMPT, "--domain-name", "droid_lerobot"]
    common += ["--image-size", "256", "--steps", str(args.steps)]
    common += [] if args.device is None else ["--device", args.device]
    image = ["--image", str(out / "observation.png")]
    policy = [*image, "--guidance-scale", "3.0"]
    forward = [*image, "--mode", "forward_dynamics", "--action-file", f"{out}/policy_action.json"]
    inverse = ["--video", str(out / "observation.mp4"), "--mode", "inverse_dynamics"]
    for name, flags in (("policy", policy), ("forward", forward), ("inverse", inverse)):
        tell(f"--- {name}")
        flags = ["run", *common, *flags, "--out", str(out / name)]
        status = perform(parser().parse_args(flags))
        if status:
            raise SystemExit(status)
    tell(f"three requests, one tiny checkpoint: {time.perf_counter() - begin:.1f} s; see {out}/")


def render(index: int) -> Image.Image:
    """Frame `index` of a scene: a gripper comes down to a cup on a table."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (203, 213, 221))
    draw = ImageDraw.Draw(image)
    for row in range(150, HEIGHT):
        shade = (row - 150) // 2
        draw.line([(0, row), (WIDTH, row)], fill=(150 - shade, 112 - shade, 78 - shade))
    draw.ellipse((120, 196, 200, 212), fill=(84, 62, 44))
    draw.polygon([(132, 150), (188, 150), (180, 204), (140, 204)], fill=(196, 46, 40))
    draw.ellipse((132, 143, 188, 157), fill=(120, 20, 22))
    progress = 0.5 - 0.5 * math.cos(math.pi * index / (FRAMES - 1))
    x, y = 250 - 90 * progress, 30 + 84 * progress
    gap = 34 - 6 * progress
    draw.line([(WIDTH, 0), (x, y)], fill=(70, 76, 86), width=18)
    draw.rectangle((x - 36, y, x + 36, y + 14), fill=(52, 56, 64))
    for side in (-1, 1):
        left = x + side * gap
        draw.rectangle((left - 5, y + 14, left + 5, y + 50), fill=(34, 36, 42))
    return image
