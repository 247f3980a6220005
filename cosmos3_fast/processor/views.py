"""Composes the camera views of a DROID robot into the one picture that its policy sees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cosmos3_fast.processor.images import holds_negative, load_frames, on_host

DROID_SIZE = (540, 640)


def _stretch(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear without antialias, truncated: uint8 [h,w,3] -> uint8 [height,width,3]."""
    if tuple(frame.shape[:2]) == (height, width):
        return frame
    plane = frame.permute(2, 0, 1)[None].float()
    plane = F.interpolate(plane, size=(height, width), mode="bilinear", align_corners=False)
    return plane[0].permute(1, 2, 0).to(torch.uint8)


def compose_droid_views(wrist: Any, exterior_1: Any, exterior_2: Any) -> torch.Tensor:
    """Wrist camera on top, exterior_1 and exterior_2 below it at half its size: uint8 [540,640,3].

    Each view is what `load_frames` takes (of a clip, the first frame); floats of all three lie in
    [0,1], or in [-1,1] when any is negative. Exteriors are resized to (wrist_h//2, wrist_w//2), the
    whole to 540x640 when it is not that already (docs/model.md, 4).
    """
    views = on_host((wrist, exterior_1, exterior_2))
    signed = holds_negative(views)
    top, left, right = (load_frames(view, 1, signed)[0] for view in views)
    height, width = int(top.shape[0]) // 2, int(top.shape[1]) // 2
    if height < 1 or width < 1 or top.shape[1] % 2:
        raise ValueError(
            f"the wrist view needs at least 2x2 pixels and an even width, got {list(top.shape[:2])}"
        )
    bottom = torch.cat([_stretch(view, height, width) for view in (left, right)], dim=1)
    mosaic = torch.cat([top, bottom])
    return _stretch(mosaic, *DROID_SIZE).contiguous()


def droid_mosaic(mosaic: Any) -> torch.Tensor:
    """A picture already composed of the three views, stretched to uint8 [540,640,3]."""
    return _stretch(load_frames(mosaic, 1)[0], *DROID_SIZE).contiguous()
