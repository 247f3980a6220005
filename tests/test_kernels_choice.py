"""Which attention runs, and in which tiles, is a matter of the GPU and the shapes alone."""

from __future__ import annotations

import pytest
import torch

from cosmos3_fast.kernels import attention_hopper as hopper
from cosmos3_fast.kernels.hopper_roles import ROWS

PROCESSORS = 132  # of an H200


def longest(tile: hopper.HopperTile, tokens: int, heads: int, group: int) -> int:
    """Rows of the longest program, counted out tile by tile."""
    pack = hopper.packed(group)
    rows = tile.consumers * ROWS
    tiles = [rows] * (-(-tokens * pack // rows) * (heads // pack))
    return max(sum(tiles[i::PROCESSORS]) for i in range(PROCESSORS))


@pytest.mark.parametrize(
    ("shape", "consumers"),
    [
        ((3093, 32, 4), 2),
        ((3093, 64, 4), 2),
        ((3093, 16, 4), 2),
        ((3093, 8, 4), 3),
        ((1966, 32, 4), 2),
        ((406, 32, 4), 2),
    ],
    ids=str,
)
def test_a_measured_shape_gets_the_tile_found_faster(shape, consumers):
    assert hopper.tile_for(*shape, PROCESSORS).consumers == consumers


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 63, 1000, 3093, 10**4])
def test_no_tile_makes_a_shorter_longest_program(tokens, group):
    heads = 6 * group
    rows = {tile: longest(tile, tokens, heads, group) for tile in hopper.TILES}
    assert rows[hopper.tile_for(tokens, heads, group, PROCESSORS)] == min(rows.values())


@pytest.mark.parametrize(("group", "packed"), [(1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (128, 1)])
def test_heads_share_a_tile_if_they_fill_it(group, packed):
    assert hopper.packed(group) == packed


def test_the_hopper_kernel_is_left_alone_without_a_gpu():
    q = torch.zeros(1, 5, 8, 128, dtype=torch.bfloat16)
    assert not hopper.takes(q, q)
