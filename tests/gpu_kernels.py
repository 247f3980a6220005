"""Checks and times every Triton kernel on the GPU: `python tests/gpu_kernels.py`.

Correctness first (gpu_kernels_checks.py). Then a captured graph of calls whose inputs rotate past
L2, for a few settings a kernel, beside the torch reference. A short table comes last; exit status 1
on a failed check, and then no times unless --anyway. Rows for tables of choices are printed by
`cosmos3-fast bench --tune`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_kernels_checks import (
    DIM,
    HIDDEN,
    HOPPER_TILES,
    INNER,
    KEYS,
    QUERIES,
    ROWS,
    STATE,
    STEPS,
    attention_inputs,
    has_hopper,
    qkv_inputs,
    qkv_outputs,
    random,
    run_checks,
    state_inputs,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos3_fast.kernels import attention as att
from cosmos3_fast.kernels import (
    qk_norm_rope,
    reference,
    rms_norm,
    silu_mul,
    timestep_add,
    unipc_step,
)
from cosmos3_fast.kernels.causal_attention import CausalTile, causal_attention
from cosmos3_fast.kernels.online_softmax import Tile
from cosmos3_fast.testing.tune import microseconds

UND = 160  # prompt tokens

ATTENTION_TILES = (
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 4),
    Tile(64, 128, 4, 2),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 2),
    Tile(128, 128, 8, 2),
    Tile(64, 64, 4, 3, tma=True),
    Tile(64, 64, 4, 3, tma=True, tail=64),
    Tile(64, 64, 4, 3, tma=True, tail=16),
    Tile(64, 64, 4, 4, tma=True),
    Tile(128, 64, 8, 3, tma=True),
)
CAUSAL_TILES = tuple(
    CausalTile(*tile, tma, split)
    for tile in ((64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 3))
    for tma in (False, True)
    for split in (False, True)
)


@dataclass(frozen=True)
class Op:
    """A memory-bound kernel: inputs, the call with a setting (None: as set), the reference."""

    make: Callable[[], tuple]
    ours: Callable
    torch: Callable
    settings: tuple
    nbytes: int


def memory_bound(rows: int) -> dict[str, Op]:
    def hidden():
        return random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)

    def steps():
        noisy = torch.ones(rows, device="cuda", dtype=torch.uint8)
        step = torch.ones(1, device="cuda", dtype=torch.int32)
        return random(rows, HIDDEN), random(STEPS, HIDDEN), step, noisy

    def qkv():
        return qkv_inputs(rows), qkv_outputs(rows)

    row, norm, add = 2 * rows * HIDDEN, rms_norm.rms_norm, rms_norm.add_rms_norm
    warps, rope, step = (2, 4, 8, 16), qk_norm_rope.qk_norm_rope, unipc_step.unipc_step
    rope_tiles = ((8, 2), (8, 4), (16, 2), (16, 4), (16, 8), (64, 4), (64, 8))
    silu_tiles = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))
    return {
        "rms_norm": Op(
            hidden,
            lambda s, x, out, w: norm(x, w, 1e-6, out=out, warps=s),
            lambda x, out, w: reference.rms_norm(x, w, 1e-6, out=out),
            warps,
            2 * row,
        ),
        "add_rms_norm": Op(
            hidden,
            lambda s, x, r, w: add(x, r, w, 1e-6, out=x, warps=s),
            lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-6, out=x),
            warps,
            4 * row,
        ),
        "qk_norm_rope": Op(
            qkv,
            lambda s, x, y: rope(*x, 1e-6, **y, tile=s),
            lambda x, y: reference.qk_norm_rope(*x, 1e-6, **y),
            rope_tiles,
            4 * rows * (QUERIES + 2 * KEYS) * DIM + 4 * rows * DIM,
        ),
        "silu_mul": Op(
            lambda: (random(rows, 2 * INNER), random(rows, INNER)),
            lambda s, x, out: silu_mul.silu_mul(x, out=out, tile=s),
            lambda x, out: reference.silu_mul(x, out=out),
            silu_tiles,
            6 * rows * INNER,
        ),
        "timestep_add": Op(
            steps,
            lambda s, *x: timestep_add.timestep_add(*x, warps=s),
            reference.timestep_add,
            warps,
            2 * row,
        ),
        "unipc_step": Op(
            lambda: state_inputs(2),
            lambda s, *x: step(*x, tile=s),
            reference.unipc_step,
            ((512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8)),
            STATE * (2 * 2 + 5 * 4 + 1 + 4 * 4 + 2),
        ),
    }


def time_memory_bound(rows: int, label: str) -> list[str]:
    short = []
    for name, op in memory_bound(rows).items():
        if name == "unipc_step" and label != "D":
            continue
        eager = microseconds(lambda op=op: functools.partial(op.torch, *op.make()), op.nbytes)
        times = {
            s: microseconds(lambda op=op, s=s: functools.partial(op.ours, s, *op.make()), op.nbytes)
            for s in (None, *op.settings)
        }
        print(f"{name} {label} torch {eager:.1f} | ", end="")
        print(*(f"{s or 'set'}: {t:.1f}" for s, t in times.items()), sep=" | ", flush=True)
        best, set_us = min(times, key=times.get), times[None]
        short.append(
            f"{name:14s} {label:3s} {set_us:8.1f} us {op.nbytes / set_us / 1e3:6.0f} GB/s "
            f"x{eager / set_us:5.2f} of torch; best {best or 'as set'} {times[best]:.1f}"
        )
    return short


def measure(tokens, keys, *, batch=1, heads=(QUERIES, KEYS)) -> str:
    """Time Triton's and the Hopper kernel in every setting, and what `attention` takes."""
    flop = 4 * batch * tokens * (keys + UND) * DIM * heads[0]
    nbytes = 2 * batch * DIM * (2 * tokens * heads[0] + 2 * (keys + UND) * heads[1])

    def timed(path, **how) -> float:
        def make():
            inputs = attention_inputs(batch, tokens, keys, [UND] * batch, heads)
            return functools.partial(path, *inputs, **how)

        return microseconds(make, nbytes)

    def over_gen(q, k, v, *_):
        queries, k, v = (x.transpose(1, 2) for x in (q, k, v))
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        return op(queries, k, v, None, True, scale=DIM**-0.5)

    taken = timed(att.attention)
    ways = {"triton": {tile: timed(att.attention_triton, tile=tile) for tile in ATTENTION_TILES}}
    if has_hopper():
        tiles = HOPPER_TILES.values()
        ways["hopper"] = {tile: timed(att.attention_hopper, tile=tile) for tile in tiles}
    gen_only = timed(over_gen)
    where = f"attention M={tokens} N={keys} B={batch} heads {heads[0]}/{heads[1]}"
    best = []
    for name, times in ways.items():
        listed = (f"{tuple(s)}: {t:.1f}" for s, t in times.items())
        print(f"{where} {name}", *listed, sep=" | ", flush=True)
        tile = min(times, key=times.get)
        best.append(f"{name} {times[tile]:.1f} {tuple(tile)}")
    return (
        f"{where}: {taken:.1f} us {flop / taken / 1e6:.0f} TFLOP/s; best {'; '.join(best)}; "
        f"cuDNN over GEN alone {gen_only:.1f}"
    )


