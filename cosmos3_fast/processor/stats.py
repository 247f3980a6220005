"""From the model's normalised actions back to the robot's units (MODEL.md 5)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# normalisation -> (block of the stats file, name of the two vectors)
_BLOCKS = {
    "meanstd": ("global", "mean", "std"),
    "minmax": ("global", "min", "max"),
    "quantile": ("global", "q01", "q99"),
    "quantile_rot": ("global_raw", "q01", "q99"),
}
NORMALIZATIONS = tuple(_BLOCKS)


@dataclass(frozen=True, eq=False)
class Denormalize:
    """x -> x · scale + offset per channel, cut to the width of the stats (float32 [D] each).

    Call: [..., >= D] -> float32 [..., D]. ValueError when the actions are narrower than the stats.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    shift: float = 0.0

    def __call__(self, action: torch.Tensor) -> torch.Tensor:
        width = self.scale.shape[0]
        if action.shape[-1] < width:
            raise ValueError(f"action stats have {width} channels, actions {action.shape[-1]}")
        cut = action[..., :width].float()
        if self.shift:
            return (cut + self.shift) / 2 * self.scale + self.offset
        return cut * self.scale + self.offset


def _vector(stats: dict[str, Any], key: str, name: str) -> torch.Tensor:
    if key not in stats:
        raise ValueError(f"action stats {name} lack {key!r}; they hold {sorted(stats)}")
    try:
        vector = torch.tensor(stats[key], dtype=torch.float32, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"action stats {name}: {key!r} is no list of numbers") from error
    if vector.ndim != 1 or not len(vector) or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"action stats {name}: {key!r} must be a flat list of finite numbers")
    return vector


def load_denormalize(path: str | os.PathLike[str], normalization: str) -> Denormalize:
    """Denormalisation from a stats file: meanstd, minmax, quantile or quantile_rot.

    meanstd: x·std + mean with std >= 1e-8; the others (x+1)/2·range + low with range >= 1e-6.
    ValueError naming the file for an unknown normalisation, unreadable or incomplete stats.
    """
    if normalization not in _BLOCKS:
        raise ValueError(f"action_normalization {normalization!r}; expected one of {list(_BLOCKS)}")
    name = repr(os.fspath(path))
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read action stats from {name}: {error}") from error
    block, first, second = _BLOCKS[normalization]
    stats = document.get(block, document) if isinstance(document, dict) else None
    if not isinstance(stats, dict):
        raise ValueError(f"action stats {name} must hold an object, got {type(document).__name__}")
    a, b = _vector(stats, first, name), _vector(stats, second, name)
    if a.shape != b.shape:
        raise ValueError(f"action stats {name}: {first} has {len(a)} values, {second} {len(b)}")
    if normalization == "meanstd":
        return Denormalize(scale=b.clamp(min=1e-8), offset=a)
    return Denormalize(scale=(b - a).clamp(min=1e-6), offset=a, shift=1.0)
