"""The maths of every Triton kernel on a machine without a GPU, in Triton's interpreter.

TRITON_INTERPRET=1 must be set before triton is imported and spoils every kernel for compilation, so
this file runs itself once in a child process; each test here then reports its own outcome there.
bf16 is left out: the interpreter's tl.dot is silently wrong in it. Truth is the reference in
float64; the bound is twice the error of the reference at the tested dtype. Outputs are NaN-filled
between guard bands.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from cosmos3_fast.kernels import reference

IN_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
GUARD, BAND = 64, 777.0
F16, F32 = torch.float16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])


@functools.cache
def outcomes() -> dict[str, str | None]:
    """Message of each failed test of this file in the child process, None where it passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", __file__]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", f"--junitxml={report}"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert report.exists(), done.stdout + done.stderr
        cases = ElementTree.parse(report).iter("testcase")
        return {case.attrib["name"]: "".join(case.itertext()).strip() or None for case in cases}


def interpreted(test):
    """Run the test in the child; here, report what became of it."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if IN_CHILD:
            return test(*args, **kwargs)
        name = os.environ["PYTEST_CURRENT_TEST"].split("::", 1)[1].removesuffix(" (call)")
        message = outcomes()[name]
        assert message is None, message

    return run


def kernel(name: str):
    return importlib.import_module(f"cosmos3_fast.kernels.{name}")


def random(*shape: int, dtype=F32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Guarded:
    """Tensors with NaN inside and bands of a known value around, and between rows if strided."""

    def __init__(self, device="cpu") -> None:
        self.device = device
        self.flats: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, *shape: int, dtype=F32, like: torch.Tensor | None = None, gap=0):
        """A tensor of that shape, a gap of elements between its rows; a copy of like, if given."""
        row = int(torch.Size(shape[1:]).numel())
        size = 2 * GUARD + shape[0] * (row + gap)
        flat = torch.full((size,), BAND, dtype=dtype, device=self.device)
        strides = (row + gap, *torch.empty(1, *shape[1:]).stride()[1:])
        view = flat.as_strided(shape, strides, GUARD)
        view.copy_(like) if like is not None else view.fill_(torch.nan)
        outside = torch.ones_like(flat, dtype=torch.bool)
        outside.as_strided(shape, strides, GUARD).fill_(False)
        self.flats.append((flat, outside))
        return view

    def check(self) -> None:
        for flat, outside in self.flats:
            assert (flat[outside] == BAND).all(), "written outside the tensor"


def assert_close(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """|got - truth| within twice eager's error, or two ulp of the largest value."""
    assert torch.isfinite(got).all()
    floor = 2 * torch.finfo(got.dtype).eps * truth.abs().max()
    bound = max(2 * (eager.double() - truth).abs().max(), floor)
    error = (got.double() - truth).abs().max()
    assert error <= bound, f"error {error:.3e} > bound {bound:.3e}"


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


SIZES = [(1, 1), (3, 63), (2, 1000), (2, 4096)]


@interpreted
@dtypes
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm(rows, width, dtype):
    x = random(rows, width + 5, dtype=dtype)[:, :width]
    weight = random(width, dtype=dtype, seed=1)
    guarded = Guarded()
    out = guarded(rows, width, dtype=dtype, gap=3)
    assert kernel("rms_norm").rms_norm(x, weight, 1e-6, out=out) is out
    truth = reference.rms_norm(*double(x, weight), 1e-6)
    assert_close(out, reference.rms_norm(x, weight, 1e-6), truth)
    guarded.check()


@interpreted
@dtypes
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_add_rms_norm(rows, width, dtype):
    x, start = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=2)
    weight = random(width, dtype=dtype, seed=1)
    guarded = Guarded()
    residual = guarded(rows, width, dtype=dtype, like=start, gap=7)
    out = guarded(rows, width, dtype=dtype)
    kernel("rms_norm").add_rms_norm(x, residual, weight, 1e-6, out=out)
    exact, rounded = start.double(), start.clone()
    truth = reference.add_rms_norm(x.double(), exact, weight.double(), 1e-6)
    assert_close(out, reference.add_rms_norm(x, rounded, weight, 1e-6), truth)
    assert torch.equal(residual, rounded)
    guarded.check()
    into_x = kernel("rms_norm").add_rms_norm(x, start.clone(), weight, 1e-6, out=x)
    assert into_x is x and torch.equal(x, out)


