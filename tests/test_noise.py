"""`ops.legacy_normal` against numpy's own generator, bit for bit, whatever the threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos3_fast import _C, ops, sampler
from cosmos3_fast.kernels import reference

SEEDS = [0, 1, 42, 19650218, 2**31, 2**32 - 1]
# 312 normals at most come from one block of the generator; threads share from 32 blocks on.
COUNTS = [0, 1, 2, 63, 244, 245, 311, 312, 7841, 7842, 7843, 100_001]
VIDEO = 48 * 9 * 30 * 44  # the size of a real request's


def bits(values: torch.Tensor) -> np.ndarray:
    return values.numpy().view(np.int32)


def numpys(seed: int, count: int) -> np.ndarray:
    drawn = np.random.RandomState(seed).standard_normal(count)
    return drawn.astype(np.float32).view(np.int32)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_numpys_stream_bit_for_bit(seed, threads):
    truth = numpys(seed, max(COUNTS))
    for count in COUNTS:
        got = ops.legacy_normal(seed, count, threads=threads)
        assert got.dtype == torch.float32 and got.shape == (count,)
        assert np.array_equal(bits(got), truth[:count]), count


@pytest.mark.parametrize("threads", [1, 4, 63])
def test_the_noise_of_a_video(threads):
    assert np.array_equal(bits(ops.legacy_normal(42, VIDEO, threads=threads)), numpys(42, VIDEO))


@given(st.integers(0, 2**32 - 1), st.integers(0, 30_000), st.integers(1, 5))
def test_any_seed_count_and_threads(seed, count, threads):
    got = ops.legacy_normal(seed, count, threads=threads)
    assert np.array_equal(bits(got), numpys(seed, count))


def test_expected_points_may_fall_short_or_overshoot():
    """81 blocks of 156 points are expected to make 19,849 normals; seeds on both sides of that."""
    count, short, over = 19_860, 0, 0
    for seed in range(60):
        words = np.random.RandomState(seed)
        points = 2 * words.random_sample((81 * 156, 2)) - 1
        kept = 2 * ((points**2).sum(1) < 1).sum()
        short, over = short + (kept < count), over + (kept > count)
        assert np.array_equal(bits(ops.legacy_normal(seed, count, threads=3)), numpys(seed, count))
    assert short > 5 and over > 5


def test_nothing_else_is_written():
    for count in (1, 63, 20_001):
        out = torch.full((count + 2,), torch.nan)
        _C.legacy_normal(7, out[1:].data_ptr(), count, 3)
        assert np.array_equal(bits(out[1:-1]), numpys(7, count))
        assert out[0].isnan() and out[-1].isnan()


def test_calls_at_the_same_time_do_not_disturb_each_other():
    results: dict[int, torch.Tensor] = {}

    def draw(seed: int) -> None:
        results[seed] = ops.legacy_normal(seed, 20_001, threads=2)

    workers = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(bits(results[seed]), numpys(seed, 20_001)) for seed in range(4))


def test_the_reference_is_numpy_and_can_be_forced(monkeypatch):
    assert np.array_equal(bits(reference.legacy_normal(3, 63)), numpys(3, 63))
    monkeypatch.setattr(ops, "_extension", lambda: pytest.fail("the reference was asked for"))
    with ops.reference():
        assert np.array_equal(bits(ops.legacy_normal(3, 63)), numpys(3, 63))


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 48, 2, 5, 7), (1, 33, 64)], ids=str)
def test_the_samplers_noise_has_the_shape(shape):
    got = sampler.noise(42, shape)
    want = np.asarray(np.random.RandomState(42).standard_normal(shape), np.float32)
    assert got.dtype == np.float32 and got.shape == shape and np.array_equal(got, want)


@pytest.mark.parametrize(
    ("seed", "count", "threads"), [(-1, 1, 1), (2**32, 1, 1), (0, -1, 1), (0, 1, 0)], ids=str
)
def test_what_it_refuses(seed, count, threads):
    with pytest.raises(ValueError, match=rf"{seed}, {count} and {threads}"):
        ops.legacy_normal(seed, count, threads=threads)


def test_the_extension_checks_for_itself():
    for out, count, threads in ((0, 1, 1), (0, -1, 1), (0, 1, 0)):
        with pytest.raises(RuntimeError, match=r"noise\.cpp:\d+"):
            _C.legacy_normal(0, out, count, threads)
    _C.legacy_normal(0, 0, 0, 1)
