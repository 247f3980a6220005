"""diffusers as the oracle: a request run by its pipeline, and by its transformer called directly.

`run` is `Cosmos3OmniPipeline` itself with our noise handed in. `loop` calls its transformer with
index lists and positions written down from the model's description, and its scheduler for the
steps: it takes the very request the engine takes, and so covers what the pipeline has no words
for: state rows, another offset, one action, one latent frame, a guidance interval, chosen frames.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as cosmos
from PIL import Image

DOMAINS = cosmos._EMBODIMENT_TO_DOMAIN_ID
WIDTHS = cosmos._EMBODIMENT_TO_RAW_ACTION_DIM
DIRECT = (33, 40)  # latents of the DROID recipe: an odd height


@dataclass(frozen=True)
class Case:
    """One request in words. `source`: "image", "video", or "latents" (33x40, fed directly).

    `size`: (H, W) of the frames, multiples of 16 no larger than the canvas, so nobody resizes.
    """

    mode: str
    source: str
    chunk: int
    domain: str
    guidance: float
    schedule: str
    steps: int = 3
    size: tuple[int, int] = (128, 192)
    fps: float = 24.0
    shift: float = 5.0
    seed: int = 42
    view_point: str = "ego_view"
    prompt: str = "Pick up the red cup, then put it on the tray"

    @property
    def id(self) -> str:
        return (
            f"{self.mode}-{self.source}-chunk{self.chunk}-{self.domain}-g{self.guidance:g}"
            f"-{self.schedule}{self.steps}-{self.size[0]}x{self.size[1]}-{self.fps:g}fps"
        )

    @property
    def frames(self) -> int:
        return self.chunk // 4 + 1

    @property
    def clean(self) -> list[int]:
        """Latent frames held clean."""
        return list(range(self.frames)) if self.mode == "inverse_dynamics" else [0]

    @property
    def raw(self) -> int:
        return WIDTHS[self.domain]

    @property
    def tier(self) -> int:
        return 480 if self.source == "latents" else 256


@dataclass(frozen=True)
class Result:
    """action [1, chunk, raw], video [1, 48, t, h, w] (normalised latents), both fp32 (loop: its
    dtype); ids and negative_ids of the prompts; pixels [1, 3, T, H, W] in [0, 1] when asked."""

    action: torch.Tensor
    video: torch.Tensor
    ids: list[int]
    negative_ids: list[int]
    pixels: torch.Tensor | None = None


@functools.cache
def pipeline(folder: Path, dtype: torch.dtype) -> Cosmos3OmniPipeline:
    """The checkpoint as diffusers loads it, on the CPU, without its progress bars."""
    pipe = Cosmos3OmniPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def transformer(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Its transformer alone; float64 is the fp32 one raised, angles and timestep sinusoids not."""
    if dtype is torch.float64:
        return copy.deepcopy(pipeline(folder, torch.float32).transformer).double()
    return pipeline(folder, dtype).transformer


def scheduler(pipe: Any, schedule: str, steps: int, shift: float) -> UniPCMultistepScheduler:
    """diffusers' solver, set to one of the three schedules."""
    karras = schedule == "karras"
    made = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=karras, use_flow_sigmas=True, flow_shift=shift
    )
    native = np.linspace(0.999, 0.0, steps + 1)[:-1] if schedule == "native" else None
    made.set_timesteps(steps, sigmas=native)
    return made


def frames(case: Case) -> list[Image.Image]:
    """A scene that moves (blurred noise panned over): chunk + 1 frames for video, else one."""
    height, width = case.size
    rng = np.random.RandomState(case.seed + 7)
    scene = Image.fromarray(rng.randint(0, 256, (24, 36, 3), dtype=np.uint8))
    scene = scene.resize((width + 128, height + 128), Image.Resampling.BICUBIC)
    count = case.chunk + 1 if case.source == "video" else 1
    return [scene.crop((2 * i, i, 2 * i + width, i + height)) for i in range(count)]


