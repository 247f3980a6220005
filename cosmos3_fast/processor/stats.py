"""Between the robot's units and the model's normalised actions (docs/model.md, section 5)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast.processor.actions import check_numbers

# normalisation -> (block of the stats file, name of the two vectors)
_BLOCKS = {
    "meanstd": ("global", "mean", "std"),
    "minmax": ("global", "min", "max"),
    "quantile": ("global", "q01", "q99"),
    "quantile_rot": ("global_raw", "q01", "q99"),
}
NORMALIZATIONS = tuple(_BLOCKS)


@dataclass(frozen=True, eq=False)
class ActionStats:
    """Statistics of D channels (float32 [D] each): robot = model · scale + offset, or with `shift`
    1 robot = (model + 1) / 2 · scale + offset.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    shift: float = 0.0

    @property
    def width(self) -> int:
        """D."""
        return int(self.scale.shape[0])

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        """Robot to model, the inverse of `denormalize`: [..., n <= D] -> float32 [..., n].

        ValueError for more channels than the statistics have.
        """
        width = rows.shape[-1]
        if width > self.width:
            raise ValueError(f"cond_action has {width} columns, the action stats {self.width}")
        scale, offset = self.scale[:width].double(), self.offset[:width].double()
        unit = (rows.double() - offset) / scale
        return (unit * 2 - self.shift if self.shift else unit).float()

    def denormalize(self, action: torch.Tensor) -> torch.Tensor:
        """Model to robot, cut to the width of the statistics: [..., >= D] -> float32 [..., D].

        ValueError for fewer channels than the statistics have.
        """
        width = self.width
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
        check_numbers(stats[key], key)
        vector = torch.tensor(stats[key], dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"action stats {name}: {key!r} is no list of numbers: {error}") from error
    if vector.ndim != 1 or not len(vector) or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"action stats {name}: {key!r} must be a flat list of finite numbers")
    return vector


def check_normalization(normalization: str) -> None:
    """ValueError for a name that is not in NORMALIZATIONS."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"action_normalization {normalization!r}; expected one of {list(NORMALIZATIONS)}"
        )


def load_stats(path: str | os.PathLike[str], normalization: str) -> ActionStats:
    """Statistics from a file, for meanstd, minmax, quantile or quantile_rot.

    meanstd: x·std + mean with std >= 1e-8; the others (x+1)/2·range + low with range >= 1e-6.
    ValueError for an unknown normalisation, and naming the file for unreadable or incomplete stats,
    a negative std and a range whose end lies below its beginning.
    """
    check_normalization(normalization)
    name = repr(os.fspath(path))
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read action stats from {name}: {error}") from error
    block, first, second = _BLOCKS[normalization]
    stats = document.get(block, document) if isinstance(document, dict) else None
    if not isinstance(stats, dict):
        raise ValueError(f"action stats {name} must hold an object, got {type(document).__name__}")
    a, b = _vector(stats, first, name), _vector(stats, second, name)
    if a.shape != b.shape:
        raise ValueError(f"action stats {name}: {first} has {len(a)} values, {second} {len(b)}")
    low, bound = (torch.zeros_like(b), "0") if normalization == "meanstd" else (a, first)
    _check_order(low, b, f"action stats {name}: {second} must not be below {bound}")
    if normalization == "meanstd":
        return ActionStats(scale=b.clamp(min=1e-8), offset=a)
    return ActionStats(scale=(b - a).clamp(min=1e-6), offset=a, shift=1.0)


def _check_order(low: torch.Tensor, high: torch.Tensor, words: str) -> None:
    """ValueError with `words` for the first channel in which high < low; [D] each."""
    for channel, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if b < a:
            raise ValueError(f"{words}, got {b:g} < {a:g} in channel {channel}")
