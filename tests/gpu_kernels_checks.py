"""Correctness of every Triton kernel on the GPU at the sizes of D, E and S, of the kernels of rows
at odd ones too; gpu_kernels.py runs it.

Error at most twice eager torch's against float64, NaN and inf past the UND length, guard bands, two
runs bit-equal, lengths changed between replays of one graph.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from test_kernels_interpreter import INTERLEAVED, Guarded, assert_close, double, interleaved

from cosmos3_fast.kernels import attention as att
from cosmos3_fast.kernels import (
    gate_up_silu,
    interleave_add,
    qk_norm_rope,
    reference,
    rms_norm,
    silu_mul,
    timestep_add,
    unipc_step,
)
from cosmos3_fast.kernels.attention_hopper import TILES as HOPPER_TILES
from cosmos3_fast.kernels.causal_attention import causal_attention
from cosmos3_fast.kernels.online_softmax import Tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS = {"S": 406, "E": 1966, "D": 3093, "2D": 6186}
HIDDEN, INNER, DIM, QUERIES, KEYS, STEPS = 4096, 12288, 128, 32, 8, 4
STATE = 9 * 33 * 40 * 48 + 33 * 64  # values of D's latents and actions
CAPACITY = 256
# D's three upsamplings: channels out and in, factor of frames, source frames, height, width.
UPSAMPLINGS = (
    (1024, 1024, 2, 9, 33, 40),
    (1024, 1024, 2, 17, 66, 80),
    (512, 1024, 1, 33, 132, 160),
)


def attention_plain(*inputs, **how) -> torch.Tensor:
    """Without TMA."""
    return att.attention_triton(*inputs, **how, tile=Tile(64, 64, 4, 3))


@functools.cache
def has_hopper() -> bool:
    """Asked when a check runs: `--help` needs no GPU."""
    return torch.cuda.get_device_capability()[0] == 9


def paths() -> tuple[Callable[..., torch.Tensor], ...]:
    """The ways of attention as far as this GPU has them; all dtypes by the first."""
    hopper = (att.attention_hopper,) if has_hopper() else ()
    return att.attention_triton, attention_plain, *hopper


def random(*shape: int, dtype=BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=F32).to(dtype)


def qkv_inputs(rows: int, dtype=BF16, heads=(QUERIES, KEYS)) -> tuple[torch.Tensor, ...]:
    angle = 3 * random(rows, DIM // 2, dtype=F32)
    qkv = random(rows, (heads[0] + 2 * heads[1]) * DIM, dtype=dtype)
    weights = random(DIM, dtype=dtype), random(DIM, dtype=dtype)
    return (qkv, *weights, angle.cos(), angle.sin())


def qkv_outputs(rows: int, dtype=BF16, heads=(QUERIES, KEYS)) -> dict[str, torch.Tensor]:
    counts = {"q_out": heads[0], "k_out": heads[1], "v_out": heads[1]}
    return {x: torch.empty(rows, n, DIM, device="cuda", dtype=dtype) for x, n in counts.items()}


def state_inputs(branches: int, dtype=BF16) -> list[torch.Tensor]:
    """Arguments of unipc_step."""
    state = [random(STATE, dtype=F32) for _ in range(5)]
    noisy = (torch.arange(STATE, device="cuda") % 9 != 0).to(torch.uint8)
    coef = random(STEPS, len(unipc_step.COLUMNS), dtype=F32) / 4
    step = torch.full((1,), 2, device="cuda", dtype=torch.int32)
    velocity = random(branches, STATE, dtype=dtype)
    return [velocity, *state, noisy, coef, step, torch.empty_like(velocity[0])]


def attention_inputs(batch, tokens, keys, lengths, heads=(QUERIES, KEYS), dtype=BF16):
    """Arguments of attention, NaN and inf past the UND lengths."""
    q = random(batch, tokens, heads[0], DIM, dtype=dtype)
    k, v = random(2, batch, keys, heads[1], DIM, dtype=dtype).unbind()
    und_k, und_v = random(2, batch, CAPACITY, heads[1], DIM, dtype=dtype).unbind()
    for b, length in enumerate(lengths):
        und_k[b, length:], und_v[b, length:] = torch.nan, torch.inf
    return q, k, v, und_k, und_v, torch.tensor(lengths, device="cuda", dtype=torch.int32)


def host_attention(q, k, v, und_k, und_v, lengths) -> torch.Tensor:
    """torch's attention, lengths known to the host: eager's error and, in float64, the truth."""
    results = []
    for b, length in enumerate(lengths):
        keys = torch.cat((k[b], und_k[b, :length])).transpose(0, 1)
        values = torch.cat((v[b], und_v[b, :length])).transpose(0, 1)
        one = q[b].transpose(0, 1)[None]
        result = F.scaled_dot_product_attention(one, keys[None], values[None], enable_gqa=True)
        results.append(result.transpose(1, 2))
    return torch.cat(results)


def check_rms_norm(rows: int, dtype: torch.dtype, width: int = HIDDEN, gap: int = 0) -> None:
    x = random(rows, width + gap, dtype=dtype)[:, :width]
    start, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype)
    guarded = Guarded("cuda")
    out = guarded(rows, width, dtype=dtype, gap=gap)
    rms_norm.rms_norm(x, weight, 1e-6, out=out)
    truth = reference.rms_norm(*double(x, weight), 1e-6)
    assert_close(out, reference.rms_norm(x, weight, 1e-6), truth)
    residual = guarded(rows, width, dtype=dtype, like=start, gap=gap)
    rms_norm.add_rms_norm(x, residual, weight, 1e-6, out=out.fill_(torch.nan))
    rounded, exact = start.clone(), start.double()
    truth = reference.add_rms_norm(x.double(), exact, weight.double(), 1e-6)
    assert_close(out, reference.add_rms_norm(x, rounded, weight, 1e-6), truth)
    assert torch.equal(residual, rounded)
    guarded.check()


def check_qk_norm_rope(rows: int, dtype: torch.dtype, heads=(QUERIES, KEYS)) -> None:
    inputs = qkv_inputs(rows, dtype, heads)
    guarded = Guarded("cuda")
    eager, truth = qkv_outputs(rows, dtype, heads), qkv_outputs(rows, torch.float64, heads)
    got = {x: guarded(*t.shape, dtype=dtype, gap=256) for x, t in eager.items()}
    qk_norm_rope.qk_norm_rope(*inputs, 1e-6, **got)
    reference.qk_norm_rope(*inputs, 1e-6, **eager)
    reference.qk_norm_rope(*double(*inputs), 1e-6, **truth)
    for name, result in got.items():
        assert_close(result, eager[name], truth[name])
    guarded.check()


def check_silu_mul(rows: int, dtype: torch.dtype, width: int = INNER, gap: int = 0) -> None:
    gate_up = 4 * random(rows, 2 * width + gap, dtype=dtype)[:, : 2 * width]
    guarded = Guarded("cuda")
    out = silu_mul.silu_mul(gate_up, out=guarded(rows, width, dtype=dtype, gap=gap))
    assert_close(out, reference.silu_mul(gate_up), reference.silu_mul(gate_up.double()))
    guarded.check()


def gate_up_ways() -> tuple[Callable[..., torch.Tensor], ...]:
    """The ways that GATE_UP_CHOICE names, as far as this GPU has them."""
    ways = (gate_up_silu.gate_up_silu_pair, gate_up_silu.gate_up_silu_fused)
    return ways if has_hopper() else ways[:1]


def gate_up_inputs(rows: int, inner: int = INNER) -> tuple[torch.Tensor, torch.Tensor]:
    return random(rows, HIDDEN), random(2 * inner, HIDDEN) / HIDDEN**0.5


def check_gate_up_silu(rows: int) -> None:
    inputs = gate_up_inputs(rows)
    eager, truth = reference.gate_up_silu(*inputs), reference.gate_up_silu(*double(*inputs))
    for way in gate_up_ways():
        guarded = Guarded("cuda")
        out = way(*inputs, out=guarded(rows, INNER, dtype=BF16, gap=64))
        assert_close(out, eager, truth)
        assert torch.equal(way(*inputs), out), f"{way.__name__}: two runs differ"
        guarded.check()


def check_timestep_add(rows: int, dtype: torch.dtype, width: int = HIDDEN, gap: int = 0) -> None:
    start, table = random(rows, width, dtype=dtype), random(STEPS, width, dtype=dtype)
    noisy = (torch.arange(rows, device="cuda") % 9 != 0).to(torch.uint8)
    kept = noisy == 1
    start[~kept] = torch.nan
    step = torch.full((1,), 3, device="cuda", dtype=torch.int32)
    guarded = Guarded("cuda")
    x = guarded(*start.shape, dtype=dtype, like=start, gap=gap)
    timestep_add.timestep_add(x, table, step, noisy)
    truth = start[kept].double() + table[3].double()
    eager = reference.timestep_add(start, table, step, noisy)[kept]
    assert_close(x[kept], eager, truth)
    assert torch.equal(x[kept], eager) and x[~kept].isnan().all()
    guarded.check()


def check_unipc_step(branches: int, dtype: torch.dtype) -> None:
    inputs = state_inputs(branches, dtype)
    guarded = Guarded("cuda")
    ours = [inputs[0], *(guarded(STATE, like=x) for x in inputs[1:5]), *inputs[5:9]]
    ours.append(guarded(STATE, dtype=dtype))
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    unipc_step.unipc_step(*ours)
    reference.unipc_step(*inputs)
    reference.unipc_step(*exact)
    for got, eager, truth in zip(ours[1:5], inputs[1:5], exact[1:5], strict=True):
        assert_close(got, eager, truth)
    assert torch.equal(ours[9], ours[1].to(dtype))
    guarded.check()


def check_interleave_add(case: tuple[int, ...], first: bool, dtype: torch.dtype) -> None:
    """Bit for bit the reference, both of one rounding; float64 for one output frame at a time."""
    time = case[2]
    phases, source, shape = interleaved(case, first, functools.partial(random, dtype=dtype))
    guarded = Guarded("cuda")
    out = guarded(*shape, dtype=dtype).permute(3, 0, 1, 2)[None]
    how = {"time": time, "first": first}
    interleave_add.interleave_add(phases, source, **how, out=out)
    guarded.check()
    assert torch.equal(out, reference.interleave_add(phases, source, **how))
    lead = time - 1 if first else 0
    for frame in {0, shape[0] - 1}:
        at = (frame + lead) // time
        begin = at * time - lead  # of the output frames of source frame `at`
        some = [x[max(begin, 0) : begin + time].double() for x in phases]
        alone = {"time": time, "first": first and at == 0}
        truth = reference.interleave_add(some, source[:, :, at : at + 1].double(), **alone)
        got = out[:, :, max(begin, 0) : begin + time]
        assert_close(got, truth.to(dtype), truth)


def check_attention(paths, tokens: int, lengths: list[int], dtype: torch.dtype) -> None:
    inputs = attention_inputs(len(lengths), tokens, tokens, lengths, dtype=dtype)
    truth = host_attention(*double(*inputs[:5]), lengths)
    eager = host_attention(*inputs[:5], lengths)
    for path in paths if dtype == BF16 else paths[:1]:
        name = getattr(path, "__name__", path)
        guarded = Guarded("cuda")
        out = guarded(*inputs[0].shape, dtype=dtype, gap=DIM)
        path(*inputs, out=out)
        try:
            assert_close(out, eager, truth)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert torch.equal(path(*inputs), out), f"{name}: two runs differ"
        guarded.check()


def check_replays(path: Callable) -> None:
    """One graph, UND lengths changed between replays: bit-equal to eager calls."""
    inputs = attention_inputs(2, 406, 406, [CAPACITY, CAPACITY])
    out = path(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        path(*inputs, out=out)
    for lengths in ([160, 1], [0, CAPACITY], [160, 1]):
        inputs[5].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, path(*inputs)), f"{path.__name__}: replay differs at {lengths}"


def check_causal(tokens: int, dtype: torch.dtype) -> None:
    q = random(tokens, QUERIES, DIM, dtype=dtype)
    k, v = random(2, tokens, KEYS, DIM, dtype=dtype).unbind()
    guarded = Guarded("cuda")
    out = causal_attention(q, k, v, out=guarded(*q.shape, dtype=dtype))
    truth = reference.causal_attention(*double(q, k, v))
    assert_close(out, reference.causal_attention(q, k, v), truth)
    assert torch.equal(causal_attention(q, k, v), out), "two runs differ"
    guarded.check()


def odd_checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """The kernels of rows in both half precisions, at sizes that fill no block, rows strided."""
    for dtype in (BF16, F16):
        kind = str(dtype).removeprefix("torch.")
        for width in (1, 63, 1000):
            for check in (check_rms_norm, check_silu_mul, check_timestep_add):
                run = functools.partial(check, 63, dtype, width, gap=5)
                yield f"{check.__name__} 63 x {width} {kind}", run
        for heads in ((1, 1), (63, 7), (1000, 63)):
            run = functools.partial(check_qk_norm_rope, 63, dtype, heads)
            yield f"check_qk_norm_rope 63 x {heads} heads {kind}", run


def interleave_checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """The cases of the interpreter in every dtype, D's own sizes in bfloat16."""
    for first in (True, False):
        for dtype in (BF16, F16, F32):
            for name, case in INTERLEAVED.items():
                check = functools.partial(check_interleave_add, case, first, dtype)
                yield f"interleave_add {name} first={first} {dtype}", check
        for case in UPSAMPLINGS:
            check = functools.partial(check_interleave_add, case, first, BF16)
            yield f"interleave_add {case} first={first}", check


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from odd_checks()
    yield from interleave_checks()
    for dtype in (BF16, F32):
        kind = str(dtype).removeprefix("torch.")
        for size, rows in ROWS.items():
            for check in (check_rms_norm, check_qk_norm_rope, check_silu_mul, check_timestep_add):
                yield f"{check.__name__} {size} {kind}", functools.partial(check, rows, dtype)
        for size, rows in ROWS.items() if dtype == BF16 else ():
            yield f"gate_up_silu {size} {kind}", functools.partial(check_gate_up_silu, rows)
        for branches in (1, 2):
            yield f"unipc x{branches} {kind}", functools.partial(check_unipc_step, branches, dtype)
        for size, lengths in (
            ("S", [0]),
            ("S", [160]),
            ("E", [160]),
            ("D", [160]),
            ("D", [256, 63]),
        ):
            check = functools.partial(check_attention, paths(), ROWS[size], lengths, dtype)
            yield f"attention {size} und {lengths} {kind}", check
        for tokens in (1, 33, 160, 257, 1000, 3001, 4096):
            yield f"causal {tokens} {kind}", functools.partial(check_causal, tokens, dtype)
    for tile in HOPPER_TILES.values() if has_hopper() else ():
        path = functools.partial(att.attention_hopper, tile=tile)
        check = functools.partial(check_attention, (path,), ROWS["S"], [160, 63], BF16)
        yield f"hopper {tuple(tile)}", check
    for path in paths():
        yield f"replays {path.__name__}", functools.partial(check_replays, path)


def run_checks() -> int:
    """Number of failed checks, each of them printed."""
    failures = total = 0
    for name, check in checks():
        total += 1
        try:
            check()
        except Exception:  # every other check still runs; the exit status says that one failed
            failures += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-3)}", flush=True)
        torch.cuda.synchronize()
    print(f"checks: {total - failures} passed, {failures} failed", flush=True)
    return failures
