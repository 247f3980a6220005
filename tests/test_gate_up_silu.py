"""The fused gate-up product: what runs for which tensors, that it compiles ahead for sm_90, and on
a GPU its results.

The kernel is Gluon's, which Triton's interpreter does not run: its maths is checked on a GPU alone.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from own_process import SHARED_LIMIT, printed
from test_kernels_interpreter import Guarded, assert_close, double

from cosmos3_fast import ops
from cosmos3_fast.kernels import gate_up_silu as gus
from cosmos3_fast.kernels import reference

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def compile_ahead() -> dict[str, object]:
    """What the compiler makes of the kernel with its production settings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    def described(*block: int) -> str:
        return f"tensordesc<bf16{list(block)},{gus._layout(*block)!r}>"

    constants = {x: getattr(gus, x) for x in ("ROWS", "COLUMNS", "DEPTH", "STAGES")}
    constants["REGISTERS"], constants["PRODUCER_REGISTERS"] = gus.REGISTERS
    signature = {
        "x_desc": described(gus.ROWS, gus.DEPTH),
        "weight_desc": described(2, gus.COLUMNS, gus.DEPTH),
        "out_desc": described(gus.ROWS // 2, gus.COLUMNS),
    }
    signature |= dict.fromkeys(("m_tiles", "n_tiles", "depth", "group"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(gus._gate_up_silu_kernel, signature, constants)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": 4})
    return {"shared": built.metadata.shared, "ptx": built.asm["ptx"]}


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16",
        "cp.async.bulk.tensor.3d.shared",
        "cp.async.bulk.tensor.2d.global",
        "setmaxnreg.inc",
    ],
)
def test_compiles_for_sm_90(instruction):
    assert instruction in printed(__file__)["ptx"]


def test_shared_memory_is_enough():
    assert 0 < printed(__file__)["shared"] <= SHARED_LIMIT


@pytest.mark.parametrize("row", gus.GATE_UP_CHOICE, ids=str)
def test_a_measured_shape_gets_its_own_row(row):
    assert gus.choice(*row) == gus.GATE_UP_CHOICE[row]


@pytest.mark.parametrize(
    "shape", [(1, 1), (500, 12000), (1500, 3000), (2752, 9000), (10**5, 10**4)]
)
def test_any_other_shape_gets_the_nearest_row(shape):
    def ratio(row: tuple[int, int]) -> float:
        return math.hypot(*(math.log(a / b) for a, b in zip(row, shape, strict=True)))

    nearest = sorted(gus.GATE_UP_CHOICE, key=ratio)[0]
    assert gus.choice(*shape) == gus.GATE_UP_CHOICE[nearest]


def test_both_choices_are_known():
    assert set(gus.GATE_UP_CHOICE.values()) == {"fused", "pair"}


def test_nothing_is_fused_on_the_cpu():
    rows, inner = next(row for row, way in gus.GATE_UP_CHOICE.items() if way == "fused")
    x = torch.empty(rows, 8, dtype=torch.bfloat16)
    assert not gus.is_fused(x, torch.empty(2 * inner, 8, dtype=torch.bfloat16))
    assert not ops.gate_up_is_fused(x, torch.empty(2 * inner, 8, dtype=torch.bfloat16))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


@gpu
@hopper
@pytest.mark.parametrize("inner", [8, 1000, 3072])
@pytest.mark.parametrize("depth", [8, 1000, 4096])
@pytest.mark.parametrize("rows", [1, 63, 1000])
def test_fused_is_as_exact_as_torch(rows, depth, inner):
    torch.manual_seed(0)
    x = random(rows, depth + 8, dtype=torch.bfloat16)[:, :depth]
    weight = random(2 * inner, depth, dtype=torch.bfloat16) / depth**0.5
    guarded = Guarded("cuda")
    out = guarded(rows, inner, dtype=torch.bfloat16, gap=16)
    assert gus.gate_up_silu_fused(x, weight, out=out) is out
    assert_close(out, reference.gate_up_silu(x, weight), reference.gate_up_silu(*double(x, weight)))
    assert torch.equal(gus.gate_up_silu_fused(x, weight), out)
    guarded.check()


@gpu
@hopper
def test_fused_of_values_past_the_exponential():
    """Gates far from 0: exp overflows, and silu is 0 or the gate itself."""
    gates = torch.tensor([-3e38, -1000.0, -80.0, -1.0, 0.0, 1.0, 80.0, 1000.0], device="cuda")
    weight = torch.cat((gates, torch.ones_like(gates)))[:, None].expand(-1, 8).bfloat16()
    x = torch.zeros(1, 8, device="cuda", dtype=torch.bfloat16)
    x[0, 0] = 1.0
    got = gus.gate_up_silu_fused(x, weight.contiguous())
    truth = torch.nn.functional.silu(gates.bfloat16().double())
    assert torch.equal(got[0], truth.bfloat16())


@gpu
@hopper
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_and_stride_has_a_way(kind):
    torch.manual_seed(0)
    x, weight = random(63, 41, dtype=kind)[:, 1:], random(2 * 24, 40, dtype=kind) / 40**0.5
    guarded = Guarded("cuda")
    out = guarded(63, 24, dtype=kind, gap=1)
    gus.gate_up_silu(x, weight, out=out)
    assert_close(out, reference.gate_up_silu(x, weight), reference.gate_up_silu(*double(x, weight)))
    guarded.check()


if __name__ == "__main__":
    print(json.dumps(compile_ahead()))
