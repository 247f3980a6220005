"""Attention for Hopper GPUs: it compiles ahead for sm_90 without a GPU; on one, it is right.

Compiled in a process of its own, in which TRITON_INTERPRET is not set, as in test_kernels_compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from own_process import SHARED_LIMIT, printed

CASES = {
    f"{consumers}-consumers-group-{group}": (consumers, group)
    for consumers in (2, 3)
    for group in (4, 3)
}


def compile_for_sm_90(consumers: int, group: int) -> dict[str, object]:
    """What the kernel takes and what its PTX has, with its production settings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from cosmos3_fast.kernels import attention_hopper as hopper

    kernel = hopper._hopper_kernel
    (tile,) = (t for t in hopper.TILES.values() if t.consumers == consumers)
    pack = hopper.packed(group)
    blocks = {"q_desc": [1, hopper.ROWS // pack, pack, hopper.DIM]}
    blocks |= {x: [1, tile.keys, hopper.DIM] for x in ("k_desc", "v_desc")}
    parts = ("gen_k_desc", "gen_v_desc", "und_k_desc", "und_v_desc")
    blocks |= {x: [1, hopper.BOX, hopper.SWIZZLE // 2] for x in parts}
    constants = {"GROUP": group, "PACK": pack, "KEYS": tile.keys, "CONSUMERS": consumers}
    constants |= {"STAGES": tile.stages, "REGISTERS": tile.registers}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    for name, block in blocks.items():
        layout = NVMMASharedLayout(hopper.SWIZZLE, 16, len(block))
        signature[name] = f"tensordesc<bf16{block},{layout!r}>"
    signature |= {"out_ptr": "*bf16", "und_len_ptr": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(kernel.arg_names)
        if x.endswith(("_ptr", "_row", "_batch"))
    }
    source = GluonASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": 4})
    ptx = built.asm["ptx"]
    log = assemble(ptx)
    found = re.search(r"(\d+) bytes spill stores", log)
    return {
        "shared": built.metadata.shared,
        "warps": built.metadata.num_warps,
        "spilled": int(found[1]) if found else None,
        "slow": [line for line in log.splitlines() if "Performance" in line],
        **{
            x: x in ptx
            for x in ("setmaxnreg.inc", "wgmma.mma_async", "cp.async.bulk.tensor", "ex2.approx.ftz")
        },
    }


def assemble(ptx: str) -> str:
    """What ptxas says about it: serialised products and spilled registers among the rest."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", path, "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_sm_90(name):
    outcome = printed(__file__)[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["shared"] <= SHARED_LIMIT and outcome["warps"] == 4 * CASES[name][0] + 4, outcome
    instructions = ("setmaxnreg.inc", "wgmma.mma_async", "cp.async.bulk.tensor", "ex2.approx.ftz")
    assert all(outcome[x] for x in instructions), outcome
    assert not outcome["slow"] and outcome["spilled"] <= 256, outcome


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def inputs_of(tokens, keys, lengths, heads, capacity, dtype) -> list[torch.Tensor]:
    """Arguments of attention: q, k, v strided views of one buffer; NaN and inf past und_len."""
    batch, (queries, kv) = len(lengths), heads
    q = random(batch, tokens, (queries + 2) * 128, dtype=dtype)[:, :, : queries * 128]
    k, v = random(2, batch, keys, kv, 128, dtype=dtype).unbind()
    und_k, und_v = random(2, batch, capacity, kv, 128, dtype=dtype).unbind()
    for b, length in enumerate(lengths):
        und_k[b, length:], und_v[b, length:] = torch.nan, torch.inf
    und_len = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    return [q.unflatten(2, (queries, 128)), k, v, und_k, und_v, und_len]


SHAPES = {  # tokens, GEN keys, und_len of each batch, heads, capacity
    "S": (406, 406, [160], (32, 8), 256),
    "D": (3093, 3093, [160], (32, 8), 256),
    "E-2-lengths": (1966, 1966, [256, 63], (32, 8), 256),
    "one-of-everything": (1, 1, [1], (4, 1), 1),
    "no-capacity": (63, 129, [0], (8, 2), 0),
    "no-und": (65, 128, [0, 0], (32, 8), 256),
    "whole-blocks": (128, 256, [128], (8, 2), 128),
    "group-1": (333, 257, [1, 77], (8, 8), 96),
    "group-2": (1000, 640, [3], (4, 2), 33),
    "group-3": (100, 190, [64, 65], (6, 2), 65),
    "group-8": (100, 1, [256, 33], (16, 2), 256),
    "group-64": (3, 63, [127], (64, 1), 200),
}


def hopper_tiles() -> list:
    from cosmos3_fast.kernels import attention_hopper as hopper

    return list(hopper.TILES.values())


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", SHAPES)
def test_within_twice_the_error_of_torch(name):
    from cosmos3_fast.kernels import reference
    from cosmos3_fast.kernels.attention import attention_hopper

    torch.manual_seed(0)
    dtype = torch.bfloat16
    inputs = inputs_of(*SHAPES[name], dtype)
    batch, tokens, heads, _ = inputs[0].shape
    eager = reference.attention(*inputs)
    truth = reference.attention(*(x.double() for x in inputs[:5]), inputs[5])
    floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
    bound = max(2 * (eager.double() - truth).abs().max(), floor)
    for tile in hopper_tiles():
        around = torch.full(
            (batch, tokens + 2, (heads + 1) * 128), torch.nan, device="cuda", dtype=dtype
        )
        out = around[:, 1:-1, : heads * 128].unflatten(2, (heads, 128))
        assert attention_hopper(*inputs, out=out, tile=tile) is out
        error = (out.double() - truth).abs().max()
        assert error <= bound, f"{tile}: error {error:.3e} > bound {bound:.3e}"
        assert torch.equal(attention_hopper(*inputs, tile=tile), out), f"{tile}: two runs differ"
        out.zero_()
        assert around.isnan().sum() == around.numel() - out.numel(), f"{tile}: written outside"


@pytest.mark.gpu
@on_hopper
def test_one_graph_serves_every_length():
    from cosmos3_fast.kernels.attention import attention_hopper

    torch.manual_seed(0)
    for tile in hopper_tiles():
        inputs = inputs_of(406, 406, [256, 256], (32, 8), 256, torch.bfloat16)
        out = attention_hopper(*inputs, tile=tile)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attention_hopper(*inputs, out=out, tile=tile)
        for lengths in ([160, 1], [0, 256], [160, 1]):
            inputs[5].copy_(torch.tensor(lengths))
            graph.replay()
            assert torch.equal(out, attention_hopper(*inputs, tile=tile)), (tile, lengths)


@pytest.mark.gpu
@on_hopper
def test_what_it_does_not_take_goes_to_triton():
    from cosmos3_fast.kernels import attention_hopper as hopper
    from cosmos3_fast.kernels.attention import attention, attention_hopper

    for dtype, offset, taken in (
        (torch.bfloat16, 0, True),
        (torch.bfloat16, 1, False),
        (torch.float16, 0, False),
        (torch.float32, 0, False),
    ):
        q, k, v, *und = inputs_of(9, 70, [5], (8, 2), 16, dtype)
        k = random(k.numel() + 8, dtype=dtype)[offset : offset + k.numel()].view(k.shape)
        assert hopper.takes(q, k, v, *und[:2]) is taken
        assert attention(q, k, v, *und).isfinite().all()
        if not taken:
            with pytest.raises(AssertionError):
                attention_hopper(q, k, v, *und)


def main() -> None:
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = compile_for_sm_90(*case)
        except Exception:  # reported by the test of that name
            results[name] = {"error": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