@interpreted
@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (2, 1000), (2, 5000)])
def test_silu_mul(rows, width, dtype):
    gate_up = 4 * random(rows, 2 * width + 4, dtype=dtype)[:, : 2 * width]
    guarded = Guarded()
    out = guarded(rows, width, dtype=dtype, gap=1)
    assert kernel("silu_mul").silu_mul(gate_up, out=out) is out
    assert_close(out, reference.silu_mul(gate_up), reference.silu_mul(gate_up.double()))
    guarded.check()


@interpreted
@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 63), (63, 1000)])
def test_timestep_add_leaves_clean_rows_alone(rows, width, dtype):
    start, table = random(rows, width, dtype=dtype), random(5, width, dtype=dtype, seed=3)
    noisy = (torch.arange(rows) % 3 != 1).to(torch.uint8)
    start[noisy == 0] = torch.nan
    guarded = Guarded()
    x = guarded(rows, width, dtype=dtype, like=start, gap=2)
    step = torch.tensor([3], dtype=torch.int32)
    assert kernel("timestep_add").timestep_add(x, table, step, noisy) is x
    kept = noisy.bool()
    truth = start[kept].double() + table[3].double()
    eager = reference.timestep_add(start.clone(), table, step, noisy)
    assert_close(x[kept], eager[kept], truth)
    assert x[~kept].isnan().all() and eager[~kept].isnan().all()
    guarded.check()


@interpreted
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("size", [1, 63, 1000, 1025])
def test_unipc_step(size, first, dtype, branches):
    module = kernel("unipc_step")
    coef = random(3, len(module.COLUMNS), seed=4)
    history = (module.C_LAST, module.C_M1, module.C_M2, module.P_M1)
    for column in history if first else ():
        coef[2, column.value] = 0.0
    velocity = random(branches, size, dtype=dtype)
    start = [random(size, seed=10 + i) for i in range(4)]
    for x in start[1:] if first else ():
        x.fill_(torch.nan)
    clean = random(size, seed=20)
    noisy = (torch.arange(size) % 4 != 0).to(torch.uint8)
    step = torch.tensor([2], dtype=torch.int32)
    guarded = Guarded()
    state = [guarded(size, like=x) for x in start]
    model_in = guarded(size, dtype=dtype)
    module.unipc_step(velocity, *state, clean, noisy, coef, step, model_in)
    eager, truth = [x.clone() for x in start], double(*start)
    for x, v, c, k in ((eager, velocity, clean, coef), (truth, *double(velocity, clean, coef))):
        reference.unipc_step(v, *x, c, noisy, k, step, torch.empty_like(x[0]))
    for i, (got, small, exact) in enumerate(zip(state, eager, truth, strict=True)):
        if first and i == 3:  # x0_prev2 takes the old x0_prev, not yet written
            assert got.isnan().all()
            continue
        assert_close(got, small, exact)
    assert torch.equal(state[0][noisy == 0], clean[noisy == 0])
    assert torch.equal(model_in, state[0].to(dtype))
    guarded.check()


