"""What the halo tests share: cases, truth, NaN-filled results between guards, ranks inside one
process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.parallel import Symmetric
from cosmos3_fast.parallel_edges import EdgeSlots

BORDER, RIGHT_BOTTOM = (1, 1, 1, 1), (0, 1, 0, 1)
GUARD = 4096  # elements on either side of a result
LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Case:
    """One convolution's input: channels, frames, height, width and how it is padded."""

    name: str
    shape: tuple[int, int, int, int]
    prologue: str = "norm_silu"
    history: int = 2
    pad: tuple[int, int, int, int] = BORDER
    bias: bool = True


# D on one GPU: latents 9 x 33 x 40, decoder widths 1024, 1024, 512, 256, frames 9, 17, 33, 33.
DECODER = (
    Case("mid 1024", (1024, 9, 33, 40)),
    Case("up0 phases", (1024, 17, 33, 40), "none", 0),
    Case("up1 1024", (1024, 17, 66, 80)),
    Case("up1 phases", (1024, 33, 66, 80), "none", 0),
    Case("up2 512", (512, 33, 132, 160)),
    Case("up2 phases", (512, 33, 132, 160), "none", 0),
    Case("up3 256", (256, 33, 264, 320)),
    Case("up3 256 no bias", (256, 33, 264, 320), bias=False),
)
ENCODER = (
    Case("enc 160", (160, 5, 264, 320)),
    Case("enc 160 stride 2", (160, 5, 264, 320), "none", 0, RIGHT_BOTTOM),
    Case("enc 320", (320, 5, 132, 160)),
    Case("enc 640", (640, 3, 66, 80)),
    Case("enc frame", (640, 1, 33, 40), history=0),
)
ODD = (
    Case("one pixel", (8, 1, 1, 1)),
    Case("odd 24", (24, 3, 5, 7)),
    Case("odd 48", (48, 2, 33, 3), "none"),
    Case("odd 96 plain", (96, 3, 5, 7), "none", 0),
    Case("scalar 12", (12, 2, 9, 5)),
    Case("scalar 3 plain", (3, 2, 5, 7), "none", 1, (0, 1, 2, 0)),
    Case("scalar 1001", (1001, 1, 3, 5), history=0),
    Case("wide 1280", (1280, 1, 3, 5), pad=(2, 1, 0, 3)),
    Case("wide 2048", (2048, 1, 3, 2)),
    Case("stride 2", (40, 2, 6, 5), "none", 0, RIGHT_BOTTOM),
    Case("no padding", (64, 2, 4, 4), pad=(0, 0, 0, 0), history=0),
    Case("plain copy", (16, 2, 4, 5), "none", bias=False),
    Case("zero pixels", (24, 2, 5, 4), bias=False),
)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """x and what goes with it; some pixels are all zero, one channel is large."""
    generator = torch.Generator(device=device).manual_seed(seed)
    channels = case.shape[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    frames = (1, *case.shape[1:], channels)
    x = torch.randn(frames, generator=generator, device=device, dtype=torch.float32).to(dtype)
    x[..., 0] *= 8
    x[:, :, -1, -1] = 0
    return {
        "x": x.movedim(-1, 1),
        "prologue": case.prologue,
        "gamma": random(channels) if case.prologue == "norm_silu" else None,
        "bias": random(channels) if case.bias else None,
        "history": case.history,
        "pad": case.pad,
    }


class Guarded:
    """A result of NaN between guards of NaN: what is not written shows, and so does what is too
    much.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: str) -> None:
        size = shape.numel()
        self.buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        batch, channels, *rest = shape
        body = self.buffer[GUARD : GUARD + size].view(batch, *rest, channels)
        self.out = body.movedim(-1, 1)

    def intact(self) -> bool:
        """Nothing outside the result was written."""
        return bool(self.buffer[:GUARD].isnan().all() and self.buffer[-GUARD:].isnan().all())


def result_shape(case: Case) -> torch.Size:
    channels, frames, height, width = case.shape
    left, right, top, bottom = case.pad
    shape = (1, channels, case.history + frames, top + height + bottom, left + width + right)
    return torch.Size(shape)


def errors(result: torch.Tensor, case_inputs: dict, **edges: torch.Tensor) -> tuple[float, float]:
    """Largest error of a result, and of the eager reference at its dtype, against float64."""
    eager = reference_conv.conv_input(**case_inputs, **edges)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case_inputs.items()}
    truth = reference_conv.conv_input(**wide, **{k: v.double() for k, v in edges.items()})
    return tuple(_distance(y, truth) for y in (result, eager))  # type: ignore[return-value]


def _distance(y: torch.Tensor, truth: torch.Tensor) -> float:
    difference = (y.double() - truth).abs()
    return torch.where(difference.isnan(), torch.inf, difference).max().item()


def limit(dtype: torch.dtype, eager: float) -> float:
    """Twice eager's own error; in float32, where that may be nearly none, at least two ulp of a
    value of 16: norms of SiLUs here reach some 18.
    """
    return max(2 * eager, 2 * 16 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0)


@dataclass
class Ranks:
    """Ranks of one process on one device: each has slots that the others address."""

    count: int
    slot_bytes: int
    deadline: float = 5.0
    device: str = "cpu"
    slots: list[EdgeSlots] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (4 * (-(-self.slot_bytes // 256) * 256) + 256,)
        buffers = [
            torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(self.count)
        ]
        pointers = tuple(b.data_ptr() for b in buffers)
        for rank, buffer in enumerate(buffers):
            part = Symmetric(buffer, pointers, "world")
            mesh = SimpleNamespace(
                rank=rank,
                world_size=self.count,
                device=torch.device(self.device),
                settle=(lambda: None) if self.device == "cpu" else torch.cuda.synchronize,
                symmetric=lambda size, axis, part=part: part,
            )
            self.slots.append(EdgeSlots(mesh, self.slot_bytes, deadline=self.deadline))  # type: ignore[arg-type]


def strip(whole: torch.Tensor, sizes: list[int], rank: int, axis: int) -> torch.Tensor:
    return whole.narrow(axis, sum(sizes[:rank]), sizes[rank])


def strip_result(
    whole: torch.Tensor, sizes: list[int], rank: int, axis: int, case: Case
) -> torch.Tensor:
    """The part of one rank's result that `rank` of several writes, its padding included."""
    border = case.pad[2] + case.pad[3] if axis == 3 else case.pad[0] + case.pad[1]
    return whole.narrow(axis, sum(sizes[:rank]), sizes[rank] + border)


def edge_bytes(case: Case, axis: int, dtype: torch.dtype) -> int:
    channels, frames, height, width = case.shape
    across = width if axis == 3 else height
    return channels * frames * across * max(case.pad) * dtype.itemsize
