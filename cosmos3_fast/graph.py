"""The denoising step with static buffers: copied into before the loop, captured once per shape,
replayed; the VAE's encoder likewise.

A `StepRunner` owns every buffer of one `ShapeKey`. What differs between requests of that shape
(prompt and its length, positions, schedule, guidance scale, seed, embodiment) is data in those
buffers, so one graph serves them all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

from cosmos3_fast import ops
from cosmos3_fast.cache import BoundedCache
from cosmos3_fast.latents import Masks
from cosmos3_fast.model import Adapter, Cosmos3Transformer, GenInputs
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import Layout
from cosmos3_fast.sampler import COEF
from cosmos3_fast.transfer import upload
from cosmos3_fast.vae import WanVAE

log = logging.getLogger(__name__)
T = TypeVar("T")
CAPACITIES = (256, 1024, 4096)  # UND tokens a captured step has room for
STEPS = 64  # rows of the schedule's tables; longer schedules round up to a multiple


class _Place:
    """Where a thread captures on a device: one stream, since cuBLAS keeps a workspace (32 MiB) for
    every stream that a thread has used, and the memory of that workspace.

    Graphs hold the workspace's address, but the process may throw workspaces away at any time, as
    torch.compile does when it records graphs of its own. In a pool that lives as long as the
    graphs the address stays theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        with torch.cuda.device(device):
            self.pool = torch.cuda.MemPool()

    def prepare(self) -> None:
        """On the current stream: products by cuBLAS and cuBLASLt, for which a workspace is made
        where there is none.
        """
        with torch.cuda.use_mem_pool(self.pool, self.device):
            x = torch.zeros(16, 16, device=self.device, dtype=torch.bfloat16)
            F.linear(x @ x, x, x[0])


class _Places(threading.local):
    """This thread's, by device."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, _Place] = {}

    def of(self, device: torch.device) -> _Place:
        if device not in self._by_device:
            self._by_device[device] = _Place(device)
        return self._by_device[device]


_PLACES = _Places()


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Say how long its preparation took."""
    start = time.monotonic()
    yield
    log.info("prepared %s in %.2f s", what, time.monotonic() - start)


class Captured(Generic[T]):
    """A function of static tensors: captured on CUDA when asked, run as it is elsewhere.

    The function runs once before the capture (compilation, library handles, communicators), so it
    must be safe to run on whatever its buffers hold. All graphs captured by a thread on a device
    share cuBLAS's workspace: they are replayed on one stream, or one after the other.
    """

    def __init__(self, run: Callable[[], T], device: torch.device, capture: bool) -> None:
        self._run, self._graph = run, None
        if not capture or device.type != "cuda":
            return
        self._place = _PLACES.of(device)
        stream = self._place.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._place.prepare()
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread's allocations and copies neither fail nor end this capture.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = run()

    def __call__(self) -> T:
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._result

    def reset(self) -> None:
        """Give the graph and its memory back; the object must not be called again."""
        if self._graph is not None:
            self._graph.reset()
            del self._result


class Encoders:
    """The VAE's encoder with static pixels, captured for each of the last `bound` shapes."""

    def __init__(self, bound: int) -> None:
        # By shape: the static pixels, and the call that encodes them.
        self._kept = BoundedCache[tuple[torch.Tensor, Captured[torch.Tensor]]](
            bound, lambda pair: pair[1].reset()
        )

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._kept

    def clear(self) -> None:
        """Give every graph back."""
        self._kept.clear()

    def encode(
        self, vae: WanVAE, pixels: torch.Tensor, device: torch.device, capture: bool
    ) -> torch.Tensor:
        """Normalised latents of pixels [1, 3, T, H, W], uint8 or in [-1, 1], from any device."""
        pixels = upload(pixels, device)
        if pixels.dtype == torch.uint8:
            pixels = ops.image_to_tensor(pixels[0].permute(1, 2, 3, 0))[None]

        def make() -> tuple[torch.Tensor, Captured[torch.Tensor]]:
            static = torch.zeros_like(pixels, dtype=vae.dtype, memory_format=torch.channels_last_3d)
            with _logged(f"the encoder of {tuple(pixels.shape)}"):
                return static, Captured(lambda: vae.encode(static), device, capture)

        static, call = self._kept.get(tuple(pixels.shape), make)
        static.copy_(pixels)
        return call()


