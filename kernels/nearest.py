"""What a table of measurements says of the shapes that it does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(table: Mapping[tuple[int, ...], T], shape: tuple[int, ...]) -> T:
    """The value in the row nearest to `shape` in log scale; a size below 1 counts as 1.

    Nothing but the table and the shape decides.
    """

    def logs(sizes: tuple[int, ...]) -> list[float]:
        return [math.log(max(n, 1)) for n in sizes]

    here = logs(shape)
    return table[min(table, key=lambda row: math.dist(here, logs(row)))]
