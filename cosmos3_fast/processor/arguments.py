"""The types that the processor's arguments may have; their values are checked where they are used.

Those that are missing here (names of a table, the action's width, frame indexes) are checked whole
where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cosmos3_fast.numeric import is_finite, is_integer
from cosmos3_fast.tokenizer import check_unicode

_Kind = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _is_device(value: Any) -> bool:
    try:
        named = isinstance(value, (str, torch.device))
        return named and torch.device(value).type in ("cpu", "cuda")
    except RuntimeError:  # torch's answer to an unknown name
        return False


def _or_none(kind: _Kind) -> _Kind:
    what, fits = kind
    return f"{what} or None", lambda value: value is None or fits(value)


_INTEGER: _Kind = ("an integer", is_integer)
_TEXT: _Kind = ("text", lambda value: isinstance(value, str))
_PATH: _Kind = (
    "a path",
    lambda value: isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)),
)
_FLAG: _Kind = ("True or False", lambda value: isinstance(value, (bool, np.bool_)))
ARGUMENTS: dict[str, _Kind] = {
    "tokenizer_name_or_path": _PATH,
    "height": _INTEGER,
    "width": _INTEGER,
    "num_frames": _or_none(_INTEGER),
    "action_chunk_size": _INTEGER,
    "action_dim": ("a positive integer", lambda value: is_integer(value) and value > 0),
    "negative_prompt": _TEXT,
    "fps": ("a finite number", is_finite),
    "image_size": _or_none(_INTEGER),
    "append_metadata": _FLAG,
    "view_point": _or_none(_TEXT),
    "view_description": _or_none(_TEXT),
    "action_stats_path": _or_none(_PATH),
    "device": ("cpu, cuda or cuda:N", _is_device),
    "params_dtype": (
        "torch.bfloat16, torch.float16 or torch.float32",
        lambda value: isinstance(value, torch.dtype) and value in _DTYPES,
    ),
    "allow_width": _FLAG,
}


def check_arguments(given: Mapping[str, Any]) -> None:
    """ValueError naming the first argument that is not what ARGUMENTS says of it, or is a text
    that UTF-8 cannot hold.
    """
    for name, (what, fits) in ARGUMENTS.items():
        value = given[name]
        if not fits(value):
            raise ValueError(f"{name} must be {what}, got {value!r} ({type(value).__name__})")
    for name in ("negative_prompt", "view_description"):
        check_unicode(given[name] or "", name)
