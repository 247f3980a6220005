"""The engine: observation and instruction in, actions and the imagined rollout out.

`Engine` puts the parts together: it reads the checkpoint's configuration, loads this rank's part of
the weights and answers requests one at a time. `docs/architecture.md` tells the life of a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch

from cosmos3_fast import agreement, denoise, latents, ops, startup
from cosmos3_fast.cache import BoundedCache
from cosmos3_fast.checkpoint import Slot, open_checkpoint
from cosmos3_fast.config import (
    CheckpointConfig,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
)
from cosmos3_fast.graph import Captured, StepRunner
from cosmos3_fast.loader import LoadReport, load, progress_bar
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import TEMPORAL_FACTOR, Cosmos3ActionRequest, Layout, check
from cosmos3_fast.stages import Stages
from cosmos3_fast.vae import WanVAE
from cosmos3_fast.watchdog import Watchdog

log = logging.getLogger(__name__)
T = TypeVar("T")
Noise = Future[tuple[np.ndarray, np.ndarray]]  # of video and action
Und = tuple[torch.Tensor, torch.Tensor]  # keys and values of a prompt
Encoder = tuple[torch.Tensor, Captured[torch.Tensor]]  # its pixels, and the call that encodes them
MAX_ENCODERS = 4  # captured encoder shapes kept
PREPARE_S = 600.0  # deadline of a request that must compile and capture first


class Engine:
    """One policy on one device, or one rank of it.

    `step(request)` must be called on every rank with the same request. After it, `times` holds the
    milliseconds of each stage and `peak_bytes` the device memory of the process so far. A refused
    request (ValueError) leaves the engine as it was; over several ranks any later error makes it
    refuse further requests (RuntimeError).
    """

    def __init__(
        self,
        args: EngineArgs,
        *,
        progress: bool = False,
        weights: Callable[[Mapping[str, Slot]], None] | None = None,
    ) -> None:
        """Build and load. ValueError names the file, key or number that does not fit, on every rank
        alike.

        `weights` fills the slots of each network instead of the checkpoint's tensors, whose files
        are then not read (`testing.fill_random`: a model of real size without its weights).
        """
        self.args, self._weights = args, weights
        self.mesh = Mesh.create(args.config.parallel, startup.device_of(args.config.device))
        self.device = self.mesh.device
        self.times: dict[str, float] = {}
        self.load_reports: dict[str, LoadReport] = {}
        self.vae: WanVAE | None = None
        self._failed, self._requests, self._warned = "", 0, False
        runtime = args.config.runtime
        self._runners = BoundedCache[StepRunner](runtime.max_graphs, StepRunner.close)
        self._encoders = BoundedCache[Encoder](MAX_ENCODERS, lambda pair: pair[1].reset())
        self._prompts = BoundedCache[Und](runtime.max_prompts)
        self._host = ThreadPoolExecutor(1, thread_name_prefix="cosmos3-noise")
        self._watchdog: Watchdog | None = None
        try:
            self.checkpoint = self._together(lambda: startup.read(args.plugin_args))
            self._together(lambda: self._build(progress))
            deadline = args.config.runtime.step_deadline_s
            self._watchdog = Watchdog(self.mesh, deadline=deadline)
        except BaseException:
            self.close()
            raise
        if self.mesh.rank == 0:
            startup.report(self.args, self.model, self.vae, self.load_reports)

    @classmethod
    def from_pretrained(
        cls,
        dir_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        cfg_size: int = 1,
        tp_size: int = 1,
        schedule: str | None = None,
        flow_shift: float | None = None,
        decode_video: bool = False,
        use_cuda_graph: bool = True,
    ) -> Engine:
        """An engine of a checkpoint folder, or of a model on the Hugging Face hub.

        device: None is this rank's GPU where there is one, else "cpu". dtype: None is bfloat16 on a
        GPU, float32 on a CPU. schedule, flow_shift: None is what the checkpoint says.
        """
        folder = Path(dir_or_hub_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(dir_or_hub_id), revision=revision))
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = str(target).startswith("cuda")
        params_dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        plugin = Cosmos3PolicyWNArgs(
            checkpoint_dir=folder,
            flow_shift=flow_shift,
            use_karras_sigmas=None,
            decode_video=decode_video,
            schedule=schedule,
        )
        config = EngineConfig(
            device=DeviceConfig(target, params_dtype),
            parallel=ParallelConfig(cfg_size * tp_size, cfg_size, tp_size),
            runtime=RuntimeConfig(use_cuda_graph=use_cuda_graph),
        )
        return cls(EngineArgs(plugin_args=plugin, config=config))

    def step(
        self,
        request: Cosmos3ActionRequest,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run one request.

        Returns "action" float32 [1, action_chunk, raw_action_dim], "video" float32 [1, C, t, h, w]
        (normalised latents) and, with decode_video, "pixels" float32 [1, 3, T, H, W] in [0, 1], on
        the engine's device. Raises ValueError for a request that cannot run (on every rank, before
        any compute), FloatingPointError when a result is not finite: nothing is returned then.
        `on_step(i)` is called as step i is issued.
        """
        if self._failed:
            self._fail_again()
        assert self._watchdog is not None
        plan, noise, prepared = self._agree(request)
        self._requests += 1
        deadline = None if prepared else PREPARE_S
        try:
            with torch.no_grad(), self._here(), self._watchdog.step(self._requests, deadline):
                return self._run(request, plan, noise, on_step)
        except BaseException as error:
            if self.mesh.world_size > 1:
                self._failed = f"{type(error).__name__}: {error}"
            raise

    def refuse(self, error: ValueError) -> NoReturn:
        """Take part in this request with an error instead of a request (an unreadable file, say).

        Every rank raises ValueError; the other ranks call `step` or `refuse` as for any request.
        """
        agreement.agree(self.mesh, {}, error=error)
        raise error

    def warmup(self, request: Cosmos3ActionRequest) -> None:
        """Compile, capture and fill the caches for requests of this one's shape; its result is
        dropped.
        """
        for _ in range(2):
            self.step(request)

    def close(self) -> None:
        """Give back graphs, then symmetric memory, then the process group the engine started."""
        if self._watchdog is not None:
            self._watchdog.close()
        self._host.shutdown()
        for cache in (self._runners, self._encoders, self._prompts):
            cache.clear()
        self.vae = None
        self.mesh.close()
        self._failed = "closed"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def peak_bytes(self) -> int:
        """Largest device memory in use so far, in bytes; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _here(self) -> torch.cuda.device:
        """For Triton, events and captures, which use a thread's current device; -1: no change."""
        return torch.cuda.device(self.device.index if self.device.type == "cuda" else -1)

    def _together(self, work: Callable[[], T]) -> T:
        """work() on every rank; if it raises ValueError on any, every rank raises."""
        error, result, facts = None, None, {}
        try:
            result = work()
            if isinstance(result, CheckpointConfig):
                facts = startup.facts(self.args, result, self._weights is None)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        agreement.agree(self.mesh, facts, error=error)
        return cast(T, result)

    def _build(self, progress: bool) -> None:
        config, folder = self.args.config, self.checkpoint.folder
        place: dict[str, Any] = {"device": self.device, "dtype": config.device.params_dtype}
        self.model = Cosmos3Transformer(self.checkpoint.transformer, self.mesh, **place)
        parts: list[tuple[str, Cosmos3Transformer | WanVAE]] = [("transformer", self.model)]
        if self.checkpoint.vae is not None:
            self.vae = WanVAE(
                self.checkpoint.vae,
                mesh=self.mesh,
                decoder=self.args.plugin_args.decode_video,
                max_bytes=config.runtime.decode_max_bytes,
                deadline=config.runtime.step_deadline_s,
                **place,
            )
            parts.append(("vae", self.vae))
        for name, part in parts:
            if self._weights is not None:
                self._weights(part.slots())
                continue
            show = progress and self.mesh.rank == 0
            self.load_reports[name] = load(
                part.slots(),
                open_checkpoint(folder / name),
                unused=part.unused,
                strict=self.args.plugin_args.weight_strict,
                progress=progress_bar(name) if show else None,
            )

    def _fail_again(self) -> NoReturn:
        """Refuse to go on; ranks that did not fail get a ValueError instead of waiting for this
        one.
        """
        error = RuntimeError(f"this engine must be rebuilt: {self._failed}")
        if self.mesh.channel is not None:
            with suppress(ValueError):
                agreement.agree(self.mesh, {}, error=error)
        raise error

    def _agree(self, request: Cosmos3ActionRequest) -> tuple[denoise.Plan, Noise, bool]:
        """Check the request here and its digest across ranks; every rank raises, or none.

        The plan, its noise (drawn meanwhile), and whether every rank has prepared its steps.
        """
        plan, noise, error, facts = None, None, None, dict[str, str]()
        try:
            check(request, self.checkpoint.transformer, has_encoder=self.vae is not None)
            steps = request.num_inference_steps
            schedule = denoise.schedule_of(self.args.plugin_args, self.checkpoint.scheduler, steps)
            plan = denoise.plan(request, self.checkpoint.transformer, schedule)
            noise = self._host.submit(denoise.noise, plan.layout, request.seed)
            if self.mesh.world_size > 1:
                facts = agreement.facts(request)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        state = {} if plan is None else self._state(plan, request)
        together = agreement.agree(self.mesh, facts, error=error, state=state)
        assert plan is not None and noise is not None
        if None in together.values():
            self._forget()
        if self.mesh.cfg_size == 2 and not any(plan.guided) and not self._warned:
            self._warned = True
            if self.mesh.rank == 0:
                log.warning("no step is guided: with cfg_size 2 the second group adds nothing")
        return plan, noise, all(held for name, held in together.items() if "prompt" not in name)

    def _state(self, plan: denoise.Plan, request: Cosmos3ActionRequest) -> dict[str, bool | None]:
        """Which of the things whose making is a collective this rank has; None for a prompt that
        only the other guidance branch needs.
        """
        branches = plan.branches(self.mesh)  # differ between the cfg groups
        held: dict[str, bool | None] = {
            f"prompt {i}": ids in self._prompts if i in branches else None
            for i, ids in enumerate(plan.prompts)
        }
        runner, pixels = self._runners.peek(plan.key), _clip(request, plan.layout)
        for guided in set(plan.guided):
            held[f"step {guided}"] = runner is not None and runner.prepared(guided)
        if pixels is not None:
            held["encoder"] = tuple(pixels.shape) in self._encoders
        return held

    def _forget(self) -> None:
        """Ranks differ in what they have cached: all of them go on from nothing, so that they stay
        equal in what their caches drop later, too.
        """
        for cache in (self._runners, self._encoders, self._prompts):
            cache.clear()

    def _run(
        self,
        request: Cosmos3ActionRequest,
        plan: denoise.Plan,
        noise: Noise,
        on_step: Callable[[int], None] | None,
    ) -> dict[str, torch.Tensor]:
        stages = Stages(self.device)
        runner = self._runner(plan)
        stages.mark("prepare")
        clean = self._clean(request, plan.layout)
        stages.mark("encode")
        for branch in plan.branches(self.mesh):
            ids = plan.prompts[branch]
            runner.set_prompt(branch, ids, self._und(ids))
        stages.mark("prompt")
        denoise.load(runner, plan, request)
        runner.set_state(self._noise_state(noise, plan.layout), clean)
        stages.mark("load")
        state = denoise.denoise(runner, plan, on_step)
        stages.mark("denoise")
        video, rows = latents.split(state, plan.layout)
        result = {
            "action": rows[:, plan.layout.dropped_rows :, : request.raw_action_dim].clone(),
            "video": video,
        }
        if self.args.plugin_args.decode_video:
            assert self.vae is not None
            result["pixels"] = self.vae.decode(video)
            stages.mark("decode")
        denoise.require_finite(result | {"state": state})
        late = self.vae.failure() if self.vae is not None else None
        if late:
            raise TimeoutError(late)
        self.times = stages.milliseconds()
        return result

    def _runner(self, plan: denoise.Plan) -> StepRunner:
        """The runner of the plan's shape, its steps captured; the least recently used one goes."""

        def make() -> StepRunner:
            capture = self.args.config.runtime.use_cuda_graph
            return StepRunner(plan.key, plan.layout, self.model, capture=capture)

        runner = self._runners.get(plan.key, make)
        for guided in sorted(set(plan.guided)):
            if runner.prepare(guided):
                log.info("prepared %s, guided %s", plan.key, guided)
        return runner

    def _und(self, ids: tuple[int, ...]) -> Und:
        """Keys and values of a prompt, computed once while it stays among the last used."""
        return self._prompts.get(ids, lambda: self.model.encode_prompt(ids))

    def _clean(self, request: Cosmos3ActionRequest, layout: Layout) -> torch.Tensor:
        """float32 [N]: the clean values of the state, pixels encoded where they are given."""
        pixels = _clip(request, layout)
        given = request.cond_video_latents if pixels is None else self._encode(pixels)
        actions = request.cond_action if request.mode == "forward_dynamics" else None
        return latents.clean_state(layout, given, actions, request.clean_action, self.device)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised latents of pixels [1, 3, T, H, W], uint8 or in [-1, 1]."""
        assert self.vae is not None
        vae, pixels = self.vae, pixels.to(self.device)
        if pixels.dtype == torch.uint8:
            pixels = ops.image_to_tensor(pixels[0].permute(1, 2, 3, 0))[None]

        def make() -> Encoder:
            static = torch.zeros_like(pixels, dtype=vae.dtype, memory_format=torch.channels_last_3d)
            capture = self.args.config.runtime.use_cuda_graph
            return static, Captured(lambda: vae.encode(static), self.device, capture)

        static, encode = self._encoders.get(tuple(pixels.shape), make)
        static.copy_(pixels)
        return encode()

    def _noise_state(self, noise: Noise, layout: Layout) -> torch.Tensor:
        video, action = (torch.from_numpy(part).to(self.device) for part in noise.result())
        return latents.flatten(video, action, layout)


def _clip(request: Cosmos3ActionRequest, layout: Layout) -> torch.Tensor | None:
    """The pixels that must be encoded: the causal prefix of the last clean frame, or None."""
    if request.cond_video_latents is not None or not layout.clean_frames:
        return None
    assert request.cond_video_pixels is not None
    return request.cond_video_pixels[:, :, : 1 + TEMPORAL_FACTOR * layout.clean_frames[-1]]
