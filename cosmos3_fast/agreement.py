"""All ranks hold the same request, configuration and checkpoint, or all raise the same error.

One gather of a short string per request on the host; the fields themselves travel only when the
strings differ. A rank whose own input is bad still joins, with an error word, so nobody waits for
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cosmos3_fast.launch import ranks_text
from cosmos3_fast.parallel import Mesh

_LONGEST = 40  # characters of a value that are shown as they are; longer ones become a digest
_ABSENT = "absent"


def digest(value: Any) -> str:
    """A text that is equal for equal values: the value itself when short, else a sha256.

    Tensors (any device; a cuda tensor is copied to the host, which waits for it) and arrays count
    by dtype, shape and bytes, not by device or strides. Also dataclasses, mappings, any sequence,
    None, numbers, strings and torch dtypes; anything else raises TypeError.
    """
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().cpu().flatten()
        return _bytes_digest(str(value.dtype)[6:], value.shape, flat.view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        items = np.ascontiguousarray(value).reshape(-1)
        return _bytes_digest(str(value.dtype), value.shape, items.view(np.uint8))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        text = repr(value)
    elif isinstance(value, Sequence):
        text = f"[{', '.join(map(digest, value))}]"
    elif dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        text = json.dumps(facts(value), sort_keys=True)
    else:
        raise TypeError(f"no digest for a {type(value).__name__}")
    return text if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytes_digest(dtype: str, shape: Sequence[int], data: np.ndarray) -> str:
    words = hashlib.sha256(data.data if data.size else b"").hexdigest()
    return f"{dtype}{list(shape)} {words[:16]}"


def facts(value: Any, prefix: str = "", skip: Collection[str] = ()) -> dict[str, str]:
    """The fields of a dataclass or mapping as {prefix + name: digest}, without those in `skip`.

    `skip` is for fields that differ by right, such as a device.
    """
    if dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        items = [(str(name), item) for name, item in value.items()]
    return {prefix + name: digest(item) for name, item in items if name not in skip}


def agree(
    mesh: Mesh,
    held: Mapping[str, str],
    *,
    error: BaseException | str | None = None,
    state: Mapping[str, bool | None] | None = None,
) -> dict[str, bool | None]:
    """Compare `held` ({field: digest}, see `facts`) over all ranks; a collective on the host.

    `error`: what went wrong on this rank before; then `held` and `state` count for nothing.
    `state`: what this rank holds (prompt cached, graph captured), None where it does not need it;
    the same names on all ranks. Returns {name: True or False where the ranks that need it say so
    alike (True where none does), None where they differ}.

    Raises the same ValueError on every rank: the text of every failed rank, or the fields that
    differ with each value and its ranks. After it every rank is ready for the next request.
    """
    word = "" if error is None else _word(error)
    whole = hashlib.sha256(json.dumps(dict(held), sort_keys=True).encode()).hexdigest()[:32]
    flags = dict(state or {})
    cards = mesh.gather_objects([word, whole, flags])
    words = [card[0] for card in cards]
    if mesh.world_size == 1 and isinstance(error, BaseException):
        raise error
    if any(words):
        text = "; ".join(f"rank {rank}: {said}" for rank, said in enumerate(words) if said)
        cause = error if isinstance(error, BaseException) else None
        raise ValueError(text) from cause
    if len({card[1] for card in cards}) > 1:
        raise ValueError(f"the ranks disagree: {_differences(mesh.gather_objects(dict(held)))}")
    states = [card[2] for card in cards]
    assert all(set(one) == set(flags) for one in states), f"state differs in its names: {states}"
    said = {name: {one[name] for one in states} - {None} for name in flags}
    return {
        name: None if len(all_said) > 1 else False not in all_said
        for name, all_said in said.items()
    }


def _word(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error or "unknown error"
    text = str(error)
    return text if text and type(error) is ValueError else f"{type(error).__name__}: {text}"


def _differences(held: list[dict[str, str]]) -> str:
    """ "seed is 42 on ranks 0, 1 and 43 on rank 2; …" over all fields that differ."""
    parts = []
    for name in sorted(set().union(*held)):
        holders: dict[str, list[int]] = {}
        for rank, one in enumerate(held):
            holders.setdefault(one.get(name, _ABSENT), []).append(rank)
        if len(holders) > 1:
            said = " and ".join(f"{value} on {ranks_text(r)}" for value, r in holders.items())
            parts.append(f"{name} is {said}")
    return "; ".join(parts)
