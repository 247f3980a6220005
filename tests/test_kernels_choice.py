"""Which attention runs is a matter of the shapes alone: the nearest measured row."""

from __future__ import annotations

import math

import pytest

from cosmos3_fast.kernels import attention


@pytest.mark.parametrize("row", attention.ATTENTION_CHOICE, ids=str)
def test_a_measured_shape_gets_its_own_row(row):
    assert attention.attention_choice(*row) == attention.ATTENTION_CHOICE[row]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (500, 450, 32), (700, 1500, 16), (2752, 3093, 64), (10**5, 10**5, 8)]
)
def test_any_other_shape_gets_the_nearest_row(shape):
    def ratio(row: tuple[int, int, int]) -> float:
        return math.hypot(*(math.log(a / b) for a, b in zip(row, shape, strict=True)))

    nearest = sorted(attention.ATTENTION_CHOICE, key=ratio)[0]
    assert attention.attention_choice(*shape) == attention.ATTENTION_CHOICE[nearest]


def test_both_choices_are_known():
    assert set(attention.ATTENTION_CHOICE.values()) <= {"triton", "cudnn"}
