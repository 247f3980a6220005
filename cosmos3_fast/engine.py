"""The engine: observation and instruction in, actions and the imagined rollout out.

`Engine` puts the parts together: it reads the checkpoint's configuration, loads this rank's part of
the weights and answers requests one at a time. `docs/architecture.md` tells the life of a request.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import numpy as np
import torch

from cosmos3_fast import agreement, denoise, latents, startup
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.checks import check
from cosmos3_fast.config import EngineArgs
from cosmos3_fast.kept import DECODER, Kept
from cosmos3_fast.loader import LoadReport
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.modes import own_modes
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import Cosmos3ActionRequest, Layout, pixels_to_encode
from cosmos3_fast.stages import Stages
from cosmos3_fast.transfer import upload
from cosmos3_fast.vae import WanVAE
from cosmos3_fast.watchdog import Watchdog

log = logging.getLogger(__name__)
T = TypeVar("T")
Noise = Future[tuple[np.ndarray, np.ndarray]]  # of video and action


class Engine:
    """One policy on one device, or one rank of it.

    `step(request)` must be called on every rank with the same request. After it, `times` holds the
    milliseconds of each stage and `peak_bytes` the device memory of the process so far. A refused
    request (ValueError) leaves the engine as it was; over several ranks any later error makes it
    refuse further requests (RuntimeError). One call at a time: while one runs, another one, from
    whatever thread, raises RuntimeError at once and changes nothing; `close` too.
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
        self.args = args
        self.mesh = Mesh.create(
            args.config.parallel,
            startup.device_of(args.config.device),
            collective=args.config.runtime.collective,
        )
        self.device = self.mesh.device
        self.times: dict[str, float] = {}
        self.load_reports: dict[str, LoadReport] = {}
        self._model: Cosmos3Transformer | None = None
        self.vae: WanVAE | None = None
        self._failed, self._requests, self._warned = "", 0, False
        self._busy, self._process = threading.Lock(), os.getpid()
        runtime = args.config.runtime
        self._kept = Kept(runtime)
        self._host = ThreadPoolExecutor(1, thread_name_prefix="cosmos3-noise")
        self._watchdog: Watchdog | None = None
        try:
            self.checkpoint = self.together(
                lambda: startup.read(args.plugin_args, self.device),
                lambda found: startup.facts(args, found, with_tensors=weights is None),
            )
            self._model, self.vae, self.load_reports = self.together(
                lambda: startup.build(args, self.checkpoint, self.mesh, weights, progress)
            )
            self._watchdog = Watchdog(
                self.mesh, deadline=runtime.step_deadline_s, silence=runtime.silence_s
            )
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
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        cfg_size: int = 1,
        tp_size: int = 1,
        schedule: str | None = None,
        flow_shift: float | None = None,
        decode_video: bool = False,
        use_cuda_graph: bool = True,
    ) -> Engine:
        """An engine of a checkpoint folder, or of a model on the Hugging Face hub ("owner/name" and
        its `revision`).

        device: None is this rank's GPU where there is one, else "cpu". dtype: None is bfloat16 on a
        GPU, float32 on a CPU. cfg_size, tp_size: ranks for the guidance branches (1 or 2), and to
        split each over. schedule, flow_shift: None is what the checkpoint says. decode_video:
        results hold pixels, too. ValueError names what does not fit.
        """
        found = startup.arguments(
            dir_or_hub_id,
            revision=revision,
            device=device,
            dtype=dtype,
            cfg_size=cfg_size,
            tp_size=tp_size,
            schedule=schedule,
            flow_shift=flow_shift,
            decode_video=decode_video,
            use_cuda_graph=use_cuda_graph,
        )
        return cls(found)

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
        any compute), FloatingPointError when a result is not finite: nothing is returned then;
        RuntimeError during another call, after `close` and after an error over ranks, or when
        another rank failed, TimeoutError when one did not come in time.
        `on_step(i)` is called as step i is issued, in the engine's own modes (`own_modes`).
        """
        with self._alone():
            return self._step(request, on_step)

    def refuse(self, error: ValueError) -> NoReturn:
        """Take part in this request with an error instead of a request (an unreadable file, say).

        Every rank raises ValueError; the other ranks call `step` or `refuse` as for any request.
        """
        with self._alone():
            if self._failed:
                self._fail_again()
            with self._meeting():
                agreement.agree(self.mesh, {}, error=error)
            raise error

    def warmup(self, request: Cosmos3ActionRequest) -> None:
        """Compile, capture and fill the caches for requests of this one's shape; its result is
        dropped.
        """
        with self._alone():
            for _ in range(2):
                self._step(request)

    def together(
        self, work: Callable[[], T], facts: Callable[[T], dict[str, str]] | None = None
    ) -> T:
        """work() on every rank at once; where it raises on any, every rank raises ValueError with
        the words of all that failed (one rank alone: its own error).

        `facts`: digests of the result that must be equal on all ranks.
        """
        error, result, held = None, None, {}
        with self._alone():
            if self._failed:
                self._fail_again()
            try:
                result = work()
                held = {} if facts is None else facts(result)
            except Exception as caught:  # whatever it is, the other ranks must hear of it
                error = caught
            with self._meeting():
                agreement.agree(self.mesh, held, error=error)
        return cast(T, result)

    def close(self) -> None:
        """Give back graphs, networks, then symmetric memory, then the process group the engine
        started; on a GPU the memory is free for other processes, too. Later calls raise
        RuntimeError; closing again does nothing.
        """
        with self._alone():
            try:
                if self._watchdog is not None:
                    self._watchdog.close()
                self._host.shutdown()
                self._kept.clear()
            finally:
                self._failed, self._model, self.vae = "closed", None, None
                self.mesh.close()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> Cosmos3Transformer:
        """This rank's part of the two towers; RuntimeError once the engine is closed."""
        if self._model is None:
            raise RuntimeError(f"this engine must be rebuilt: {self._failed}")
        return self._model

    @property
    def peak_bytes(self) -> int:
        """Largest device memory in use so far, in bytes; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The engine belongs to this call: its buffers, graphs and the ranks' order of collectives
        are those of one. The call computes in the engine's own modes.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this engine is process {self._process}'s: build one after the fork"
            )
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this engine is in another call; it runs one at a time")
        try:
            with own_modes(self.device):
                yield
        finally:
            self._busy.release()

    def _step(
        self, request: Cosmos3ActionRequest, on_step: Callable[[int], None] | None = None
    ) -> dict[str, torch.Tensor]:
        if self._failed:
            self._fail_again()
        assert self._watchdog is not None
        with self._meeting():
            plan, noise, prepared = self._agree(request)
        self._requests += 1
        deadline = None if prepared else startup.PREPARE_S
        meetings = self.mesh.meetings
        try:
            with self._watchdog.step(self._requests, deadline):
                return self._run(request, plan, noise, on_step, self._watchdog.note)
        except BaseException as error:
            self._fail(error)
            if self.mesh.meetings == meetings:  # the others wait for this rank in `require_in_time`
                with suppress(ConnectionError):  # the error itself says more
                    denoise.tell_failure(self.mesh, error)
            raise

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """A ValueError is every rank's; any other error this rank's alone: it has not met the
        others.
        """
        try:
            yield
        except ValueError:
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Over several ranks: what the others have done is not known, so no request may follow."""
        if self.mesh.world_size > 1:
            self._failed = f"{type(error).__name__}: {error}"

    def _fail_again(self) -> NoReturn:
        """Refuse to go on; ranks that did not fail get a ValueError instead of waiting for this
        one.
        """
        error = RuntimeError(f"this engine must be rebuilt: {self._failed}")
        if self.mesh.channel is not None:
            with suppress(ValueError, TimeoutError, ConnectionError):
                agreement.agree(self.mesh, {}, error=error)
        raise error

    def _agree(self, request: Cosmos3ActionRequest) -> tuple[denoise.Plan, Noise, bool]:
        """Check the request here and its digest across ranks; every rank raises, or none.

        The plan, its noise (drawn meanwhile), and whether every rank has prepared its steps.
        """
        plan, noise, error, facts = None, None, None, dict[str, str]()
        decode = self.args.plugin_args.decode_video
        try:
            check(request, self.checkpoint.transformer, has_encoder=self.vae is not None)
            steps = request.num_inference_steps
            schedule = denoise.schedule_of(self.args.plugin_args, self.checkpoint.scheduler, steps)
            plan = denoise.plan(request, self.checkpoint.transformer, schedule)
            denoise.check_pictures(self.vae, request, plan.layout, decode=decode)
            noise = self._host.submit(denoise.noise, plan.layout, request.seed)
            if self.mesh.world_size > 1:
                facts = agreement.facts(request)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        state = {} if plan is None else self._kept.state(plan, request, self.mesh, decode=decode)
        together = agreement.agree(self.mesh, facts, error=error, state=state)
        assert plan is not None and noise is not None
        differ = {name for name, held in together.items() if held is None}
        if differ - {DECODER}:
            self._kept.clear()
        self._warn(request, plan)
        ready = all(held for name, held in together.items() if "prompt" not in name)
        return plan, noise, ready and not differ

    def _warn(self, request: Cosmos3ActionRequest, plan: denoise.Plan) -> None:
        """Once: guidance, or ranks for it, that do nothing."""
        if self._warned or any(plan.guided):
            return
        idle = [denoise.idle_guidance(request, plan)]
        if self.mesh.cfg_size == 2:
            idle.append("with cfg_size 2 the second group adds nothing")
        if any(idle):
            self._warned = True
            if self.mesh.rank == 0:
                log.warning("no step is guided: %s", "; ".join(filter(None, idle)))

    def _run(
        self,
        request: Cosmos3ActionRequest,
        plan: denoise.Plan,
        noise: Noise,
        on_step: Callable[[int], None] | None,
        note: Callable[[str], None],
    ) -> dict[str, torch.Tensor]:
        stages = Stages(self.device)
        capture = self.args.config.runtime.use_cuda_graph
        note("before its first step")
        runner = self._kept.runner(plan, self.model, capture)
        stages.mark("prepare")
        clean = self._clean(request, plan.layout, capture)
        stages.mark("encode")
        for branch in plan.branches(self.mesh):
            ids = plan.prompts[branch]
            runner.set_prompt(branch, ids, self._kept.und(ids, self.model))
        stages.mark("prompt")
        denoise.load(runner, plan, request)
        runner.set_state(self._noise_state(noise, plan.layout), clean)
        stages.mark("load")
        state = denoise.denoise(runner, plan, on_step, note)
        stages.mark("denoise")
        video, rows = latents.split(state, plan.layout)
        result = {
            "action": rows[:, plan.layout.dropped_rows :, : request.raw_action_dim].clone(),
            "video": video,
        }
        if self.args.plugin_args.decode_video:
            assert self.vae is not None
            note("decode")
            result["pixels"] = self.vae.decode(video)
            stages.mark("decode")
        finite = denoise.finite(result | {"state": state})
        note(f"after step {plan.schedule.steps} of {plan.schedule.steps}, waiting for the device")
        denoise.require_in_time(self.mesh, (self.model, self.vae))
        denoise.require_finite(finite)
        if self.args.plugin_args.decode_video:
            self._kept.note_decoded(plan.layout)
        self.times = stages.milliseconds()
        return result

    def _clean(self, request: Cosmos3ActionRequest, layout: Layout, capture: bool) -> torch.Tensor:
        """float32 [N]: the clean values of the state, pixels encoded where they are given."""
        pixels, given = pixels_to_encode(request, layout), request.cond_video_latents
        if pixels is not None:
            assert self.vae is not None
            given = self._kept.encoders.encode(self.vae, pixels, self.device, capture)
        actions = request.cond_action if request.mode == "forward_dynamics" else None
        if actions is not None:
            actions = actions[..., : request.raw_action_dim]
        return latents.clean_state(layout, given, actions, request.clean_action, self.device)

    def _noise_state(self, noise: Noise, layout: Layout) -> torch.Tensor:
        parts = map(torch.from_numpy, noise.result())
        video, action = (upload(part, self.device) for part in parts)
        return latents.flatten(video, action, layout)