@interpreted
@dtypes
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(4, 2, 16), (3, 1, 2), (32, 8, 128)])
def test_qk_norm_rope(queries, keys, dim, rows, dtype):
    qkv = random(rows, (queries + 2 * keys) * dim + 8, dtype=dtype)[:, :-8]
    weights = [random(dim, dtype=dtype, seed=i) for i in (1, 2)]
    angle = 3 * random(rows, dim // 2)
    inputs = (qkv, *weights, angle.cos(), angle.sin())
    guarded = Guarded()
    heads = {"q_out": queries, "k_out": keys, "v_out": keys}

    def outputs(of):
        return {name: torch.empty(rows, n, dim, dtype=of) for name, n in heads.items()}

    got = {name: guarded(rows, n, dim, dtype=dtype, gap=16) for name, n in heads.items()}
    eager, truth = outputs(dtype), outputs(torch.float64)
    kernel("qk_norm_rope").qk_norm_rope(*inputs, 1e-6, **got)
    reference.qk_norm_rope(*(x.contiguous() for x in inputs), 1e-6, **eager)
    reference.qk_norm_rope(*double(*(x.contiguous() for x in inputs)), 1e-6, **truth)
    for name in heads:
        assert_close(got[name], eager[name], truth[name])
    assert torch.equal(got["v_out"], eager["v_out"])
    guarded.check()


# Channels out and in, time, source frames, height, width: the decoder's two kinds of shortcut, with
# blocks that are not full, and every other share of channels.
INTERLEAVED = {
    "uniform-time-2": (64, 64, 2, 3, 3, 5),
    "rows-share-2": (32, 64, 1, 2, 5, 7),
    "wide-lines": (512, 512, 2, 1, 2, 3),
    "share-2-time-2": (7, 14, 2, 2, 3, 1),
    "share-4-time-1": (63, 252, 1, 1, 1, 17),
    "share-4-time-2": (3, 12, 2, 3, 2, 9),
    "share-8-time-2": (33, 264, 2, 1, 1, 5),
    "one-of-everything": (1, 1, 1, 1, 1, 1),
}


def interleaved(case, first, make):
    """Phases, NaN where no pixel reads them, and the source; the size of the result's memory."""
    channels, into, time, sources, height, width = case
    frames = sources * time - (time - 1 if first else 0)
    phases = []
    for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
        read = make(frames, height, width, channels)
        whole = read.new_full((frames, height + 1, width + 1, channels), torch.nan)
        whole[:, p : p + height, q : q + width] = read
        phases.append(whole.permute(0, 3, 1, 2))
    source = make(sources, height, width, into).permute(3, 0, 1, 2)[None]
    return phases, source, (frames, 2 * height, 2 * width, channels)


@interpreted
@dtypes
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("case", INTERLEAVED)
def test_interleave_add(case, first, dtype):
    time = INTERLEAVED[case][2]
    make = functools.partial(random, dtype=dtype)
    phases, source, shape = interleaved(INTERLEAVED[case], first, make)
    guarded = Guarded()
    out = guarded(*shape, dtype=dtype).permute(3, 0, 1, 2)[None]
    run = kernel("interleave_add").interleave_add
    assert run(phases, source, time=time, first=first, out=out) is out
    eager = reference.interleave_add(phases, source, time=time, first=first)
    assert torch.isfinite(eager).all() and torch.equal(out, eager)
    truth = reference.interleave_add(double(*phases), source.double(), time=time, first=first)
    assert_close(out, eager, truth)
    guarded.check()
    small = run(phases, source, time=time, first=first, tile=(64, 1))
    assert torch.equal(small, eager)


@interpreted
def test_interleave_add_refuses_shapes_that_do_not_agree():
    run = kernel("interleave_add").interleave_add
    phases, source, _ = interleaved(INTERLEAVED["uniform-time-2"], True, random)
    for wrong in (
        lambda: run(phases, source, time=2, first=False),
        lambda: run(phases, source, time=1, first=True),
        lambda: run(phases[:3], source, time=2, first=True),
        lambda: run(phases, source[:, :48], time=2, first=True),
        lambda: run(phases, source[..., 1:], time=2, first=True),
        lambda: run(phases, source.half(), time=2, first=True),
    ):
        with pytest.raises(AssertionError):
            wrong()


# B, M, N, capacity, UND lengths, Hq, Hk, D
ATTENTION = {
    "one-of-everything": (1, 1, 1, 1, [1], 2, 1, 16),
    "no-und-keys": (1, 5, 33, 8, [0], 4, 4, 16),
    "odd-sizes-batch-of-2": (2, 63, 70, 90, [65, 0], 4, 2, 32),
    "group-of-3": (1, 21, 64, 128, [128], 3, 1, 16),
    "long-head-dim-128": (1, 17, 131, 70, [63], 4, 1, 128),
}


def attention_inputs(batch, tokens, keys, capacity, lengths, queries, kv, dim, dtype):
    """q, k, v, und_k, und_v (NaN and inf past each length), und_len; k, v are slices."""
    q = random(batch, tokens, queries, dim, dtype=dtype)
    k, v = random(2, batch, keys + 3, kv, dim, dtype=dtype, seed=1)[:, :, :keys].unbind()
    und_k, und_v = random(2, batch, capacity, kv, dim, dtype=dtype, seed=2).unbind()
    for b, length in enumerate(lengths):
        und_k[b, length:] = torch.nan
        und_v[b, length:] = torch.inf
    return q, k, v, und_k, und_v, torch.tensor(lengths, dtype=torch.int32)


def attention_outcomes(inputs):
    *tensors, und_len = inputs
    return reference.attention(*inputs), reference.attention(*double(*tensors), und_len)


@interpreted
@dtypes
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, dtype):
    inputs = attention_inputs(*ATTENTION[case], dtype)
    guarded = Guarded()
    out = guarded(*inputs[0].shape, dtype=dtype, gap=32)
    assert kernel("attention").attention_triton(*inputs, out=out) is out
    assert_close(out, *attention_outcomes(inputs))
    guarded.check()
    tile = kernel("online_softmax").Tile(32, 16, 4, 2, tma=True)
    dense = [x.contiguous() for x in inputs]
    by_tma = kernel("attention").attention_triton(*dense, tile=tile)
    assert_close(by_tma, *attention_outcomes(inputs))


