"""What an engine keeps from one request for the next: captured steps and encoders, prompts' keys
and values, and which sizes it has decoded.
"""

from __future__ import annotations

import threading

import torch

from cosmos3_fast.cache import BoundedCache
from cosmos3_fast.config import RuntimeConfig
from cosmos3_fast.denoise import Plan
from cosmos3_fast.graph import Encoders, StepRunner
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import Cosmos3ActionRequest, Layout, pixels_to_encode

Und = tuple[torch.Tensor, torch.Tensor]  # keys and values of a prompt
MAX_ENCODERS = 4  # captured encoder shapes kept
MAX_DECODERS = 64  # decoded shapes remembered: cuDNN keeps what its search found
DECODER = "decoder"  # in `state`; no collective depends on it


class _Decoded(threading.local):
    """The decoded shapes for which cuDNN has searched: what it found is a thread's own, and stays
    with it.
    """

    def __init__(self) -> None:
        self.shapes = BoundedCache[bool](MAX_DECODERS)


class Kept:
    """One engine's. Ranks that make the same requests keep the same things, or all `clear` them."""

    def __init__(self, runtime: RuntimeConfig) -> None:
        self.runners = BoundedCache[StepRunner](runtime.max_graphs, StepRunner.close)
        self.encoders = Encoders(MAX_ENCODERS)
        self.prompts = BoundedCache[Und](runtime.max_prompts)
        self.decoded = _Decoded()

    def clear(self) -> None:
        """Give graphs, buffers and prompts back."""
        for cache in (self.runners, self.encoders, self.prompts):
            cache.clear()

    def runner(self, plan: Plan, model: Cosmos3Transformer, capture: bool) -> StepRunner:
        """The runner of the plan's shape, its steps prepared; the least recently used one goes.
        `capture`: of a runner made now.
        """

        def make() -> StepRunner:
            return StepRunner(plan.key, plan.layout, model, capture=capture)

        runner = self.runners.get(plan.key, make)
        for guided in sorted(set(plan.guided)):
            runner.prepare(guided)
        return runner

    def und(self, ids: tuple[int, ...], model: Cosmos3Transformer) -> Und:
        """Keys and values of a prompt, computed once while it stays among the last used."""
        return self.prompts.get(ids, lambda: model.encode_prompt(ids))

    def note_decoded(self, layout: Layout) -> None:
        """This thread has decoded latents of that size."""
        self.decoded.shapes.get(_size(layout), lambda: True)

    def state(
        self, plan: Plan, request: Cosmos3ActionRequest, mesh: Mesh, *, decode: bool
    ) -> dict[str, bool | None]:
        """Which of the things whose making is a collective or takes long this rank has; None for
        what another rank needs. A prompt is the matter of one cfg group, whose ranks encode it.
        """
        branches, own = plan.branches(mesh), mesh.cfg_rank
        held: dict[str, bool | None] = {}
        for group in range(mesh.cfg_size):
            for i, ids in enumerate(plan.prompts):
                mine = group == own and i in branches
                held[f"prompt {i} of group {group}"] = ids in self.prompts if mine else None
        runner, pixels = self.runners.peek(plan.key), pixels_to_encode(request, plan.layout)
        for guided in set(plan.guided):
            held[f"step {guided}"] = runner is not None and runner.prepared(guided)
        if pixels is not None:
            held["encoder"] = tuple(pixels.shape) in self.encoders
        if decode:
            held[DECODER] = _size(plan.layout) in self.decoded.shapes
        return held


def _size(layout: Layout) -> tuple[int, ...]:
    """What cuDNN's search depends on; several of them share a `ShapeKey`."""
    return layout.frames, layout.height, layout.width
