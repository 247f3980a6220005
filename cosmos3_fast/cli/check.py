"""Compare one small request on your own weights with diffusers, the reference implementation."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cosmos3_fast import sampler
from cosmos3_fast.cli.flags import DEVICE, DTYPES, default_device
from cosmos3_fast.cli.output import require_folder, tell
from cosmos3_fast.config import read_json
from cosmos3_fast.engine import Engine
from cosmos3_fast.processor import Cosmos3PolicyProcessor
from cosmos3_fast.request import Cosmos3ActionRequest, pixel_to_latent_shape

CHUNK, STEPS, GUIDANCE, SIDE, SEED = 8, 2, 3.0, 256, 7
DOMAIN, PROMPT = "bridge_orig_lerobot", "put the spoon on the towel"
# Relative L2 after the loop. float32: the two differ by rounding alone. 16-bit: both are about
# this far from float32.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and where to run it. float32 is the sharp check, at 4 bytes a weight."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="checkpoint folder, diffusers layout")
    add("--device", help=DEVICE)
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of both (default: float32)")


def main(args: argparse.Namespace) -> None:
    """Run both, print the differences; ValueError (exit status 2) when one is over its bound."""
    require_folder("DIR", args.folder)
    if not Path(args.folder).is_dir():
        raise ValueError(f"checkpoint folder {args.folder} does not exist")
    device = default_device() if args.device is None else args.device
    dtype = DTYPES[args.dtype]
    image = np.random.RandomState(SEED).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    ours = _ours(args.folder, device, dtype, image)
    gc.collect()
    theirs = _diffusers(args.folder, device, dtype, image)
    differences = {name: _difference(ids, theirs[name]) for name, ids in ours.items()}
    for name, difference in differences.items():
        tell(f"{name}: relative L2 difference {difference:.2e}")
    over = [name for name, difference in differences.items() if not difference <= BOUNDS[dtype]]
    if over:
        raise ValueError(
            f"differs from diffusers by more than {BOUNDS[dtype]:.0e} in {args.dtype}: "
            f"{', '.join(over)}"
        )
    tell(f"agrees with diffusers within {BOUNDS[dtype]:.0e}")


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 difference; NaN when either holds one."""
    want = theirs.double().cpu()
    return float((ours.double().cpu() - want).norm() / want.norm())


def _ours(
    checkpoint: str, device: str, dtype: torch.dtype, image: np.ndarray
) -> dict[str, torch.Tensor]:
    with Engine.from_pretrained(checkpoint, device=device, dtype=dtype) as engine:
        processor = Cosmos3PolicyProcessor(
            tokenizer_name_or_path=f"{checkpoint}/text_tokenizer",
            domain_name=DOMAIN,
            action_chunk_size=CHUNK,
            image_size=SIDE,
            prompt_format="json",
            device=engine.device,
            params_dtype=dtype,
        )
        inputs = processor.preprocess({"images": image, "task": PROMPT})
        request = Cosmos3ActionRequest(
            text_ids=inputs.text_ids,
            text_mask=inputs.text_mask,
            neg_text_ids=inputs.neg_text_ids,
            neg_text_mask=inputs.neg_text_mask,
            video_shape=pixel_to_latent_shape(*inputs.video_shape),
            mode="policy",
            domain_id=inputs.domain_id,
            action_chunk=CHUNK,
            raw_action_dim=inputs.raw_action_dim,
            cond_video_pixels=inputs.pixel_values,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            seed=SEED,
        )
        result = engine.step(request)
        return {name: result[name].cpu() for name in ("action", "video")}


def _diffusers(
    checkpoint: str, device: str, dtype: torch.dtype, image: np.ndarray
) -> dict[str, torch.Tensor]:
    """The same request, with our noise, through Cosmos3OmniPipeline."""
    try:
        from diffusers import Cosmos3OmniPipeline
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
    except ImportError as error:
        raise ImportError("the check needs diffusers: pip install 'cosmos3-fast[test]'") from error
    index = read_json(f"{checkpoint}/model_index.json")
    pipe: Any = Cosmos3OmniPipeline.from_pretrained(
        checkpoint, dtype=dtype, enable_safety_checker=False
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    karras = pipe.scheduler.config.use_karras_sigmas
    if not karras and not index.get("use_native_flow_schedule"):
        pipe.scheduler.register_to_config(use_flow_sigmas=True)
    action = CosmosActionCondition(
        mode="policy",
        chunk_size=CHUNK,
        domain_name=DOMAIN,
        resolution_tier=SIDE,
        image=Image.fromarray(image),  # diffusers takes arrays as floats in [0, 1]
    )
    latents, rows = _noise(pipe, action)
    output = pipe(
        prompt=PROMPT,
        negative_prompt="",
        action=action,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        fps=24.0,
        latents=latents,
        action_latents=rows,
        use_system_prompt=False,
        enable_safety_check=False,
        output_type="latent",
    )
    return {"action": output.action[0][None], "video": output.video.reshape(latents.shape)}


def _noise(pipe: Any, action: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our noise with the clean frame put in, as diffusers takes it: [1, C, t, h, w] and [rows,
    width].
    """
    device, width = pipe.device, pipe.transformer.config.action_dim
    with torch.no_grad():
        clean, *_ = pipe.prepare_latents(
            action=action, device=device, dtype=torch.float32, fps=24.0
        )
    latents = torch.from_numpy(sampler.noise(SEED, tuple(clean.shape))).to(device)
    latents[:, :, 0] = clean[:, :, 0]
    rows = torch.from_numpy(sampler.noise(SEED, (1, CHUNK, width)))[0].to(device)
    rows[:, action.raw_action_dim :] = 0
    return latents, rows
