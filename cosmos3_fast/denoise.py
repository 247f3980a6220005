"""The denoising loop: what one request will do, decided ahead, and the loop that does it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cosmos3_fast import sampler
from cosmos3_fast.config import Cosmos3PolicyWNArgs, SchedulerConfig, TransformerConfig
from cosmos3_fast.graph import ShapeKey, StepRunner, branch_range
from cosmos3_fast.latents import Masks, masks
from cosmos3_fast.layers.rotary import media_positions
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    Cosmos3ActionRequest,
    Layout,
    layout,
    pixels_to_encode,
    prompt_ids,
)
from cosmos3_fast.vae import WanVAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything a request decides, on the host, equal on every rank.

    `prompts`: token ids of each branch (conditional, unconditional). `guided[i]`: whether step i
    runs both.
    """

    layout: Layout
    masks: Masks
    schedule: sampler.Schedule
    guided: tuple[bool, ...]
    prompts: tuple[tuple[int, ...], ...]
    key: ShapeKey

    def branches(self, mesh: Mesh) -> tuple[int, ...]:
        """The branches whose prompts this rank needs, over all steps."""
        ranges = (range(*branch_range(flag, mesh)) for flag in set(self.guided))
        return tuple(sorted({branch for part in ranges for branch in part}))


def schedule_of(args: Cosmos3PolicyWNArgs, config: SchedulerConfig, steps: int) -> sampler.Schedule:
    """The schedule of `steps` steps that the arguments and the checkpoint's files ask for."""
    name = sampler.resolve_schedule(
        args.schedule,
        args.use_karras_sigmas,
        {"use_karras_sigmas": config.use_karras_sigmas},
        {"use_native_flow_schedule": config.use_native_flow_schedule},
    )
    shift = config.flow_shift if args.flow_shift is None else args.flow_shift
    return sampler.sigmas(
        name, steps, shift=shift, sigma_min=config.sigma_min, sigma_max=config.sigma_max
    )


def plan(
    request: Cosmos3ActionRequest,
    config: TransformerConfig,
    schedule: sampler.Schedule,
) -> Plan:
    """The plan of a checked request; ValueError when nothing is left to generate."""
    shape = layout(request, config)
    mask = masks(shape, request.raw_action_dim)
    if not len(mask.video_rows) + len(mask.action_rows):
        raise ValueError(
            f"every video frame {shape.clean_frames} and action row is clean: nothing to generate"
        )
    with_guidance = request.guidance_scale != 1.0
    guided = sampler.guided_steps(schedule.timesteps, request.guidance_interval)
    prompts = [
        prompt_ids(request.text_ids, request.text_mask, "text_ids", config.vocab_size),
    ]
    if with_guidance:
        prompts.append(
            prompt_ids(
                request.neg_text_ids, request.neg_text_mask, "neg_text_ids", config.vocab_size
            )
        )
    longest = max(len(ids) for ids in prompts)
    return Plan(
        layout=shape,
        masks=mask,
        schedule=schedule,
        guided=tuple(flag and with_guidance for flag in guided),
        prompts=tuple(tuple(ids) for ids in prompts),
        key=ShapeKey.of(shape, mask, len(prompts), longest, schedule.steps),
    )


def check_pictures(
    vae: WanVAE | None, request: Cosmos3ActionRequest, layout: Layout, *, decode: bool
) -> None:
    """ValueError where the request's pictures are too large for the VAE; equal on all ranks."""
    if vae is None:
        return
    pixels = pixels_to_encode(request, layout)
    if pixels is not None:
        frames, height, width = pixels.shape[2:]
        frames = 1 + (frames - 1) // TEMPORAL_FACTOR
        vae.check_size(frames, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR, decode=False)
    if decode:
        vae.check_size(layout.frames, layout.height, layout.width, decode=True)


def idle_guidance(request: Cosmos3ActionRequest, plan: Plan) -> str:
    """Why no step is guided though guidance was asked for; "" where that is not so."""
    if request.guidance_scale == 1.0 or any(plan.guided):
        return ""
    first, last = plan.schedule.timesteps[0], plan.schedule.timesteps[-1]
    interval = request.guidance_interval
    return f"guidance_interval {interval} holds none of the timesteps {first} to {last}"


def load(runner: StepRunner, plan: Plan, request: Cosmos3ActionRequest) -> None:
    """Copy a plan into a runner's buffers; prompts and state are set apart."""
    config, device = runner.model.config, runner.model.device
    runner.set_domain(request.domain_id)
    runner.set_masks(plan.layout, request.raw_action_dim, plan.masks)
    for branch, ids in enumerate(plan.prompts):
        key = (plan.layout, len(ids), request.fps)
        runner.set_positions(
            branch,
            key,
            partial(media_positions, plan.layout, len(ids), request.fps, config, device),
        )
    table = sampler.coefficients(plan.schedule.sigmas, request.guidance_scale, guided=plan.guided)
    if runner.set_schedule(plan.schedule.timesteps, torch.from_numpy(table)):
        sigmas = " ".join(f"{sigma:.6g}" for sigma in plan.schedule.sigmas)
        log.info("%s schedule, sigmas %s", plan.schedule.name, sigmas)


def denoise(
    runner: StepRunner,
    plan: Plan,
    on_step: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """Run every step on a loaded runner; returns the final state float32 [N] (the runner's own
    buffer).

    `note` gets "step K of N" before a step is issued, `on_step(i)` is called when step i has been;
    nothing in the loop waits for the device.
    """
    for index, guided in enumerate(plan.guided):
        if note is not None:
            note(f"step {index + 1} of {len(plan.guided)}")
        runner.step(guided)
        if on_step is not None:
            on_step(index)
    return runner.sample


def noise(layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Video and action noise: two fresh generators with one seed."""
    shape = (1, layout.channels, layout.frames, layout.height, layout.width)
    return sampler.noise(seed, shape), sampler.noise(seed, (1, layout.rows, layout.action_dim))


def require_in_time(mesh: Mesh, parts: Iterable[Cosmos3Transformer | WanVAE | None]) -> None:
    """The ranks meet at a request's end. TimeoutError on every rank when a kernel of any rank gave
    up waiting for another one: what that rank got wrong may be in all results. RuntimeError when
    another rank has not come to its end (`tell_failure`). Waits for the device.
    """
    found = [part.failure() for part in parts if part is not None]
    late = next((text for text in found if text), "")
    cards = mesh.gather_objects([late, ""])
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(cards) if text]
    if failed:
        raise RuntimeError("; ".join(failed))
    first = next((text for text, _ in cards if text), "")
    if first:
        raise TimeoutError(first)


def tell_failure(mesh: Mesh, error: BaseException) -> None:
    """What a rank that will not come to `require_in_time` has for those that do; nobody waits."""
    mesh.tell(["", f"{type(error).__name__}: {error}"])


def finite(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whether each is free of NaN and infinity, as a bool on its device: nothing waits for it."""
    return {name: torch.isfinite(tensor).all() for name, tensor in result.items()}


def require_finite(flags: dict[str, torch.Tensor]) -> None:
    """FloatingPointError naming what is not `finite`. Waits for the device."""
    held = torch.stack(list(flags.values())).tolist()
    bad = [name for name, is_finite in zip(flags, held, strict=True) if not is_finite]
    if bad:
        raise FloatingPointError(f"not finite, so nothing is returned: {', '.join(bad)}")
