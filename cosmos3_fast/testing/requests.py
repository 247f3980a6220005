"""The requests that benchmarks name D, E and S, on random observations, at any model's size.

D: the DROID joint policy (33x40 latents, 9 frames, a state row, 4 steps, guidance 3). E: the
example of PhyAI's page (480x832, 17 frames, 30 steps, no guidance). S: the same on one image in
PhyAI's shape (1 latent frame). `small` divides pictures and chunks, so that a CPU runs them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cosmos3_fast.request import SPATIAL_FACTOR, Cosmos3ActionRequest


@dataclass(frozen=True)
class Workload:
    """Shapes and sampling of a named request; `canvas` in pixels, `latent` (t, h, w)."""

    canvas: tuple[int, int]
    latent: tuple[int, int, int]
    chunk: int
    raw: int
    state_rows: int
    fps: float
    steps: int
    guidance: float
    text_tokens: int

    def small(self) -> Workload:
        """A few latent pixels and two steps of the same kind of request."""
        frames = min(self.latent[0], 3)
        return Workload(
            canvas=(6 * SPATIAL_FACTOR, 8 * SPATIAL_FACTOR),
            latent=(frames, 5, 8),
            chunk=8,
            raw=self.raw,
            state_rows=self.state_rows,
            fps=self.fps,
            steps=2,
            guidance=self.guidance,
            text_tokens=20,
        )

    def request(self, seed: int, *, prompt: int = 0) -> Cosmos3ActionRequest:
        """A new random image (uint8) and noise seed; `prompt` chooses the random token ids."""
        random, words = np.random.RandomState(seed), np.random.RandomState(1000 + prompt)
        pixels = random.randint(0, 256, (1, 3, 1, *self.canvas), dtype=np.uint8)
        ids = torch.from_numpy(words.randint(0, 500, (1, self.text_tokens)))
        negative = torch.from_numpy(words.randint(0, 500, (1, 12)))
        state = torch.from_numpy(random.randn(1, self.state_rows, self.raw).astype(np.float32))
        return Cosmos3ActionRequest(
            text_ids=ids,
            text_mask=torch.ones_like(ids),
            neg_text_ids=negative,
            neg_text_mask=torch.ones_like(negative),
            video_shape=self.latent,
            mode="policy",
            domain_id=8,
            action_chunk=self.chunk,
            raw_action_dim=self.raw,
            cond_video_pixels=torch.from_numpy(pixels),
            clean_action=state if self.state_rows else None,
            fps=self.fps,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=seed,
        )


WORKLOADS = {
    "D": Workload((544, 736), (9, 33, 40), 32, 8, 1, 15.0, 4, 3.0, 160),
    "E": Workload((480, 832), (5, 30, 52), 16, 10, 0, 24.0, 30, 1.0, 110),
    "S": Workload((480, 832), (1, 30, 52), 16, 10, 0, 24.0, 30, 1.0, 110),
}
