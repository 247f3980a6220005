"""The torch reference of each op against its formula written another way, in float64.

The Triton kernels are held to the reference, so this is what ties them to the formulas.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cosmos3_fast.kernels import reference

F64 = torch.float64


def random(*shape: int, seed=0, dtype=F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def close(got: torch.Tensor, truth: torch.Tensor, bound: float = 1e-12) -> bool:
    return bool((got - truth).abs().max() <= bound)


@pytest.mark.parametrize("width", [1, 63, 1000])
def test_rms_norm_is_torchs(width):
    x, weight = random(3, width), random(width, seed=1)
    assert close(reference.rms_norm(x, weight, 1e-6), F.rms_norm(x, (width,), weight, 1e-6))


def test_rms_norm_rounds_before_the_weight():
    x, weight = random(5, 64, dtype=torch.bfloat16), random(64, seed=1, dtype=torch.bfloat16)
    rounded = F.rms_norm(x.float(), (64,), None, 1e-6).bfloat16() * weight
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), rounded)


def test_add_rms_norm_adds_in_place():
    x, start, weight = random(3, 63), random(3, 63, seed=1), random(63, seed=2)
    residual = start.clone()
    out = reference.add_rms_norm(x, residual, weight, 1e-6, out=torch.full_like(x, torch.nan))
    assert torch.equal(residual, start + x)
    assert close(out, F.rms_norm(start + x, (63,), weight, 1e-6))


def test_rotation_is_a_complex_product():
    rows, queries, keys, dim = 5, 4, 2, 16
    qkv, angle = random(rows, (queries + 2 * keys) * dim), random(rows, dim // 2, seed=1)
    weights = random(dim, seed=2), random(dim, seed=3)
    shapes = {"q_out": queries, "k_out": keys, "v_out": keys}
    got = {name: torch.full((rows, n, dim), torch.nan, dtype=F64) for name, n in shapes.items()}
    reference.qk_norm_rope(qkv, *weights, angle.cos(), angle.sin(), 1e-6, **got)
    q, k, v = qkv.view(rows, -1, dim).split((queries, keys, keys), 1)
    for x, weight, result in zip((q, k), weights, (got["q_out"], got["k_out"]), strict=True):
        normed = F.rms_norm(x, (dim,), weight, 1e-6)
        turned = (
            torch.complex(*normed.chunk(2, -1))
            * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        assert close(result, torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(got["v_out"], v)


def test_rotation_rounds_once():
    """The normed values are bfloat16's; their rotation is float32's, its tables too."""
    qkv = random(63, 3 * 16, dtype=torch.bfloat16)
    ones, angle = torch.ones(16, dtype=torch.bfloat16), random(63, 8, seed=1, dtype=torch.float32)
    got = {name: torch.empty(63, 1, 16, dtype=qkv.dtype) for name in ("q_out", "k_out", "v_out")}
    reference.qk_norm_rope(qkv, ones, ones, angle.cos(), angle.sin(), 1e-6, **got)
    first, second = reference.rms_norm(qkv[:, :16], ones, 1e-6).double().chunk(2, -1)
    cos, sin = angle.cos().double(), angle.sin().double()
    truth = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    half_step = 2.0**-8 * truth.abs() + 1e-6  # of a number that bfloat16 rounds; float32's before
    assert ((got["q_out"][:, 0].double() - truth).abs() <= half_step).all()


def one_row(q, keys, values) -> torch.Tensor:
    """Attention of one query [D] over keys, values [n, D]."""
    weights = torch.tensor([math.exp(float(q @ k) / math.sqrt(len(q))) for k in keys], dtype=F64)
    return (weights[:, None] * values).sum(0) / weights.sum()


def attention_inputs(lengths):
    batch, tokens, gen, capacity, queries, keys, dim = len(lengths), 3, 4, 5, 4, 2, 8
    q = random(batch, tokens, queries, dim)
    k, v = random(2, batch, gen, keys, dim, seed=1).unbind()
    und_k, und_v = random(2, batch, capacity, keys, dim, seed=2).unbind()
    for b, length in enumerate(lengths):
        und_k[b, length:], und_v[b, length:] = torch.nan, torch.inf
    return q, k, v, und_k, und_v, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("lengths", [[0], [5], [2, 0]], ids=["none", "all", "batch"])
def test_attention_row_by_row(lengths):
    q, k, v, und_k, und_v, _ = inputs = attention_inputs(lengths)
    got = reference.attention(*inputs, out=torch.full_like(q, torch.nan))
    for b, length in enumerate(lengths):
        keys = torch.cat((k[b], und_k[b, :length]))
        values = torch.cat((v[b], und_v[b, :length]))
        for m in range(q.shape[1]):
            for h in range(q.shape[2]):
                assert close(got[b, m, h], one_row(q[b, m, h], keys[:, h // 2], values[:, h // 2]))


def test_causal_attention_row_by_row():
    q, (k, v) = random(7, 4, 8), random(2, 7, 2, 8, seed=1).unbind()
    got = reference.causal_attention(q, k, v)
    for i in range(7):
        for h in range(4):
            assert close(got[i, h], one_row(q[i, h], k[: i + 1, h // 2], v[: i + 1, h // 2]))


def test_gate_up_silu_is_two_products():
    x, gate, up = random(5, 16), random(7, 16, seed=1), random(7, 16, seed=2)
    sums = [(x[:, None] * weight).sum(-1) for weight in (gate, up)]
    truth = sums[0] / (1 + torch.exp(-sums[0])) * sums[1]
    out = torch.full_like(truth, torch.nan)
    assert reference.gate_up_silu(x, torch.cat((gate, up)), out=out) is out
    assert close(out, truth)


def test_gate_up_silu_rounds_both_products_then_silu():
    x, weight = random(5, 16, dtype=torch.bfloat16), random(14, 16, seed=1, dtype=torch.bfloat16)
    gate, up = (x.double() @ weight.double().t()).bfloat16().chunk(2, -1)
    wide = gate.double()
    truth = (wide / (1 + torch.exp(-wide))).bfloat16().double() * up.double()
    assert torch.equal(reference.gate_up_silu(x, weight), truth.bfloat16())


def test_silu_mul_takes_the_gate_first():
    gate, up = random(3, 63), random(3, 63, seed=1)
    assert close(reference.silu_mul(torch.cat((gate, up), -1)), gate * torch.sigmoid(gate) * up)


def test_timestep_add_only_on_noisy_rows():
    x, table = random(3, 8), random(4, 8, seed=1)
    noisy = torch.tensor([1, 0, 1], dtype=torch.uint8)
    expected = torch.stack((x[0] + table[2], x[1], x[2] + table[2]))
    step = torch.tensor([2], dtype=torch.int32)
    assert torch.equal(reference.timestep_add(x, table, step, noisy), expected)


@pytest.mark.parametrize("guided", [False, True])
def test_unipc_step_value_by_value(guided):
    size = 9
    coef = random(3, 10)
    velocity = random(2 if guided else 1, size, seed=1)
    sample, last, m1, m2, clean = random(5, size, seed=2).unbind()
    noisy = torch.tensor([i % 3 != 0 for i in range(size)], dtype=torch.uint8)
    before = [x.tolist() for x in (sample, last, m1, m2, clean)]
    model_in = torch.full((size,), torch.nan, dtype=torch.float32)
    step = torch.tensor([1], dtype=torch.int32)
    reference.unipc_step(velocity, sample, last, m1, m2, clean, noisy, coef, step, model_in)
    g, sigma, a, b, c, d, e, p, r, t = coef[1].tolist()
    for i, (x, y, old1, old2, kept) in enumerate(zip(*before, strict=True)):
        v = float(velocity[0, i])
        v = float(velocity[1, i]) + g * (v - float(velocity[1, i])) if guided else v
        x0 = x - sigma * v
        s = a * x + b * y + c * old1 + d * old2 + e * x0
        new = p * s + r * x0 + t * old1 if noisy[i] else kept
        got = [float(z[i]) for z in (sample, last, m1, m2)]
        assert got == pytest.approx([new, s, x0, old1], abs=1e-12)
    assert torch.equal(model_in, sample.float())


def test_unipc_step_reads_no_history_with_a_coefficient_of_zero():
    coef = torch.tensor([[1.0, 0.5, 1, 0, 0, 0, 0, 0.5, 0.25, 0]], dtype=F64)
    unset = [torch.full((4,), torch.nan, dtype=F64) for _ in range(3)]
    sample, velocity, noisy = random(4), random(1, 4, seed=1), torch.ones(4, dtype=torch.uint8)
    expected = 0.5 * sample + 0.25 * (sample - 0.5 * velocity[0])
    step, model_in = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=F64)
    reference.unipc_step(velocity, sample, *unset, sample.clone(), noisy, coef, step, model_in)
    assert close(sample, expected)


def test_unipc_step_guides_in_the_states_dtype():
    """Velocities are bfloat16; u + g (c - u) is not rounded to it."""
    velocity = random(2, 63, seed=1, dtype=torch.bfloat16)
    coef = torch.tensor([[3.1, 1.0, 1, 0, 0, 0, 0, 0, 1, 0]])  # the new sample is x0
    sample, *history = torch.zeros(5, 63).unbind()
    step, noisy = torch.zeros(1, dtype=torch.int32), torch.ones(63, dtype=torch.uint8)
    model_in = torch.empty(63, dtype=torch.bfloat16)
    reference.unipc_step(velocity, sample, *history, noisy, coef, step, model_in)
    cond, uncond = velocity.double()
    assert close(sample.double(), -(uncond + 3.1 * (cond - uncond)), 1e-5)


def test_image_to_tensor_keeps_channels_last():
    frames = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).view(2, 3, 5, 3)
    got = reference.image_to_tensor(frames)
    assert got.shape == (3, 2, 3, 5) and got.permute(1, 2, 3, 0).is_contiguous()
    assert got[2, 1, 2, 4].item() == pytest.approx(frames[1, 2, 4, 2].item() / 127.5 - 1, abs=1e-7)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("out", "into", "time"), [(4, 4, 2), (4, 8, 1), (2, 4, 2), (3, 12, 2), (1, 8, 2), (3, 3, 1)]
)
def test_interleave_add_place_by_place(out, into, time, first):
    sources, height, width = 3, 2, 3
    lead = time - 1 if first else 0
    frames = sources * time - lead
    phases = random(4, frames, out, height + 1, width + 1)
    source = random(1, into, sources, height, width, seed=1)
    got = reference.interleave_add(phases.unbind(), source, time=time, first=first)
    assert got.shape == (1, out, frames, 2 * height, 2 * width)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    repeats = out * 4 * time // into
    for o, t, y, x in itertools.product(*(range(n) for n in got.shape[1:])):
        (s, a), (i, p), (j, q) = divmod(t + lead, time), divmod(y, 2), divmod(x, 2)
        copied = source[0, ((o * time + a) * 4 + 2 * p + q) // repeats, s, i, j]
        assert got[0, o, t, y, x] == phases[2 * p + q, t, o, i + p, j + q] + copied