def actions(case: Case) -> torch.Tensor:
    """[chunk, raw]: the trajectory that forward_dynamics is given."""
    rows = np.random.RandomState(case.seed + 1).uniform(-1, 1, (case.chunk, case.raw))
    return torch.from_numpy(rows.astype(np.float32))


def noise(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """The noise rule, written here once more: numpy's legacy stream, float64 cast to float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def direct_latents(case: Case) -> torch.Tensor:
    """[1, 48, t, 33, 40]: what a "latents" case is given as clean frames."""
    return noise(case.seed + 2, (1, 48, case.frames, *DIRECT))


def _clip(case: Case) -> list[Image.Image]:
    """What the pipeline is shown; for "latents" a picture that gives the prompt its canvas."""
    return [Image.new("RGB", (736, 544))] if case.source == "latents" else frames(case)


@functools.cache
def encode(
    folder: Path, case: Case, dtype: torch.dtype = torch.float32, whole: bool = False
) -> torch.Tensor:
    """Clean latents [1, 48, t', h, w] fp32 by its canvas, VAE and crop.

    t' frames are those that are held clean, encoded from the pixel frames they depend on alone;
    `whole` encodes the whole clip as the pipeline does: the same numbers for more time.
    """
    pipe, count = pipeline(folder, dtype), case.chunk + 1
    clip = _clip(case)
    pixels, size, *_ = pipe._prepare_action_video_conditioning(
        clip, case.tier, count, device="cpu", dtype=torch.float32
    )
    needed = count if whole else 1 + 4 * case.clean[-1]
    with torch.no_grad():
        latents = pipe._encode_video(pixels[:, :, :needed]).float()
    return pipe._remove_action_video_padding_from_latent(latents, size)


def clean_latents(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return direct_latents(case) if case.source == "latents" else encode(folder, case, dtype)


def start(
    shape: Sequence[int], clean: torch.Tensor | None, indexes: Sequence[int], seed: int
) -> torch.Tensor:
    """Noise with the clean frames laid over it."""
    video = noise(seed, shape)
    if clean is not None:
        video[:, :, list(indexes)] = clean[:, :, list(indexes)].float()
    return video


@contextmanager
def _handed_in(pipe: Any, case: Case, shape: Sequence[int], native: bool) -> Iterator[None]:
    """While this lasts the pipeline encodes nothing (its latents are handed in) and keeps to the
    schedule: `use_native_flow_schedule` decides whether it passes its own sigmas."""
    height, width = (34, 46) if case.source == "latents" else (40, 40)
    pipe._encode_video = lambda x: torch.zeros(1, 48, shape[2], height, width)
    before = pipe.scheduler, pipe.config["use_native_flow_schedule"]
    pipe.register_to_config(use_native_flow_schedule=native)
    try:
        yield
    finally:
        del pipe._encode_video
        pipe.scheduler = before[0]
        pipe.register_to_config(use_native_flow_schedule=before[1])


def tokens(folder: Path, case: Case) -> tuple[list[int], list[int]]:
    """Token ids of the structured prompt and of the empty negative prompt."""
    pipe = pipeline(folder, torch.float32)
    probe = pipe.video_processor.preprocess_video(_clip(case))
    bins = cosmos._ACTION_RESOLUTION_BINS[str(case.tier)]
    height, width = pipe.video_processor.classify_height_width_bin(*probe.shape[-2:], ratios=bins)
    return pipe.tokenize_prompt(
        case.prompt, "", num_frames=case.chunk + 1, height=height, width=width, fps=case.fps,
        use_system_prompt=False, action_mode=case.mode, action_view_point=case.view_point,
    )  # fmt: skip


@functools.cache
def run(
    folder: Path, case: Case, dtype: torch.dtype = torch.float32, pixels: bool = False
) -> Result:
    """The case through diffusers' pipeline, its networks in `dtype`; `pixels` decodes as well."""
    pipe = pipeline(folder, dtype)
    clean = clean_latents(folder, case, dtype)
    shape = (1, 48, case.frames, *clean.shape[3:])
    action_noise = noise(case.seed, (1, case.chunk, 64))[0]
    action_noise[:, case.raw :] = 0
    given = None
    if case.mode == "forward_dynamics":
        given = actions(case)
        action_noise = torch.nn.functional.pad(given, (0, 64 - case.raw))
    clip = _clip(case)
    condition = cosmos.CosmosActionCondition(
        mode=case.mode, chunk_size=case.chunk, domain_name=case.domain, resolution_tier=case.tier,
        raw_actions=given, view_point=case.view_point,
        **({"image": clip[0]} if case.source == "image" else {"video": clip}),
    )  # fmt: skip
    with _handed_in(pipe, case, shape, native=case.schedule == "native"):
        pipe.scheduler = scheduler(pipe, case.schedule, case.steps, case.shift)
        result = pipe(
            prompt=case.prompt, negative_prompt="", fps=case.fps, action=condition,
            num_inference_steps=case.steps, guidance_scale=case.guidance,
            latents=start(shape, clean, case.clean, case.seed), action_latents=action_noise,
            output_type="latent", use_system_prompt=False, enable_safety_check=False,
        )  # fmt: skip
    ids, negative = tokens(folder, case)
    action = given if given is not None else result.action[0]
    decoded = decode(folder, result.video, dtype) if pixels else None
    return Result(action[None], result.video, ids, negative, decoded)


def decode(folder: Path, video: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalised latents -> pixels [1, 3, T, H, W] in [0, 1], as the pipeline ends."""
    pipe = pipeline(folder, dtype)
    inverse = pipe._vae_latents_inv_std.view(1, -1, 1, 1, 1)
    mean = pipe._vae_latents_mean.view(1, -1, 1, 1, 1)
    with torch.no_grad():
        decoded = pipe.vae.decode(video.to(pipe.vae.dtype) / inverse + mean).sample.float()
    return (decoded / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Plan:
    """Which tokens are where, worked out from a request by the words of the model's description."""

    frames: list[int]  # clean latent frames
    clean_rows: int
    dropped: int
    rows: int
    offset: int

    @classmethod
    def of(cls, request: Any) -> Plan:
        state = 0 if request.clean_action is None else request.clean_action.shape[1]
        rows = state + request.action_chunk
        forward, inverse = (request.mode == f"{name}_dynamics" for name in ("forward", "inverse"))
        frames = range(request.video_shape[0]) if inverse else [0]
        if request.cond_frame_indexes is not None:
            frames = request.cond_frame_indexes
        offset = request.action_frame_offset
        return cls(list(frames), rows if forward else state, state, rows,
                   1 - state if offset is None else offset)  # fmt: skip


def positions(
    text: int, grid: tuple[int, int, int], rows: int, offset: int, fps: float, config: Any
) -> torch.Tensor:
    """[3, text + video + rows] fp32: temporal, height and width position of every token."""
    start_at = text + config.unified_3d_mrope_temporal_modality_margin
    modulated = config.enable_fps_modulation
    frame_step = config.base_fps / fps if modulated and grid[0] > 1 else 1.0
    row_step = config.base_fps / 4 / fps if modulated else 1.0
    words = torch.arange(text, dtype=torch.float64).expand(3, -1)
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    f, r, c = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    k = torch.arange(rows, dtype=torch.float64) + offset
    video = torch.stack((start_at + f * frame_step, r, c))
    action = torch.stack((start_at + k * row_step, torch.zeros(rows), torch.zeros(rows)))
    return torch.cat((words, video, action), dim=1).float()


@torch.no_grad()
def velocity(
    model: Any, ids: Sequence[int], video: torch.Tensor, action: torch.Tensor, timestep: int,
    plan: Plan, *, domain: int, raw: int, fps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One call of its transformer: velocities of video [1, 48, t, h, w] and action [rows, 64]."""
    text, (t, h, w) = len(ids), video.shape[2:]
    grid = (t, -(-h // 2), -(-w // 2))
    cells, rows = grid[1] * grid[2], action.shape[0]
    noisy_frames = torch.tensor([f for f in range(t) if f not in plan.frames], dtype=torch.long)
    noisy_rows = torch.arange(plan.clean_rows, rows)
    at_video = torch.arange(text, text + t * cells)
    at_action = at_video[-1] + 1 + torch.arange(rows)
    noisy_cells = (noisy_frames[:, None] * cells + torch.arange(cells)).flatten()
    dtype = model.proj_in.weight.dtype
    out_video, _, out_action = model(
        input_ids=torch.tensor(ids), text_indexes=torch.arange(text), und_len=text,
        position_ids=positions(text, grid, rows, plan.offset, fps, model.config),
        sequence_length=text + t * cells + rows,
        vision_tokens=[video.to(dtype)], vision_token_shapes=[grid],
        vision_sequence_indexes=at_video, vision_mse_loss_indexes=at_video[noisy_cells],
        vision_timesteps=torch.full((len(noisy_cells),), timestep),
        vision_noisy_frame_indexes=[noisy_frames],
        action_tokens=[action.to(dtype)], action_token_shapes=[(rows, 1, 1)],
        action_sequence_indexes=at_action, action_mse_loss_indexes=at_action[noisy_rows],
        action_timesteps=torch.full((len(noisy_rows),), timestep),
        action_noisy_frame_indexes=[noisy_rows], action_domain_ids=[torch.tensor([domain])],
        return_dict=False,
    )  # fmt: skip
    out_action[0][:, raw:] = 0
    return out_video[0], out_action[0]


def loop(
    folder: Path, request: Any, schedule: str, shift: float, dtype: torch.dtype = torch.float32
) -> Result:
    """A `Cosmos3ActionRequest` (clean frames as cond_video_latents) step by step.

    The state is fp32, or fp64 with dtype float64, which raises the solver's sigmas too.
    """
    plan, model = Plan.of(request), transformer(folder, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    raw, scale = request.raw_action_dim, request.guidance_scale
    video, action = (part.to(wide) for part in _initial(request, plan))
    given_video, given_action = video.clone(), action.clone()
    solver = scheduler(
        pipeline(folder, torch.float32), schedule, request.num_inference_steps, shift
    )
    solver.sigmas = solver.sigmas.to(wide)
    solvers = solver, copy.deepcopy(solver)
    prompts = [ids[0, : int(mask.sum())].tolist() for ids, mask in (
        (request.text_ids, request.text_mask), (request.neg_text_ids, request.neg_text_mask),
    )]  # fmt: skip
    low, high = request.guidance_interval or (-1, 1001)
    for timestep in solver.timesteps:
        guided = scale != 1 and low < timestep < high
        branches = [
            velocity(model, ids, video, action, int(timestep), plan,
                     domain=request.domain_id, raw=raw, fps=request.fps)
            for ids in prompts[: 2 if guided else 1]
        ]  # fmt: skip
        pairs = [[part.to(wide) for part in pair] for pair in zip(*branches, strict=True)]
        v = [pair[-1] + scale * (pair[0] - pair[-1]) if guided else pair[0] for pair in pairs]
        video = solvers[0].step(v[0], timestep, video, return_dict=False)[0]
        action = solvers[1].step(v[1][None], timestep, action[None], return_dict=False)[0][0]
        video[:, :, plan.frames] = given_video[:, :, plan.frames]
        action[: plan.clean_rows] = given_action[: plan.clean_rows]
    return Result(action[None, plan.dropped :, :raw], video, *prompts)


def _initial(request: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """video [1, 48, t, h, w] and action [rows, 64] fp32 before the first step."""
    raw = request.raw_action_dim
    clean = request.cond_video_latents if plan.frames else None
    video = start((1, 48, *request.video_shape), clean, plan.frames, request.seed)
    action = noise(request.seed, (1, plan.rows, 64))[0]
    action[:, raw:] = 0
    if request.clean_action is not None:
        action[: plan.dropped, :raw] = request.clean_action[0]
    if request.mode == "forward_dynamics":
        action[plan.dropped :, :raw] = request.cond_action[0, :, :raw]
    return video, action


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance, computed in fp64."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
