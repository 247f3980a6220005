"""D, E or S as diffusers runs them and as this engine does, on the same random weights, in one run.

    python bench/against_diffusers.py --requests D --json OUT

Agreement comes first: both errors against float32 on the same (rounded) weights; no time is printed
if ours is over twice theirs. Then whole requests, pixels on the host to actions there, new picture
and seed each time: ours, diffusers eager, diffusers with its transformer compiled, ours again.
diffusers runs its pipeline's loop: the whole clip encoded, index lists made once a request, one
transformer call a branch and step, its two UniPC schedulers. It has no prompt cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, UniPCMultistepScheduler

from cosmos3_fast import Cosmos3ActionRequest, Engine, ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import read_json
from cosmos3_fast.sampler import noise
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint, random_tensor
from cosmos3_fast.testing.gate import relative
from cosmos3_fast.testing.machine import machine, script_command
from cosmos3_fast.testing.measure import engine_args, time_requests, wait
from cosmos3_fast.testing.requests import WORKLOADS, Workload

EXACT = "time_embedder."  # float32 in both, whatever the rest is
SHIFT = 5.0
Results = dict[str, torch.Tensor]


def rounded(dtype: torch.dtype) -> Any:
    """A filler of slots whose values are those that `dtype` holds, whatever the slots' own."""

    def fill(slots: Mapping[str, Slot]) -> None:
        fill_random(slots)
        for key, slot in slots.items():
            if not key.startswith(EXACT):
                slot.target.copy_(slot.target.to(dtype))

    return torch.no_grad()(fill)