@dataclass(frozen=True)
class ShapeKey:
    """Everything a captured step depends on by shape."""

    grid: tuple[int, int, int]
    rows: int
    noisy_video: int
    noisy_rows: int
    branches: int
    capacity: int
    steps: int

    @classmethod
    def of(
        cls, layout: Layout, masks: Masks, branches: int, text_tokens: int, steps: int
    ) -> ShapeKey:
        """The key of a request; ValueError when the prompt is longer than the largest capacity."""
        capacity = next((c for c in CAPACITIES if text_tokens <= c), None)
        if capacity is None:
            raise ValueError(f"a prompt may hold {CAPACITIES[-1]} tokens, got {text_tokens}")
        return cls(
            grid=layout.grid,
            rows=layout.rows,
            noisy_video=masks.video_rows.shape[0],
            noisy_rows=masks.action_rows.shape[0],
            branches=branches,
            capacity=capacity,
            steps=-(-steps // STEPS) * STEPS,
        )


class StepRunner:
    """One shape's buffers and its step, guided (both branches) and plain (the conditional one
    alone).

    The flat state and the sampler's history are float32 [N]; `inputs` is what the network reads.
    """

    def __init__(
        self, key: ShapeKey, layout: Layout, model: Cosmos3Transformer, *, capture: bool
    ) -> None:
        self.key, self.model, self.mesh = key, model, model.mesh
        self._capture, self._steps = capture, dict[bool, Captured[None]]()
        self._loaded: dict[str, Hashable] = {}
        device, dtype, values = model.device, model.dtype, layout.values
        wide: dict[str, Any] = {"device": device, "dtype": torch.float32}
        state = torch.zeros(5, values, **wide)
        self.sample, self.last_sample, self.x0_prev, self.x0_prev2, self.clean = state
        self.noisy = torch.zeros(values, dtype=torch.uint8, device=device)
        self.model_in = torch.zeros(values, dtype=dtype, device=device)
        self.velocity = torch.zeros(key.branches, values, dtype=dtype, device=device)
        self.coef = torch.zeros(key.steps, len(COEF), **wide)
        self.inputs = _inputs(key, layout, model, self.model_in)

    def once(self, name: str, key: Hashable, fill: Callable[[], None]) -> bool:
        """Fill a buffer unless it already holds `key`'s data; True if it did not."""
        if self._loaded.get(name) == key:
            return False
        self._loaded.pop(name, None)
        fill()
        self._loaded[name] = key
        return True

    def set_prompt(
        self, branch: int, ids: tuple[int, ...], und: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Copy a prompt's keys and values [L, n, Hk, D] into a branch."""

        def fill() -> None:
            keys, values = und
            self.inputs.und_k[:, branch, : len(ids)].copy_(keys)
            self.inputs.und_v[:, branch, : len(ids)].copy_(values)
            self.inputs.und_len[branch] = len(ids)

        self.once(f"prompt {branch}", ids, fill)

    def set_positions(
        self, branch: int, key: Hashable, positions: Callable[[], torch.Tensor]
    ) -> None:
        """Rotary tables of a branch for positions [3, M]."""

        def fill() -> None:
            cos, sin = self.model.rotary.tables(positions())
            self.inputs.cos[branch].copy_(cos)
            self.inputs.sin[branch].copy_(sin)

        self.once(f"positions {branch}", key, fill)

    def set_domain(self, domain: int) -> None:
        """Copy one embodiment's action projections."""

        def fill() -> None:
            for mine, theirs in zip(
                vars(self.inputs.adapter).values(),
                vars(self.model.adapter(domain)).values(),
                strict=True,
            ):
                mine.copy_(theirs)

        self.once("domain", domain, fill)

    def set_masks(self, layout: Layout, raw_action_dim: int, masks: Masks) -> None:
        """Which values and tokens are denoised."""

        def fill() -> None:
            self.noisy.copy_(masks.values)
            self.inputs.noisy.copy_(masks.tokens)
            self.inputs.video_rows.copy_(masks.video_rows)
            self.inputs.action_rows.copy_(masks.action_rows)
            # What a first run or other masks left at clean places would enter the solver's history.
            self.velocity.zero_()

        self.once("masks", (layout, raw_action_dim), fill)

    def set_schedule(self, timesteps: tuple[int, ...], coef: torch.Tensor) -> bool:
        """Timestep embeddings and solver coefficients [steps, K] of a whole schedule; True where
        its timesteps are not those of the last one.
        """

        def fill() -> None:
            self.inputs.table[: len(timesteps)].copy_(self.model.timestep_table(timesteps))

        self.coef[: len(timesteps)].copy_(upload(coef, self.coef.device))
        return self.once("timesteps", timesteps, fill)

    def set_state(self, noise: torch.Tensor, clean: torch.Tensor) -> None:
        """Start a loop from noise [N], clean values [N] put in their places."""
        self.clean.copy_(clean)
        torch.where(self.noisy.bool(), noise, self.clean, out=self.sample)
        self.model_in.copy_(self.sample)
        for history in (self.last_sample, self.x0_prev, self.x0_prev2):
            history.zero_()
        self.inputs.step.zero_()

    def prepare(self, guided: bool) -> bool:
        """Capture a step if that has not happened; True if it has now, the state then undefined."""
        if guided in self._steps:
            return False
        self.inputs.step.zero_()
        with _logged(f"{self.key}, guided {guided},"):
            self._steps[guided] = Captured(
                lambda: self._step(guided), self.model.device, self._capture
            )
        return True

    def prepared(self, guided: bool) -> bool:
        """Whether a step is ready to run."""
        return guided in self._steps

    def step(self, guided: bool) -> None:
        """One prepared denoising step: network, guidance, solver, and the step counter."""
        self._steps[guided]()

    def _step(self, guided: bool) -> None:
        first, last = branch_range(guided, self.mesh)
        velocity = self.velocity[first:last]
        self.model.velocity(self.inputs.branches(first, last), velocity)
        if guided and self.mesh.cfg_size == 2:
            velocity = self.mesh.all_gather(velocity, axis="cfg").flatten(0, 1)
        ops.unipc_step(
            velocity,
            self.sample,
            self.last_sample,
            self.x0_prev,
            self.x0_prev2,
            self.clean,
            self.noisy,
            self.coef,
            self.inputs.step,
            self.model_in,
        )
        self.inputs.step.add_(1)

    def close(self) -> None:
        """Give captured graphs back."""
        for step in self._steps.values():
            step.reset()
        self._steps.clear()


def branch_range(guided: bool, mesh: Mesh) -> tuple[int, int]:
    """The branches [first, last) this rank computes: 0 is conditional, 1 unconditional."""
    if not guided:
        return 0, 1
    return (0, 2) if mesh.cfg_size == 1 else (mesh.cfg_rank, mesh.cfg_rank + 1)


def _inputs(
    key: ShapeKey, layout: Layout, model: Cosmos3Transformer, model_in: torch.Tensor
) -> GenInputs:
    config, device = model.config, model.device
    place: dict[str, Any] = {"device": device, "dtype": model.dtype}
    attention = model.gen[0].attention
    tokens, half = layout.tokens, config.head_dim // 2
    und = (config.num_hidden_layers, key.branches, key.capacity, attention.kv_heads, attention.dim)
    video, action = model_in.split([layout.video_values, layout.rows * layout.action_dim])
    hidden, width = config.hidden_size, config.action_dim
    return GenInputs(
        video=video.view(layout.video_tokens, layout.patch_dim),
        action=action.view(layout.rows, width),
        adapter=Adapter(
            torch.zeros(width, hidden, **place),
            torch.zeros(hidden, **place),
            torch.zeros(hidden, width, **place),
            torch.zeros(width, **place),
        ),
        table=torch.zeros(key.steps, hidden, **place),
        step=torch.zeros(1, dtype=torch.int32, device=device),
        noisy=torch.zeros(tokens, dtype=torch.uint8, device=device),
        cos=torch.zeros(key.branches, tokens, half, device=device, dtype=torch.float32),
        sin=torch.zeros(key.branches, tokens, half, device=device, dtype=torch.float32),
        und_k=torch.zeros(und, **place),
        und_v=torch.zeros(und, **place),
        und_len=torch.zeros(key.branches, dtype=torch.int32, device=device),
        video_rows=torch.zeros(key.noisy_video, dtype=torch.int64, device=device),
        action_rows=torch.zeros(key.noisy_rows, dtype=torch.int64, device=device),
    )
