"""What runs is a matter of the GPU, the shapes and a table alone; outside it its nearest row."""

from __future__ import annotations

import math

import pytest
import torch

from cosmos3_fast.kernels import attention as att
from cosmos3_fast.kernels import attention_hopper as hopper
from cosmos3_fast.kernels.nearest import nearest

TABLE = {(10, 4): "a", (1000, 4): "b", (1000, 64): "c"}


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((10, 4), "a"),
        ((1000, 64), "c"),
        ((99, 4), "a"),
        ((101, 4), "b"),
        ((1000, 17), "c"),
        ((1000, 15), "b"),
        ((10, 1000), "c"),  # nearer in tokens, but farther over both
        ((0, 0), "a"),
        ((10**9, 1), "b"),
    ],
    ids=str,
)
def test_the_nearest_row_in_log_scale(shape, value):
    assert nearest(TABLE, shape) == value


@pytest.mark.parametrize("row", hopper.ATTENTION_CHOICE, ids=str)
def test_a_measured_shape_gets_its_own_row(row):
    assert hopper.choice(*row) == hopper.ATTENTION_CHOICE[row]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("tokens", [0, 1, 63, 1000, 3093, 10**4])
def test_any_other_shape_gets_the_nearest_row(tokens, group):
    heads = 6 * group

    def ratio(row: tuple[int, int, int]) -> float:
        here = max(tokens, 1), heads, group
        return math.hypot(*(math.log(a / b) for a, b in zip(row, here, strict=True)))

    row = sorted(hopper.ATTENTION_CHOICE, key=ratio)[0]
    assert hopper.choice(tokens, heads, group) == hopper.ATTENTION_CHOICE[row]


def test_every_choice_is_a_tile_or_triton():
    assert set(hopper.ATTENTION_CHOICE.values()) <= {*hopper.TILES, "triton"}


@pytest.mark.parametrize("way", [*hopper.TILES, "triton"])
def test_attention_takes_the_way_of_its_row(way, monkeypatch):
    """The key counts query heads over the batch; what runs gets its row's tile."""
    asked, ran = [], []

    def choice(*key: int) -> str:
        asked.append(key)
        return way

    monkeypatch.setattr(att, "takes", lambda *_: True)
    monkeypatch.setattr(att, "choice", choice)
    monkeypatch.setattr(att, "attention_hopper", lambda *_, out, tile: ran.append(tile))
    monkeypatch.setattr(att, "attention_triton", lambda *_, out: ran.append("triton"))
    q, k = torch.zeros(2, 5, 16, 128), torch.zeros(2, 7, 4, 128)
    und, und_len = torch.zeros(2, 3, 4, 128), torch.ones(2, dtype=torch.int32)
    att.attention(q, k, k, und, und, und_len)
    assert asked == [(5, 32, 4)] and ran == [hopper.TILES.get(way, "triton")]


@pytest.mark.parametrize(("group", "packed"), [(1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (128, 1)])
def test_heads_share_a_tile_if_they_fill_it(group, packed):
    assert hopper.packed(group) == packed


def test_the_hopper_kernel_is_left_alone_without_a_gpu():
    q = torch.zeros(1, 5, 8, 128, dtype=torch.bfloat16)
    assert not hopper.takes(q, q)
