"""A small random VAE of Wan2.2's kind, in diffusers and in ours, and ranks that are threads."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from cosmos3_fast.config import VAEConfig
from cosmos3_fast.vae import WanVAE

TIMEOUT_S = 60.0
Z = 12


@functools.cache
def config() -> VAEConfig:
    generator = torch.Generator().manual_seed(1)
    return VAEConfig(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=Z,
        latents_mean=tuple((torch.randn(Z, generator=generator) * 0.1).tolist()),
        latents_std=tuple((torch.rand(Z, generator=generator) + 0.5).tolist()),
    )


@functools.cache
def reference() -> AutoencoderKLWan:
    """diffusers' VAE in float32, every tensor random, its activations of size one."""
    ours = config()
    model = AutoencoderKLWan(
        base_dim=ours.base_dim,
        decoder_base_dim=ours.decoder_base_dim,
        z_dim=Z,
        dim_mult=list(ours.dim_mult),
        temperal_downsample=list(ours.temperal_downsample),
        latents_mean=list(ours.latents_mean),
        latents_std=list(ours.latents_std),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.eval().requires_grad_(False).named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("gamma"):
            weight.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.3 * noise)
        else:
            weight.copy_(noise * weight[0].numel() ** -0.5)
    model.decoder.conv_out.weight.mul_(0.6)
    model.decoder.conv_out.bias.mul_(0.3)
    return model


def fill(vae: WanVAE) -> WanVAE:
    state = reference().state_dict()
    for name, slot in vae.slots().items():
        assert tuple(state[name].shape) == slot.shape, name
        slot.target.copy_(state[name])
    return vae


def build(dtype: torch.dtype = torch.float32, **options: Any) -> WanVAE:
    options = {"device": "cpu"} | options
    return fill(WanVAE(config(), dtype=dtype, **options))


def moments(model: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(m) for m in (config().latents_mean, config().latents_std))
    shape = (1, -1, 1, 1, 1)
    return mean.view(shape), std.view(shape)


def reference_encode(pixels: torch.Tensor, model: AutoencoderKLWan | None = None) -> torch.Tensor:
    model = model or reference()
    mean, std = moments(model)
    with torch.no_grad():
        return (model.encode(pixels.to(model.dtype)).latent_dist.mean.float() - mean) / std


def reference_decode(latents: torch.Tensor, model: AutoencoderKLWan | None = None) -> torch.Tensor:
    model = model or reference()
    mean, std = moments(model)
    with torch.no_grad():
        return model.decode((latents * std + mean).to(model.dtype)).sample.float() * 0.5 + 0.5


def pixels(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random pixels [1, 3, T, 16 height, 16 width] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, 3, frames, 16 * height, 16 * width), generator=generator) * 2 - 1


def latents(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, Z, frames, height, width), generator=generator)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 of the deviation from the truth's mean, so that a constant part hides nothing."""
    return ((got - want).norm() / (want - want.mean()).norm()).item()


class ThreadMesh:
    """One of `size` ranks that are threads of this process; messages between pairs are queues."""

    def __init__(self, rank: int, size: int, lines: dict, halo: bool) -> None:
        self.rank, self.world_size, self.lines, self.halo = rank, size, lines, halo
        self.device = torch.device("cpu")
        self.exchanges = 0

    def _send(self, to: int, value: torch.Tensor | None) -> None:
        self.lines[self.rank, to].put(None if value is None else value.clone())

    def _receive(self, source: int) -> torch.Tensor | None:
        return self.lines[source, self.rank].get(timeout=TIMEOUT_S)

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        assert axis == "world"
        for rank in range(self.world_size):
            self._send(rank, x)
        return torch.stack([self._receive(rank) for rank in range(self.world_size)])

    def exchange_edges(
        self, first: torch.Tensor | None, last: torch.Tensor | None, *, among: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        count = self.world_size if among is None else among
        self.exchanges += 1
        if self.rank >= count or not self.halo:
            return None, None
        if self.rank > 0:
            self._send(self.rank - 1, first)
        if self.rank + 1 < count:
            self._send(self.rank + 1, last)
        before = self._receive(self.rank - 1) if self.rank > 0 else None
        after = self._receive(self.rank + 1) if self.rank + 1 < count else None
        return before, after


def on_ranks(size: int, job: Callable[[ThreadMesh], Any], *, halo: bool = True) -> list[Any]:
    """job(mesh) on `size` ranks at once -> their results; the first exception is raised here."""
    lines = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = job(ThreadMesh(rank, size, lines, halo))
        except BaseException as exception:
            errors.append(exception)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
