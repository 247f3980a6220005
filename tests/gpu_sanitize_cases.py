"""What tests/gpu_sanitize.py runs under compute-sanitizer: every kernel at small, odd sizes.

A case is a generator of the results of its calls in one dtype; they must be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Made on the host: no kernel of torch's need be watched."""
    return torch.randn(shape).to(dtype).cuda()


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype).cuda()


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).cuda()


def norms(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import rms_norm

    for rows, width in ((3, 1000), (1, 4096), (5, 7)):
        x, residual, weight = (random(*s, dtype=dtype) for s in ((rows, width),) * 2 + ((width,),))
        yield rms_norm.rms_norm(x, weight, 1e-6, out=blank(rows, width, dtype=dtype))
        yield rms_norm.add_rms_norm(x, residual, weight, 1e-6)
        yield residual


def rope(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels.qk_norm_rope import qk_norm_rope

    for rows, queries, keys, dim in ((3, 4, 1, 128), (5, 3, 1, 16)):
        qkv = random(rows, (queries + 2 * keys) * dim, dtype=dtype)
        weights = random(dim, dtype=dtype), random(dim, dtype=dtype)
        tables = (random(rows, dim // 2, dtype=torch.float32) for _ in range(2))
        heads = {"q_out": queries, "k_out": keys, "v_out": keys}
        outputs = {name: blank(rows, count, dim, dtype=dtype) for name, count in heads.items()}
        qk_norm_rope(qkv, *weights, *tables, 1e-6, **outputs)
        yield from outputs.values()


def gate_up(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels.gate_up_silu import gate_up_silu_fused

    for rows, width, inner in ((130, 200, 264), (1, 8, 8)):
        x, weight = random(rows, width, dtype=dtype), random(2 * inner, width, dtype=dtype)
        yield gate_up_silu_fused(x, weight, out=blank(rows, inner, dtype=dtype))


def elementwise(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import silu_mul, timestep_add, unipc_step

    for rows, width in ((3, 1000), (1, 3), (2, 12288)):
        yield silu_mul.silu_mul(random(rows, 2 * width, dtype=dtype))
        x, table = random(rows, width, dtype=dtype), random(4, width, dtype=dtype)
        noisy = integers(*(i % 2 for i in range(rows)), dtype=torch.uint8)
        yield timestep_add.timestep_add(x, table, integers(3), noisy)
    for branches, size in ((1, 1), (2, 1001), (2, 4096)):
        state = [random(size, dtype=torch.float32) for _ in range(5)]
        noisy = integers(*(i % 9 != 0 for i in range(size)), dtype=torch.uint8)
        coef = random(4, len(unipc_step.COLUMNS), dtype=torch.float32)
        model_in = blank(size, dtype=dtype)
        velocity = random(branches, size, dtype=dtype)
        unipc_step.unipc_step(velocity, *state, noisy, coef, integers(2), model_in)
        yield from (*state[:4], model_in)


def interleaving(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from test_kernels_interpreter import INTERLEAVED, interleaved

    from cosmos3_fast.kernels.interleave_add import interleave_add

    for case in INTERLEAVED.values():
        for first in (True, False):
            make = functools.partial(random, dtype=dtype)
            phases, source, shape = interleaved(case, first, make)
            out = blank(*shape, dtype=dtype).permute(3, 0, 1, 2)[None]
            yield interleave_add(phases, source, time=case[2], first=first, out=out)


def attentions(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Every way of ops.variants; Triton's own also by plain loads."""
    from cosmos3_fast.kernels import attention
    from cosmos3_fast.ops import variants

    plain = attention.TILES[dtype.itemsize]._replace(tma=False)
    without_tma = functools.partial(attention.attention_triton, tile=plain)
    for tokens, keys, capacity, lengths in ((19, 203, 96, (70, 0)), (1, 1, 3, (3, 1))):
        q = random(2, tokens, 8, 128, dtype=dtype)
        gen = [random(2, keys, 2, 128, dtype=dtype) for _ in range(2)]
        und = [random(2, capacity, 2, 128, dtype=dtype) for _ in range(2)]
        for run in (*variants.attention(q, *gen, *und).values(), without_tma):
            yield run(q, *gen, *und, integers(*lengths), out=blank(*q.shape, dtype=dtype))


def causal(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import causal_attention as module

    tiles = [t for _, t in module.TILES] if dtype.itemsize == 2 else [module.FLOAT32]
    for tokens in (1, 33, 203):
        for tile in tiles:
            q = random(tokens, 8, 128, dtype=dtype)
            k, v = (random(tokens, 2, 128, dtype=dtype) for _ in range(2))
            out = blank(tokens, 8, 128, dtype=dtype)
            yield module.causal_attention(q, k, v, out=out, tile=tile)


def image(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast import ops

    for shape in ((1, 5, 7, 3), (2, 16, 16, 3), (1, 1, 1, 3)):
        yield ops.image_to_tensor(torch.randint(0, 256, shape, dtype=torch.uint8).cuda())
    odd = torch.randint(0, 256, (106,), dtype=torch.uint8).cuda()[1:]  # no aligned address
    yield ops.image_to_tensor(odd.view(1, 5, 7, 3))


def halo_input(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from halo_cases import ODD, inputs

    from cosmos3_fast.ops import halo

    for case in ODD:
        given = inputs(case, dtype, "cuda")
        yield halo.conv_input(**given)
        rest = {name: given[name] for name in ("x", "prologue", "gamma", "bias")}
        for axis in (3, 4):
            yield from halo.conv_edges(**rest, axis=axis, before=1, after=1)


def halo_exchange(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Ranks that share this GPU, as in gpu_halo.py; every other thread's work is a slice's."""
    from gpu_halo import check_ranks
    from halo_cases import ODD

    for case in ODD:
        for axis, count in ((3, 2), (4, 3)):
            if (problem := check_ranks(case, dtype, axis, count)) is not None:
                raise AssertionError(f"{case.name}: {problem}")
    yield from ()


def sums(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Ranks that share this GPU, one after another: the flags say that all peers have come."""
    from sum_cases import EPS, Ranks, inputs

    from cosmos3_fast.ops.sum_norm import sum_add_rms_norm

    for count, rows, columns in ((1, 3, 8), (2, 1, 1000), (3, 7, 4096), (8, 5, 8192)):
        ranks = Ranks(count, rows, columns, dtype, device="cuda")
        parts, residual, weight = inputs(count, rows, columns, dtype)
        weight = weight.cuda()
        for memory, part in zip(ranks.memory, parts, strict=True):
            memory.part.copy_(part)
            memory.residual.copy_(residual)
            memory.flags.view(torch.int32).copy_(torch.full((1, 1), 1 << 30, dtype=torch.int32))
        for memory in ranks.memory:
            sum_add_rms_norm(memory.part, memory.residual, weight, EPS, memory, whole=True)
        yield from (x for memory in ranks.memory for x in (memory.normed, memory.residual))


DTYPES = torch.bfloat16, torch.float32
CASES: dict[
    str, tuple[Callable[[torch.dtype], Iterator[torch.Tensor]], tuple[torch.dtype, ...]]
] = {
    "rms_norm, add_rms_norm": (norms, DTYPES),
    "qk_norm_rope": (rope, DTYPES),
    "silu_mul, timestep_add, unipc_step": (elementwise, DTYPES),
    "gate_up_silu": (gate_up, (torch.bfloat16,)),
    "interleave_add": (interleaving, DTYPES),
    "attention": (attentions, DTYPES),
    "causal_attention": (causal, DTYPES),
    "image_to_tensor": (image, (torch.uint8,)),
    "conv_input, conv_edges": (halo_input, (torch.float16, *DTYPES)),
    "conv_input_exchange": (halo_exchange, DTYPES),
    "sum_add_rms_norm": (sums, DTYPES),
}
