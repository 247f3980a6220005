"""From frames of any size to the canvas that the model was trained on (docs/model.md, 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# (H, W) in the order 1:1, 4:3, 3:4, 16:9, 9:16; the first of equally near aspects wins.
TIERS: dict[int, tuple[tuple[int, int], ...]] = {
    256: ((256, 256), (256, 320), (320, 256), (192, 320), (320, 192)),
    480: ((640, 640), (544, 736), (736, 544), (480, 832), (832, 480)),
    704: ((960, 960), (832, 1088), (1088, 832), (704, 1280), (1280, 704)),
    720: ((960, 960), (832, 1104), (1104, 832), (720, 1280), (1280, 720)),
    768: ((1024, 1024), (880, 1184), (1184, 880), (768, 1360), (1360, 768)),
}
LATENT_STRIDE = 16


def nearest_canvas(tier: int, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the tier's canvas whose aspect H/W is nearest to height/width."""
    if tier not in TIERS:
        raise ValueError(f"image_size {tier!r} is no resolution tier; expected one of {[*TIERS]}")
    return min(TIERS[tier], key=lambda size: abs(size[0] / size[1] - height / width))


def content_size(canvas: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(h, w) of the picture inside the canvas: aspect kept, never enlarged, at least 1."""
    scale = min(canvas[0] / height, canvas[1] / width, 1.0)
    return max(1, int(scale * height + 0.5)), max(1, int(scale * width + 0.5))


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialias, in float, clamped and rounded: uint8 [T,H,W,3] -> uint8 [T,*size,3]."""
    if tuple(frames.shape[1:3]) == size:
        return frames
    planes = frames.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size=size, mode="bicubic", align_corners=False, antialias=True)
    return planes.clamp_(0, 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _continue(frames: torch.Tensor, dim: int, extra: int, reflect: bool) -> torch.Tensor:
    """`extra` more rows behind the last: the ones before it, mirrored, or the last repeated."""
    last = frames.shape[dim] - 1
    if reflect:
        tail = frames.narrow(dim, last - extra, extra).flip(dim)
    else:
        tail = frames.narrow(dim, last, 1).repeat_interleave(extra, dim)
    return torch.cat([frames, tail], dim)


def pad(frames: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """Continue bottom and right by reflection: [T,h,w,3] -> [T,H,W,3].

    Edge replication on both sides once a padding is as wide as its content.
    """
    height, width = int(frames.shape[1]), int(frames.shape[2])
    down, right = canvas[0] - height, canvas[1] - width
    reflect = down < height and right < width
    return _continue(_continue(frames, 1, down, reflect), 2, right, reflect)


@dataclass(frozen=True)
class Canvas:
    """Places frames on a canvas: of the nearest aspect in `tier`, or height x width without one.

    Call: uint8 [T,h,w,3] -> (uint8 [T,H,W,3], (content_h, content_w)), on the frames' device.
    ValueError for an unknown tier and for a height or width that 16 does not divide.
    """

    height: int
    width: int
    tier: int | None = None

    def __post_init__(self) -> None:
        if self.tier is not None:
            nearest_canvas(self.tier, 1, 1)
        elif any(side < 1 or side % LATENT_STRIDE for side in (self.height, self.width)):
            raise ValueError(
                f"canvas {self.height}x{self.width}: height and width must be positive multiples "
                f"of {LATENT_STRIDE}"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the canvas for a picture of height x width."""
        if self.tier is None:
            return self.height, self.width
        return nearest_canvas(self.tier, height, width)

    def __call__(self, frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        height, width = int(frames.shape[1]), int(frames.shape[2])
        canvas = self.size(height, width)
        content = content_size(canvas, height, width)
        return pad(resize(frames, content), canvas), content