@interpreted
@dtypes
@pytest.mark.parametrize("tokens", [1, 63, 130, 333])
@pytest.mark.parametrize(("queries", "kv", "dim"), [(4, 2, 16), (3, 1, 64)])
def test_causal_attention(tokens, queries, kv, dim, dtype):
    q = random(tokens, queries, dim, dtype=dtype)
    k, v = random(2, tokens, 2 * kv, dim, dtype=dtype, seed=1)[:, :, :kv].unbind()
    guarded = Guarded()
    out = guarded(*q.shape, dtype=dtype, gap=8)
    assert kernel("causal_attention").causal_attention(q, k, v, out=out) is out
    truth = reference.causal_attention(*double(q, k, v))
    eager = reference.causal_attention(q, k, v)
    assert_close(out, eager, truth)
    guarded.check()
    module = kernel("causal_attention")
    for tma, split in ((False, False), (False, True), (True, False), (True, True)):
        tile = module.CausalTile(32, 16, 4, 2, tma=tma, split=split)
        got = module.causal_attention(q, k.contiguous(), v.contiguous(), tile=tile)
        assert_close(got, eager, truth)
        assert tma or torch.equal(got, module.causal_attention(q, k, v, tile=tile))


@interpreted
def test_causal_attention_sees_no_later_token():
    """What comes after a token changes nothing of it, to the bit, whatever the tile."""
    q, k, v = (random(70, heads, 16, seed=heads) for heads in (4, 2, 2))
    module = kernel("causal_attention")
    for tile in (module.FLOAT32, module.CausalTile(64, 32, 4, 1), module.TILES[-1][1]):
        whole = module.causal_attention(q, k, v, tile=tile)
        for count in (1, 16, 33, 69):
            part = module.causal_attention(q[:count], k[:count], v[:count], tile=tile)
            assert torch.equal(part, whole[:count]), (tile, count)


@interpreted
def test_attention_refuses_what_it_would_read_wrongly():
    attention = kernel("attention")
    q, k, v, und_k, und_v, und_len = attention_inputs(1, 3, 4, 2, [1], 4, 2, 16, F32)
    with pytest.raises(AssertionError, match="head_dim 8"):
        kernel("causal_attention").causal_attention(
            q[0, ..., :8], k[0, :3, ..., :8], v[0, :3, ..., :8]
        )
    with pytest.raises(AssertionError):
        attention.attention_triton(q, k, v.transpose(1, 2), und_k, und_v, und_len)
    with pytest.raises(AssertionError):
        attention.attention_triton(q, k, v, und_k, und_v, und_len.long())


@interpreted
def test_a_write_outside_the_tensor_is_seen():
    guarded = Guarded()
    x = guarded(2, 3, gap=2)
    x.as_strided((8,), (1,), x.storage_offset()).zero_()
    with pytest.raises(AssertionError, match="outside"):
        guarded.check()
