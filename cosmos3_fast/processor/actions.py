"""Action rows: checks, length and width rules, the JSON forms (docs/model.md, section 5)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos3_fast.numeric import is_number

logger = logging.getLogger(__name__)
_DEPTH = 8  # of nested lists; more than any form of actions has


def action_rows(actions: Any, name: str = "cond_action") -> torch.Tensor:
    """float32 [T,D] from a tensor, array or nested list of shape [T,D] or [1,T,D].

    ValueError for ragged rows, for what is no number (booleans and text included), another shape,
    no row, and values not finite.
    """
    check_numbers(actions, name)
    try:
        if isinstance(actions, torch.Tensor):
            rows = actions.detach().to("cpu", torch.float32)
        else:
            rows = torch.from_numpy(np.array(actions, dtype=np.float64)).float()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}{_ragged(actions)}: {error}") from error
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name} must have shape [T, D] or [1, T, D], got {list(rows.shape)}")
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        value = float(rows[row, column])
        raise ValueError(
            f"{name} has {len(bad)} values that are not finite, the first is {value} in row {row}, "
            f"column {column}"
        )
    return rows


def check_numbers(values: Any, name: str) -> None:
    """ValueError naming the first leaf of nested lists, or the dtype of an array, that is no real
    number. Booleans are none. ValueError for lists nested deeper than rows of chunks are.
    """
    for place, leaf in _leaves(values, (), name):
        if isinstance(leaf, torch.Tensor):
            numeric = not leaf.dtype.is_complex and leaf.dtype != torch.bool
        elif hasattr(leaf, "__array__"):
            numeric = np.asarray(leaf).dtype.kind in "iuf"
        else:
            numeric = is_number(leaf)
        if not numeric:
            dtype = getattr(leaf, "dtype", None)
            came = f"{leaf!r:.40} ({type(leaf).__name__})" if dtype is None else f"dtype {dtype}"
            where = " at " + "".join(f"[{index}]" for index in place) if place else ""
            raise ValueError(f"{name} is not numeric: expected numbers, got {came}{where}")


def _leaves(
    values: Any, place: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """What nested lists hold, each with its indexes."""
    if isinstance(values, (list, tuple)):
        if len(place) > _DEPTH:
            raise ValueError(f"{name} is nested more than {_DEPTH} lists deep")
        for index, value in enumerate(values):
            yield from _leaves(value, (*place, index), name)
    else:
        yield place, values


def _ragged(actions: Any) -> str:
    """The first two different row lengths, for the error text."""
    if not isinstance(actions, (list, tuple)):
        return " is not numeric"
    lengths = [len(row) if isinstance(row, (list, tuple)) else None for row in actions]
    for index, length in enumerate(lengths):
        if length != lengths[0]:
            return f" is ragged: row 0 has {lengths[0]} values, row {index} has {length}"
    return " is not numeric"


@dataclass(frozen=True)
class ActionPad:
    """Fits rows into the chunk: (actions, raw_action_dim) -> float32 [1,chunk,action_dim].

    Shorter than the chunk repeats the last row, longer is cut, both with a warning; channels are
    zero-padded to action_dim. ValueError for more columns than raw_action_dim; fewer are padded,
    with a warning.
    """

    chunk: int
    action_dim: int

    def __call__(self, actions: Any, raw_action_dim: int) -> torch.Tensor:
        rows = action_rows(actions)
        count, width = rows.shape
        if width > raw_action_dim:
            raise ValueError(
                f"cond_action has {width} columns, more than raw_action_dim {raw_action_dim}"
            )
        if width < raw_action_dim:
            logger.warning(
                "cond_action has %d of %d columns; the others are 0", width, raw_action_dim
            )
        if count < self.chunk:
            logger.warning("cond_action has %d of %d rows; the last is repeated", count, self.chunk)
            rows = torch.cat([rows, rows[-1:].expand(self.chunk - count, width)])
        if count > self.chunk:
            logger.warning("cond_action has %d rows; the first %d are used", count, self.chunk)
        padded = torch.zeros(1, self.chunk, self.action_dim, dtype=torch.float32, device="cpu")
        padded[0, :, :width] = rows[: self.chunk]
        return padded


def parse_actions(
    document: Any, index: int | None = None, name: str = "action file"
) -> torch.Tensor:
    """float32 [T,D] from one of the JSON forms (already parsed).

    `{"shape", "dtype", "data"}`, `{"action_chunks": [...]}` (the chunk at `index`, None: the first)
    or a bare `[T][D]` list. ValueError when the form, the shape or a value is wrong.
    """
    if isinstance(document, dict) and "action_chunks" in document:
        chunks, index = document["action_chunks"], 0 if index is None else index
        if not isinstance(chunks, list) or not 0 <= index < len(chunks):
            held = len(chunks) if isinstance(chunks, list) else type(chunks).__name__
            raise ValueError(f"{name}: action chunk {index} asked for, action_chunks holds {held}")
        chunk, name = chunks[index], f"{name}: action_chunks[{index}]"
        if isinstance(chunk, dict) and "action_chunks" in chunk:
            raise ValueError(f"{name} must hold rows, got action_chunks again")
        return parse_actions(chunk, None, name)
    if index is not None:
        logger.warning("%s holds no action_chunks: chunk %d of what it holds is all", name, index)
    if isinstance(document, dict) and "data" in document:
        rows = action_rows(document["data"], name)
        shape = document.get("shape", list(rows.shape))
        if shape not in ([*rows.shape], [1, *rows.shape]):
            raise ValueError(f"{name}: shape says {shape}, data has {list(rows.shape)}")
        return rows
    if isinstance(document, list):
        return action_rows(document, name)
    raise ValueError(
        f"{name}: expected an object with data or action_chunks, or a list of rows; "
        f"got {sorted(document) if isinstance(document, dict) else type(document).__name__}"
    )


def read_actions(path: str | os.PathLike[str], index: int | None = None) -> torch.Tensor:
    """float32 [T,D] from a file in any of `parse_actions`' forms. ValueError names the file."""
    name = os.fspath(path)
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read actions from {name!r}: {error}") from error
    return parse_actions(document, index, repr(name))


def write_actions(path: str | os.PathLike[str], actions: Any) -> None:
    """Write [T,D] or [1,T,D] as `{"shape": [1,T,D], "dtype": "float32", "data": [T][D]}`."""
    rows = action_rows(actions, "action")
    document = {"shape": [1, *rows.shape], "dtype": "float32", "data": rows.tolist()}
    Path(path).write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