@torch.no_grad()
def build(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers model made on the device, filled from the seed."""
    with torch.device("meta"):
        model = kind.from_config(read_json(folder / "config.json"))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if hasattr(model, "time_embedder"):
        model.time_embedder.float()
        size = model.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        model.rotary_emb.inv_freq = (1.0 / model.config.rope_theta**exponents).to(device)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), 0, device))
    return model


class Branch:
    """What one prompt's calls of the transformer share; indexes count prompt, video, actions."""

    def __init__(self, ids: torch.Tensor, request: Cosmos3ActionRequest, config: Any) -> None:
        device, text = ids.device, ids.numel()
        frames, height, width = request.video_shape
        clean = 0 if request.clean_action is None else request.clean_action.shape[1]
        grid = (frames, -(-height // 2), -(-width // 2))
        cells, rows = grid[1] * grid[2], clean + request.action_chunk
        video, last = text + torch.arange(frames * cells, device=device), text + frames * cells
        self.noisy_cells, self.noisy_rows = (frames - 1) * cells, request.action_chunk
        noisy_rows = torch.arange(clean, rows, device=device)
        self.inputs = {
            "input_ids": ids,
            "text_indexes": torch.arange(text, device=device),
            "position_ids": self._positions(text, grid, rows, 1 - clean, request.fps, config, ids),
            "und_len": text,
            "sequence_length": last + rows,
            "vision_token_shapes": [grid],
            "vision_sequence_indexes": video,
            "vision_mse_loss_indexes": video[cells:],
            "vision_noisy_frame_indexes": [torch.arange(1, frames, device=device)],
            "action_token_shapes": [(rows, 1, 1)],
            "action_sequence_indexes": last + torch.arange(rows, device=device),
            "action_mse_loss_indexes": last + noisy_rows,
            "action_noisy_frame_indexes": [noisy_rows],
            "action_domain_ids": [torch.tensor([request.domain_id], device=device)],
        }

    @staticmethod
    def _positions(
        text: int, grid: tuple[int, int, int], rows: int, offset: int, fps: float, config: Any,
        like: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[3, sequence] float32: time, height and width of every token (fps modulation on)."""
        start = text + config.unified_3d_mrope_temporal_modality_margin
        frame = config.base_fps / fps if grid[0] > 1 else 1.0
        words = torch.arange(text).expand(3, -1)
        f, r, c = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        video = torch.stack((start + f * frame, r, c)).flatten(1)
        times = start + (torch.arange(rows) + offset) * (config.base_fps / 4 / fps)
        action = torch.stack((times, torch.zeros(rows), torch.zeros(rows)))
        return torch.cat((words, video, action), dim=1).float().to(like.device)

    def velocity(
        self, model: Any, video: torch.Tensor, action: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of video [1, C, t, h, w] and action [rows, A], in the network's dtype."""
        got, _, rows = model(
            **self.inputs,
            vision_tokens=[video],
            vision_timesteps=timestep.expand(self.noisy_cells),
            action_tokens=[action],
            action_timesteps=timestep.expand(self.noisy_rows),
            return_dict=False,
        )
        return got[0], rows[0]


class Diffusers:
    """The two networks, and a request through them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.transformer = build(Cosmos3OmniTransformer, folder / "transformer", device, dtype)
        self.vae = build(AutoencoderKLWan, folder / "vae", device, dtype)
        self.scheduler = UniPCMultistepScheduler.from_config(
            read_json(folder / "scheduler" / "scheduler_config.json"),
            use_karras_sigmas=False, use_flow_sigmas=True, flow_shift=SHIFT,
        )  # fmt: skip

    def encode(self, request: Cosmos3ActionRequest) -> torch.Tensor:
        """Normalised latents float32 of the clip: the picture for all of its frames."""
        picture = request.cond_video_pixels.to(self.device)
        clip = (picture.float() / 127.5 - 1).expand(-1, -1, 4 * request.video_shape[0] - 3, -1, -1)
        mean, std = (
            torch.tensor(m, device=self.device, dtype=self.dtype).view(1, -1, 1, 1, 1)
            for m in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return ((self.vae.encode(clip.to(self.dtype)).latent_dist.mode() - mean) / std).float()

    @torch.no_grad()
    def step(self, request: Cosmos3ActionRequest) -> Results:
        """A policy request to the end of its loop: action [1, chunk, raw], video latents."""
        height, width = request.video_shape[1:]
        raw, scale = request.raw_action_dim, request.guidance_scale
        clean_video = self.encode(request)[:, :, :1, :height, :width]
        state = request.clean_action
        clean = 0 if state is None else state.shape[1]
        shape = (clean + request.action_chunk, self.transformer.config.action_dim)
        video = torch.from_numpy(noise(request.seed, (1, 48, *request.video_shape)))
        action = torch.from_numpy(noise(request.seed, (1, *shape)))[0]
        action[:, raw:] = 0
        if state is not None:
            action[:clean, :raw] = state[0]
        video, action = video.to(self.device), action.to(self.device)
        video[:, :, :1] = clean_video
        kept = action[:clean].clone()
        prompts = (request.text_ids, request.neg_text_ids)[: 1 + (scale != 1)]
        branches = [
            Branch(ids[0].to(self.device), request, self.transformer.config) for ids in prompts
        ]
        solvers = self.scheduler, copy.deepcopy(self.scheduler)
        count = request.num_inference_steps
        for solver in solvers:
            solver.set_timesteps(count, sigmas=np.linspace(0.999, 0.0, count + 1)[:-1])
        for timestep in solvers[0].timesteps.tolist():
            t = torch.full((1,), timestep, device=self.device)
            given = video.to(self.dtype), action.to(self.dtype)
            found = [branch.velocity(self.transformer, *given, t) for branch in branches]
            v_video, v_action = (
                pair[0] if len(pair) == 1 else pair[1] + scale * (pair[0] - pair[1])
                for pair in ([v.float() for v in pair] for pair in zip(*found, strict=True))
            )
            v_action[:, raw:] = 0
            video = solvers[0].step(v_video, timestep, video, return_dict=False)[0]
            action = solvers[1].step(v_action[None], timestep, action[None], return_dict=False)[0][
                0
            ]
            video[:, :, :1], action[:clean] = clean_video, kept
        return {"action": action[None, clean:, :raw], "video": video}


def truth(folder: Path, device: torch.device, dtype: torch.dtype, workload: Workload) -> Results:
    """The request in float32, by the torch references, on the weights that `dtype` holds."""
    made = engine_args(folder, str(device), torch.float32, graph=False)
    with ops.reference(), Engine(made, weights=rounded(dtype)) as engine:
        return {k: v.cpu() for k, v in engine.step(workload.request(1)).items()}


def their_ms(model: Diffusers, workload: Workload, repeats: int) -> dict[str, float]:
    """Median of whole requests, and of the encode alone within as many more."""
    search = model.device.type == "cuda"
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True) if search else nullcontext()
    with flags:
        model.step(workload.request(2))
        totals, encodes = [], []
        for seed in range(100, 100 + repeats):
            request = workload.request(seed)
            wait(model.device)
            start = time.perf_counter()
            model.step(request)["action"].cpu()
            totals.append((time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            with torch.no_grad():
                model.encode(request)
            wait(model.device)
            encodes.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(totals), "encode_ms": statistics.median(encodes)}


def our_ms(engine: Engine, workload: Workload, repeats: int, first: int) -> float:
    return time_requests(engine, map(workload.request, range(first, first + repeats))).p50


def compiled(model: Diffusers, how: str) -> None:
    """Compile the transformer, or its repeated blocks, for the exact shapes."""
    torch._dynamo.config.cache_size_limit = 64
    if how == "blocks":
        model.transformer.compile_repeated_blocks(dynamic=False)
    else:
        model.transformer.compile(dynamic=False)


def compare(
    kind: str, workload: Workload, engine: Engine, model: Diffusers,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One row: errors, and times if they are in order; `agree` says whether."""
    exact = args.truths[kind]
    ours = {k: v.cpu() for k, v in engine.step(workload.request(1)).items()}
    theirs = {k: v.cpu() for k, v in model.step(workload.request(1)).items()}
    errors = relative(ours, exact), relative(theirs, exact)
    floor = 1e-5 if engine.model.dtype == torch.float32 else 0.0
    agree = errors[0] <= max(2 * errors[1], floor)
    row: dict[str, Any] = {
        "request": kind,
        "agree": agree,
        "error": errors[0],
        "diffusers_error": errors[1],
        "between": relative(ours, theirs),
    }
    if not agree:
        return row
    engine.warmup(workload.request(0))
    before = our_ms(engine, workload, args.repeats, 100)
    row |= {f"diffusers_{k}": v for k, v in their_ms(model, workload, args.their_repeats).items()}
    after = our_ms(engine, workload, args.repeats, 200)
    row |= {"ms": before, "ms_after": after}
    row["eager_over_ours"] = row["diffusers_ms"] / max(before, after)
    return row


def with_compiled(row: dict[str, Any], workload: Workload, model: Diffusers, repeats: int) -> None:
    """Add the compiled transformer's figures to a row that agrees."""
    begin = time.perf_counter()
    model.step(workload.request(1))
    row["compile_s"] = time.perf_counter() - begin
    row["compiled_ms"] = their_ms(model, workload, repeats)["ms"]
    row["compiled_over_ours"] = row["compiled_ms"] / max(row["ms"], row["ms_after"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", default="D")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--their-repeats", type=int, default=5)
    parser.add_argument("--compile", choices=("none", "blocks", "whole"), default="blocks")
    parser.add_argument("--tiny", action="store_true", help="tiny model on the CPU, float32")
    parser.add_argument("--json", metavar="OUT")
    return parser.parse_args()


def main() -> int:
    """Exit status 1 when a request disagrees."""
    args = parse()
    device = torch.device("cpu" if args.tiny else "cuda:0")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    kinds = {k: WORKLOADS[k] for k in args.requests.split(",")}
    kinds = {k: w.small() if args.tiny else w for k, w in kinds.items()}
    folder = Path(tempfile.mkdtemp())
    make_tiny_checkpoint(folder, kv_heads=2) if args.tiny else make_nano_folder(folder)
    args.truths = {k: truth(folder, device, dtype, w) for k, w in kinds.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = Diffusers(folder, device, dtype)
    with Engine(engine_args(folder, str(device), dtype), weights=rounded(dtype)) as engine:
        rows = [compare(k, w, engine, model, args) for k, w in kinds.items()]
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.compile != "none":
        compiled(model, args.compile)
        for row in rows:
            if row["agree"]:
                with_compiled(row, kinds[row["request"]], model, args.their_repeats)
                print(json.dumps(row), flush=True)
    if args.json:
        command = script_command(["python"], sys.argv)
        report = {"machine": machine(), "command": command, "requests": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
