"""Say what a request would be: canvas, tokens, prompt, sigmas, memory. Reads no weights."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from cosmos3_fast import denoise
from cosmos3_fast.checks import check
from cosmos3_fast.cli.flags import Settings, add_device_flags, add_request_flags
from cosmos3_fast.cli.idle import warn_of_idle_flags
from cosmos3_fast.cli.observation import (
    add_observation_flags,
    blank,
    check_observation,
    observe,
)
from cosmos3_fast.cli.output import tell
from cosmos3_fast.cli.run import request_of
from cosmos3_fast.config import CheckpointConfig
from cosmos3_fast.graph import ShapeKey
from cosmos3_fast.model import Cosmos3Transformer, parameter_bytes
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.processor import DROID
from cosmos3_fast.vae import WanVAE

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `run` that decide shapes; without an observation a blank picture of height x
    width, with --preset droid of the mosaic's size.
    """
    add_device_flags(parser)
    add_request_flags(parser)
    add_observation_flags(parser)


def main(args: argparse.Namespace) -> None:
    """Print one line a fact."""
    settings = Settings.of(args)
    check_observation(args)
    settings.engine_args()  # refuses a device or a mesh that cannot be
    checkpoint = CheckpointConfig.read(args.checkpoint)
    config = checkpoint.transformer
    processor = settings.processor("cpu")
    seen = args.image is not None or args.video is not None
    frames = observe(settings, processor.frames_read()) if seen else blank(settings)
    actions = torch.zeros(processor.action_chunk_size, processor.action_width)
    cond_action = actions if args.mode == "forward_dynamics" else None
    processed = processor.preprocess(
        {"images": frames, "task": args.prompt, "cond_action": cond_action}
    )
    state = DROID().encode_state([0.0] * 7, 0.0) if args.preset == "droid" else None
    request = request_of(processed, settings, state)
    check(request, config, has_encoder=checkpoint.vae is not None)
    schedule = denoise.schedule_of(
        settings.plugin_args(False), checkpoint.scheduler, request.num_inference_steps
    )
    plan = denoise.plan(request, config, schedule)
    warn_of_idle_flags(settings, schedule)
    if idle := denoise.idle_guidance(request, plan):
        log.warning("no step is guided: %s", idle)
    canvas = "x".join(str(side) for side in processed.pixel_values.shape[3:])
    depth, rows, cols = plan.layout.grid
    facts = {
        "canvas (HxW)": canvas,
        "video (frames, H, W)": processed.video_shape,
        "latents (t, h, w)": request.video_shape,
        "tokens": f"{plan.layout.tokens} = {depth}x{rows}x{cols} video + {plan.layout.rows} action",
        "text tokens": ", ".join(str(len(ids)) for ids in plan.prompts),
        "prompt": processed.caption,
        f"sigmas ({schedule.name})": " ".join(f"{s:.6g}" for s in schedule.sigmas),
        "timesteps": " ".join(map(str, schedule.timesteps)),
        "network calls": sum(1 + flag for flag in plan.guided),
    } | _memory(settings, checkpoint, plan.key, plan.layout.values)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        tell(f"{name:<{width}}  {value}")


def _memory(
    settings: Settings, checkpoint: CheckpointConfig, key: ShapeKey, values: int
) -> dict[str, str]:
    """Bytes that a rank holds before any activation: weights, prompts' keys and values, state."""
    meta, config, args = torch.device("meta"), checkpoint.transformer, settings.args
    mesh = Mesh(meta, cfg_size=args.cfg, tp_size=args.tp)
    place: dict[str, Any] = {"device": meta, "dtype": settings.dtype}
    weights = parameter_bytes(Cosmos3Transformer(config, mesh, **place))
    if checkpoint.vae is not None:
        weights += parameter_bytes(WanVAE(checkpoint.vae, mesh=mesh, **place))
    size = settings.dtype.itemsize
    rows = 2 * config.num_hidden_layers * key.branches * key.capacity
    prompts = rows * config.num_key_value_heads // args.tp * config.head_dim * size
    state = values * (5 * 4 + 1 + size * (1 + key.branches))
    return {
        "weights a rank": f"{weights / 1e9:.2f} GB",
        "prompt keys and values": f"{prompts / 1e6:.1f} MB (capacity {key.capacity} tokens)",
        "denoising state": f"{state / 1e6:.1f} MB",
    }
