"""The pool of edge slots: as few as the largest edge needs, never taken from under a graph.

The exchange itself is tested in test_halo.py; here slots are recorded, on the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from halo_cases import Ranks

from cosmos3_fast import parallel_edges
from cosmos3_fast.parallel_edges import EdgePool, EdgeSlots


class Recorded:
    """Stands for EdgeSlots: what was asked of it, and a failure that a test plants."""

    made: list[Recorded] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, mesh: object, slot_bytes: int, *, among: int, deadline: float) -> None:
        self.slot_bytes, self.among, self.deadline, self.text = slot_bytes, among, deadline, None
        self.made.append(self)

    def failure(self) -> str | None:
        return self.text


@pytest.fixture
def pool(monkeypatch) -> EdgePool:
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(parallel_edges, "EdgeSlots", Recorded)
    return EdgePool(None, deadline=7.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["falling", "rising", "mixed"])
def test_memory_is_bounded_by_the_largest_edge(pool, order):
    sizes = np.random.RandomState(0).randint(1, 10_000_000, 1000)
    sizes = {"falling": np.sort(sizes)[::-1], "rising": np.sort(sizes), "mixed": sizes}[order]
    for nbytes in map(int, sizes):
        assert pool.slots(nbytes, among=4).slot_bytes >= nbytes
    largest = int(sizes.max())
    assert sum(slots.slot_bytes for slots in Recorded.made) < 4 * largest
    assert len(Recorded.made) <= (1 if order == "falling" else largest.bit_length())


def test_slots_that_a_graph_may_hold_stay(pool):
    """A larger edge leaves the smaller slots where they are, and they are used again."""
    first = pool.slots(1000, among=2)
    assert first.slot_bytes == 1024
    assert pool.slots(1025, among=2) is not first
    assert pool.slots(1024, among=2) is first and pool.slots(3, among=2) is first
    assert [slots.slot_bytes for slots in Recorded.made] == [1024, 2048]


def test_holders_have_slots_of_their_own(pool):
    """The ranks of a smaller picture exchange more often than those that hold none of it."""
    two, four = pool.slots(512, among=2), pool.slots(512, among=4)
    assert (two.among, four.among, two.deadline) == (2, 4, 7.0)
    assert pool.slots(512, among=2) is two and len(Recorded.made) == 2


def test_a_failure_of_any_slots_is_the_pools(pool):
    pool.slots(512, among=2)
    late = pool.slots(4096, among=2)
    assert pool.failure() is None
    late.text = "the edges of rank 1 did not come"
    assert pool.failure() == "the edges of rank 1 did not come"


@pytest.mark.parametrize(
    ("rank", "neighbours"), [(0, (None, 1)), (1, (0, None)), (2, (None, None)), (3, (None, None))]
)
def test_ranks_without_a_strip_have_no_neighbours(rank, neighbours):
    mesh = Ranks(4, 512).slots[rank].mesh
    slots = EdgeSlots(mesh, 512, among=2)
    assert (slots.before, slots.after) == neighbours


def test_real_slots_are_made_at_the_next_power_of_two():
    mesh = Ranks(1, 1 << 20).slots[0].mesh
    pool = EdgePool(mesh, deadline=0.5)
    slots = pool.slots(300_000, among=1)
    assert (slots.slot_bytes, slots.deadline_ns, slots.neighbours) == (1 << 19, 500_000_000, 0)
    assert pool.failure() is None and slots.state.device == torch.device("cpu")
