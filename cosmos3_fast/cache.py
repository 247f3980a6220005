"""A small bounded cache: the least recently used entry goes, and is given back properly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """At most `bound` values by key. `drop` is called on a value that leaves."""

    def __init__(self, bound: int, drop: Callable[[V], None] = lambda _: None) -> None:
        self._bound, self._drop = bound, drop
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made if missing; room is made first, so two never share memory."""
        if key not in self._values:
            while len(self._values) >= self._bound:
                self.forget(next(iter(self._values)))
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def peek(self, key: Hashable) -> V | None:
        """The value if it is there; it does not count as used."""
        return self._values.get(key)

    def forget(self, key: Hashable) -> None:
        """Drop one value if it is there."""
        if key in self._values:
            self._drop(self._values.pop(key))

    def clear(self) -> None:
        """Drop every value."""
        for key in tuple(self._values):
            self.forget(key)