def time_causal(tokens: int) -> str:
    flop = 2 * tokens * tokens * DIM * QUERIES
    nbytes = 4 * tokens * DIM * (QUERIES + KEYS)

    def make(call):
        q, k, v = random(tokens, QUERIES, DIM), random(tokens, KEYS, DIM), random(tokens, KEYS, DIM)
        return functools.partial(call, q, k, v, out=torch.empty_like(q))

    def by_torch(backend):
        def run(q, k, v, out):
            with sdpa_kernel(backend):
                reference.causal_attention(q, k, v)

        return run

    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    flash, cudnn = (microseconds(lambda b=b: make(by_torch(b)), nbytes) for b in backends)
    calls = {t: functools.partial(causal_attention, tile=t) for t in (None, *CAUSAL_TILES)}
    times = {t: microseconds(lambda c=c: make(c), nbytes) for t, c in calls.items()}
    listed = (f"{tuple(s) if s else 'set'}: {t:.1f}" for s, t in times.items())
    print(f"causal {tokens} flash {flash:.1f} cuDNN {cudnn:.1f}", *listed, sep=" | ", flush=True)
    best, us = min(times, key=times.get), times[None]
    return (
        f"causal n={tokens}: {us:.1f} us {flop / us / 1e6:.0f} TFLOP/s; best {best or 'as set'} "
        f"{times[best]:.1f}; x{flash / us:.2f} of flash, x{cudnn / us:.2f} of cuDNN with its plan"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--anyway", action="store_true", help="times in spite of failed checks")
    parser.add_argument("--attention", action="store_true", help="time the attention alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    failures = run_checks()
    if options.check or (failures and not options.anyway):
        return int(failures > 0)
    shapes = (
        (ROWS["S"], {}),
        (1547, {}),
        (ROWS["E"], {}),
        (ROWS["D"], {}),
        (ROWS["D"], {"batch": 2}),
        (ROWS["D"], {"heads": (16, 4)}),
        (ROWS["D"], {"heads": (8, 2)}),
        (ROWS["D"], {"heads": (16, 4), "batch": 2}),
        (ROWS["E"], {"heads": (16, 4)}),
    )
    short = [measure(tokens, tokens, **shape) for tokens, shape in shapes]
    if not options.attention:
        short += [time_causal(tokens) for tokens in (160, 256, 512, 1024, 2048, 3072, 4096)]
        for label, rows in ROWS.items():
            short += time_memory_bound(rows, label)
    print("---", *short, f"failed checks: {failures}", sep="\n", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
