"""The reference of a convolution's input against plain norm and padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosmos3_fast import ops

PROLOGUES = ["none", "norm_silu"]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return x.to(dtype).to(memory_format=torch.channels_last_3d)


def vectors(prologue: str, channels: int) -> dict:
    bias = torch.linspace(-1, 1, channels)
    gamma = torch.linspace(0.5, 1.5, channels)
    return {"bias": bias} | ({"gamma": gamma} if prologue == "norm_silu" else {})


def truth(x: torch.Tensor, prologue: str, bias=None, gamma=None) -> torch.Tensor:
    x = x.double() + (0 if bias is None else bias.double().view(-1, 1, 1, 1))
    if prologue == "norm_silu":
        unit = F.normalize(x, dim=1, eps=1e-12) * x.shape[1] ** 0.5
        return F.silu(unit * gamma.double().view(-1, 1, 1, 1))
    return x


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_prologue_history_and_zero_padding(prologue, history, pad):
    x = sample((1, 7, 3, 5, 4))
    given = vectors(prologue, 7)
    got = ops.conv_input(x, prologue=prologue, history=history, pad=pad, **given)
    want = F.pad(truth(x, prologue, **given), (*pad, history, 0))
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_strided_input_without_bias(prologue):
    x = sample((1, 6, 4, 9, 8))[:, :, 1:, 2:7, ::2]
    given = vectors(prologue, 6)
    del given["bias"]
    got = ops.conv_input(x, prologue=prologue, pad=(1, 1, 1, 1), **given)
    want = F.pad(truth(x, prologue, **given), (1, 1, 1, 1))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_zero_pixel_stays_zero():
    x = torch.zeros(1, 5, 1, 2, 2)
    got = ops.conv_input(x, prologue="norm_silu", gamma=torch.ones(5))
    assert torch.equal(got, x)


def test_a_small_pixel_is_divided_by_its_own_norm():
    x, gamma = sample((1, 5, 1, 2, 2)), torch.ones(5)
    small = ops.conv_input(x * 1e-8, prologue="norm_silu", gamma=gamma)
    torch.testing.assert_close(small, ops.conv_input(x, prologue="norm_silu", gamma=gamma))


def test_bf16_rounds_the_norm_before_silu():
    x = sample((1, 64, 2, 3, 5), torch.bfloat16)
    gamma = torch.linspace(0.5, 1.5, 64)
    got = ops.conv_input(x, prologue="norm_silu", gamma=gamma)
    wide = F.normalize(x.float(), dim=1) * 8 * gamma.view(-1, 1, 1, 1)
    assert got.dtype == torch.bfloat16
    different = got != F.silu(wide.to(torch.bfloat16))
    assert different.float().mean() < 0.01  # the order of two float32 products


def test_bf16_adds_the_bias_in_float32_and_rounds_once():
    x, bias = sample((1, 64, 2, 3, 5), torch.bfloat16), torch.linspace(-1, 1, 64)
    got = ops.conv_input(x, prologue="none", bias=bias)
    assert torch.equal(got, (x.float() + bias.view(-1, 1, 1, 1)).to(torch.bfloat16))


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("axis", [3, 4], ids=["H", "W"])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_strips_with_edges_are_slices_of_the_whole(prologue, axis, pad):
    x, cuts = sample((1, 7, 2, 9, 8)), (4, 1, 3) if max(pad) == 1 else (3, 3, 2)
    x = x if axis == 4 else x.transpose(3, 4)
    given = vectors(prologue, 7) | {"prologue": prologue}
    low, high = pad[2:] if axis == 3 else pad[:2]
    whole = ops.conv_input(x, history=2, pad=pad, **given)
    strips = x.split(cuts, axis)
    edges = [ops.conv_edges(s, axis=axis, before=high, after=low, **given) for s in strips]
    start = 0
    for i, size in enumerate(cuts):
        before = edges[i - 1][1] if i > 0 else None
        after = edges[i + 1][0] if i + 1 < len(cuts) else None
        got = ops.conv_input(
            strips[i], history=2, pad=pad, axis=axis, before=before, after=after, **given
        )
        want = whole.narrow(axis, start, low + size + high)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        start += size


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_edges_are_rows_after_the_prologue(prologue, count):
    x = sample((1, 7, 2, 5, 4))
    given = vectors(prologue, 7)
    want = truth(x, prologue, **given)
    first, last = ops.conv_edges(x, prologue=prologue, before=count, after=count, **given)
    torch.testing.assert_close(first.double(), want[:, :, :, :count], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.double(), want[:, :, :, -count:], rtol=1e-5, atol=1e-6)
    assert ops.conv_edges(x, prologue=prologue, **given) == (None, None)
