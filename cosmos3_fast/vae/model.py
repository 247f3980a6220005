"""WanVAE: pixels to normalised latents and back, on one rank or in strips over all of them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import VAEConfig
from cosmos3_fast.modes import own_settings
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_edges import EdgePool
from cosmos3_fast.vae.blocks import Place, PointConv
from cosmos3_fast.vae.decoder import Decoder, unpatchify
from cosmos3_fast.vae.encoder import Encoder, patchify
from cosmos3_fast.vae.strips import Flow, Strips

MAX_ELEMENTS = 2**31 - 1  # of one convolution's input: cuDNN indexes with 32 bits
# Tensors of the widest convolution's size alive at once: the block's input, the residual, the
# convolution before, and the reference prologue's float32 and rounded values (or the padded input
# and the output). An upsampling holds at most 3.5: its four phases and its result, each less than
# the next stage's input; the block's input, no larger; the small picture and its padded copy, a
# quarter each.
LIVE_TENSORS = 6


class WanVAE(nn.Module):
    """Wan2.2's VAE; its parameters are uninitialised until `slots` are filled.

    `dtype`: of weights and activations; latents, norms and pending biases are float32. `mesh`: the
    image is cut over all of its ranks, each of which calls with equal arguments; None is one rank.
    `decoder=False` leaves the decoder out. `max_bytes`: activation memory a pass may plan with;
    longer clips run in groups of latent frames, which also keeps every convolution's input within
    2^31 - 1 elements (D in one pass: 1.5e9). `deadline`: seconds that a kernel waits for a
    neighbour's edges. Raises ValueError for a config whose factors do not agree.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        mesh: Mesh | None = None,
        decoder: bool = True,
        max_bytes: int = 48 << 30,
        deadline: float = 30.0,
    ) -> None:
        super().__init__()
        _check(config)
        place = Place(torch.device(device), dtype)
        self.config, self.dtype, self.max_bytes = config, dtype, max_bytes
        self.mesh = Mesh.single(place.device) if mesh is None else mesh
        self._edges = EdgePool(self.mesh, deadline)
        self.encoder = Encoder(config, place)
        self.quant_conv = PointConv(place.wide, 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1)
        self.decoder = Decoder(config, place) if decoder else None
        self.post_quant_conv = (
            PointConv(place.wide, config.z_dim, config.z_dim, 1, 1, 1) if decoder else None
        )
        self.unused: tuple[str, ...] = () if decoder else ("decoder.", "post_quant_conv.")
        moments = (config.latents_mean, config.latents_std)
        self._mean, self._std = (
            torch.tensor(m, dtype=place.wide.dtype, device=place.device).view(-1, 1, 1, 1)
            for m in moments
        )

    def slots(self) -> dict[str, Slot]:
        """diffusers' checkpoint key -> where its tensor goes."""
        return {
            name: Slot(weight.detach(), tuple(weight.shape))
            for name, weight in self.named_parameters()
        }

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [1, 3, 1 + 4 k, 16 h, 16 w] -> latents [1, z, 1 + k, h, w] float32.

        Pixels lie in [-1, 1]; latents are the normalised means. Latent frame i depends on the first
        1 + 4 i pixel frames alone. The result is whole on every rank. One frame runs 2-D
        convolutions with the last temporal tap: its history is zero. ValueError for another shape.
        """
        time, space = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        batch, channels, frames, height, width = _shape5(pixels, "pixels")
        empty = min(frames, height, width) < 1
        ragged = (frames - 1) % time or height % space or width % space
        if batch != 1 or channels != 3 or empty or ragged:
            raise ValueError(
                f"pixels must be [1, 3, 1 + {time} k, {space} h, {space} w], "
                f"got {list(pixels.shape)}"
            )
        strips = Strips.plan(self.mesh, height // space, width // space)
        patches = patchify(pixels.to(self.dtype), self.config.patch_size)
        groups = self._groups(
            self.encoder, strips, 1 + (frames - 1) // time, height // space, width // space
        )
        strips = self._with_slots(self.encoder, strips, groups, height // space, width // space)
        history: dict | None = {} if len(groups) > 1 else None
        parts = []
        with _cudnn(pixels.device, search=False):
            for start, stop in groups:
                flow = Flow(strips, first=start == 0, history=history)
                part = patches[:, :, max(0, time * start - time + 1) : time * stop - time + 1]
                moments = self.encoder(part, flow)
                parts.append(self._mean_of(moments.x, moments.bias))
        return strips.gather(torch.cat(parts, 2)).contiguous()

    @overload
    def decode(self, latents: torch.Tensor, *, gather: Literal["all"] = "all") -> torch.Tensor: ...

    @overload
    def decode(self, latents: torch.Tensor, *, gather: str) -> torch.Tensor | None: ...

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, gather: str = "all") -> torch.Tensor | None:
        """latents [1, z, t, h, w] -> pixels [1, 3, 1 + 4 (t - 1), 16 h, 16 w] float32.

        Latents are normalised, float32; pixels lie in [0, 1]. `gather`: "all" gives the pixels on
        every rank, "rank0" on rank 0 and None elsewhere. ValueError for another shape or a VAE
        without decoder.
        """
        if self.decoder is None or self.post_quant_conv is None:
            raise ValueError("this VAE was built without its decoder")
        if gather not in ("all", "rank0"):
            raise ValueError(f"gather must be 'all' or 'rank0', got {gather!r}")
        batch, channels, frames, height, width = _shape5(latents, "latents")
        if batch != 1 or channels != self.config.z_dim or min(frames, height, width) < 1:
            raise ValueError(
                f"latents must be [1, {self.config.z_dim}, t, h, w], got {list(latents.shape)}"
            )
        strips = Strips.plan(self.mesh, height, width)
        raw = latents.to(self._mean.dtype) * self._std + self._mean
        whole = self.post_quant_conv(raw.movedim(1, -1)).to(self.dtype).movedim(-1, 1)
        groups = self._groups(self.decoder, strips, frames, height, width)
        strips = self._with_slots(self.decoder, strips, groups, height, width)
        history: dict | None = {} if len(groups) > 1 else None
        parts = []
        with _cudnn(latents.device, search=True):
            for start, stop in groups:
                flow = Flow(strips, first=start == 0, history=history)
                parts.append(self.decoder(whole[:, :, start:stop], flow))
        patches = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts], 2)
        patches = strips.gather(patches, self.decoder.scale)
        if gather == "rank0" and self.mesh.rank != 0:
            return None
        return self._to_pixels(patches, parts[0].bias)

    def _mean_of(self, moments: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Normalised mean of moments [1, 2 z, T, H, W] (+ bias), in float32."""
        rows = moments.movedim(1, -1).to(self._mean.dtype) + bias
        mean = self.quant_conv(rows)[..., : self.config.z_dim].movedim(-1, 1)
        return ((mean - self._mean) / self._std).float()

    def _to_pixels(self, patches: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        pixels = unpatchify(patches.to(bias.dtype) + bias.view(-1, 1, 1, 1), self.config.patch_size)
        return pixels.clamp_(-1, 1).mul_(0.5).add_(0.5).float()

    def failure(self) -> str | None:
        """Which neighbours' edges did not come before the deadline; None if all did. Waits for the
        device. After a failure no result is to be used.
        """
        return self._edges.failure()

    def check_size(self, frames: int, height: int, width: int, *, decode: bool) -> None:
        """ValueError where a clip of so many latent frames and latent pixels is too large to be
        encoded, or decoded, by these ranks; equal on all of them.
        """
        net = self.decoder if decode else self.encoder
        assert net is not None, "a VAE without its decoder"
        self._require_indices(net, Strips.plan(self.mesh, height, width), frames, height, width)

    def _require_indices(
        self, net: Encoder | Decoder, strips: Strips, frames: int, height: int, width: int
    ) -> None:
        """ValueError for a picture of which not even one latent frame fits cuDNN's indices."""
        rows = strips.local(height, width)
        largest = max(elements for elements, _ in net.sizes(1, *rows, first=frames == 1))
        if largest > MAX_ELEMENTS:
            space = self.config.scale_factor_spatial
            raise ValueError(
                f"pixels of {space * height} x {space * width} over {strips.holders} rank"
                f"{'s' * (strips.holders > 1)} are too many for one frame: a convolution's input "
                f"would hold {largest} elements, more than {MAX_ELEMENTS}"
            )

    def _with_slots(
        self,
        net: Encoder | Decoder,
        strips: Strips,
        groups: list[tuple[int, int]],
        height: int,
        width: int,
    ) -> Strips:
        """The strips with peer memory for the largest edge of a pass, where kernels use it.

        All ranks take the same. The first pass of a size must not be inside a capture: new ones
        may be made.
        """
        kernels = ops.peer_kernels(self.mesh.device) and self.mesh.peers("world")
        if strips.holders == 1 or not kernels:
            return strips
        frames = max(stop - start for start, stop in groups)
        rows = (0, width) if strips.axis == 3 else (height, 0)  # what is left is the two borders
        sizes = net.sizes(frames, *rows, first=False)
        nbytes = max(elements // 2 for elements, _ in sizes) * self.dtype.itemsize
        return replace(strips, slots=self._edges.slots(nbytes, strips.holders))

    def _groups(
        self, net: Encoder | Decoder, strips: Strips, frames: int, height: int, width: int
    ) -> list[tuple[int, int]]:
        """Ranges of latent frames, as even as can be, within the bounds; equal on all ranks.
        ValueError where there are none.
        """
        self._require_indices(net, strips, frames, height, width)
        rows = strips.local(height, width)
        most = next((n for n in range(frames, 1, -1) if self._fits(net, n, frames, rows)), 1)
        count = -(-frames // most)
        base, rest = divmod(frames, count)
        ends = [base * i + min(i, rest) for i in range(count + 1)]
        return list(itertools.pairwise(ends))

    def _fits(self, net: Encoder | Decoder, group: int, frames: int, rows: tuple[int, int]) -> bool:
        """Whether any group of so many latent frames, of a strip of size `rows`, is one pass."""
        sizes = list(net.sizes(group, *rows, first=group == frames))
        largest = max(elements for elements, _ in sizes)
        carried = 2 * sum(plane for _, plane in sizes) if group < frames else 0
        planned = (LIVE_TENSORS * largest + carried) * self.dtype.itemsize
        return largest <= MAX_ELEMENTS and planned <= self.max_bytes


def _shape5(x: torch.Tensor, name: str) -> torch.Size:
    if x.ndim != 5:
        raise ValueError(f"{name} must have 5 dimensions, got {list(x.shape)}")
    return x.shape


def _check(config: VAEConfig) -> None:
    """The config's sizes and factors must follow from one another."""
    stages = len(config.dim_mult)
    expected = {
        "in_channels": 3 * config.patch_size**2,
        "out_channels": 3 * config.patch_size**2,
        "scale_factor_spatial": config.patch_size * 2 ** (stages - 1),
        "scale_factor_temporal": 2 ** sum(config.temperal_downsample[: stages - 1]),
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"vae config: {name} must be {value}, got {getattr(config, name)}")
    if len(config.temperal_downsample) < stages - 1:
        raise ValueError(
            f"vae config: temperal_downsample needs {stages - 1} members, "
            f"got {config.temperal_downsample}"
        )


# cuDNN's flags are the process's, and two engines may be at work in two threads.
_CUDNN = threading.Lock()


@contextlib.contextmanager
def _cudnn(device: torch.device, *, search: bool) -> Iterator[None]:
    """cuDNN on a GPU: float32 stays float32, results repeat; `search` times its algorithms. One
    thread at a time issues its work here.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with _CUDNN, own_settings:
        before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
        try:
            cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, search, True
            yield
        finally:
            cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before
