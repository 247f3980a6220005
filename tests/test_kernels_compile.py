"""Every Triton kernel compiles ahead for sm_90, without a GPU, with its production settings.

In a process of its own, in which TRITON_INTERPRET is not set: that would turn every kernel into an
object that cannot be compiled.
"""

from __future__ import annotations

import json
import traceback

import pytest
from own_process import SHARED_LIMIT, printed

KERNELS = (
    "rms_norm",
    "add_rms_norm",
    "qk_norm_rope",
    "qk_norm_rope-tp4",
    "attention",
    "attention-tma",
    "attention-float32",
    "causal_attention-160",
    "causal_attention-1024",
    "causal_attention-4096",
    "causal_attention-float32",
    "silu_mul",
    "timestep_add",
    "unipc_step-1-branch",
    "unipc_step-2-branches",
    "interleave_add-1024",
    "interleave_add-512",
    "interleave_add-float32",
)


def settings(name: str):
    """(kernel, types of arguments neither pointers to its dtype nor i32, constants, warps)."""
    from cosmos3_fast.kernels import (
        attention,
        causal_attention,
        interleave_add,
        qk_norm_rope,
        rms_norm,
        silu_mul,
        timestep_add,
        unipc_step,
    )

    op, _, variant = name.partition("-")
    if op in ("rms_norm", "add_rms_norm"):
        constants = {"ADD": op == "add_rms_norm", "BLOCK": 4096}
        return rms_norm._rms_norm_kernel, {"eps": "fp32"}, constants, rms_norm._warps(4096)
    if op == "qk_norm_rope":
        heads, warps = qk_norm_rope.TILE
        queries, keys = (8, 2) if variant else (32, 8)
        constants = {"QUERIES": queries, "KEYS": keys, "HALF": 64, "HEADS": heads}
        types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
        return qk_norm_rope._qk_norm_rope_kernel, types, constants, warps
    if op == "silu_mul":
        block, warps = silu_mul.TILES[2]
        return silu_mul._silu_mul_kernel, {}, {"BLOCK": block}, warps
    if op == "timestep_add":
        types = {"step_ptr": "*i32", "noisy_ptr": "*u8"}
        return timestep_add._timestep_add_kernel, types, {"BLOCK": 4096}, 8
    if op == "unipc_step":
        block, warps = unipc_step.TILE
        floats = ("sample", "last_sample", "x0_prev", "x0_prev2", "clean", "coef")
        types = {f"{x}_ptr": "*fp32" for x in floats}
        types |= {"step_ptr": "*i32", "noisy_ptr": "*u8"}
        constants = {"GUIDED": variant == "2-branches", "BLOCK": block}
        return unipc_step._unipc_step_kernel, types, constants, warps
    size = 4 if variant == "float32" else 2
    if op == "interleave_add":  # of D: 1024 channels and frames doubled, from 1024 to 512 without
        block, warps = interleave_add.TILES[size]
        constants = {"TIME": 2, "CHANNELS": 1024, "SHARE": 1, "BLOCK": block}
        if variant == "512":
            constants |= {"TIME": 1, "CHANNELS": 512, "SHARE": 2}
        return interleave_add._interleave_add_kernel, {}, constants, warps
    constants, types = {"GROUP": 4, "DIM": 128}, {"scale": "fp32"}
    if op == "causal_attention":
        tile = causal_attention.tile_for(int(variant), 2) if size == 2 else causal_attention.FLOAT32
        constants |= {"ROWS": tile.rows, "KEYS": tile.keys, "STAGES": tile.stages}
        constants |= {"TMA": tile.tma, "SPLIT": tile.split}
        block = f"tensordesc<bf16[{tile.keys}, 128]>" if tile.tma else None
        (types if tile.tma else constants).update(k_desc=block, v_desc=block)
        return causal_attention._causal_kernel, types, constants, tile.warps
    types |= {"und_len_ptr": "*i32"}
    tile = attention.TILES[size]
    tile = tile._replace(tma=variant == "tma")
    constants |= {"ROWS": tile.rows, "KEYS": tile.keys, "TAIL": tile.tail, "STAGES": tile.stages}
    constants |= {"TMA": tile.tma}
    descriptors = ("k_desc", "v_desc", "und_k_desc", "und_v_desc")
    if tile.tma:
        types |= dict.fromkeys(descriptors, f"tensordesc<bf16[{tile.keys}, 128]>")
    else:
        constants |= dict.fromkeys(descriptors)
    return attention._attention_kernel, types, constants, tile.warps


def compile_for_h100(name: str) -> dict[str, int]:
    """Bytes of shared memory and of the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, types, constants, warps = settings(name)
    floats = "*fp32" if name.endswith("float32") else "*bf16"
    signature = {x: floats if x.endswith("_ptr") else "i32" for x in kernel.arg_names}
    signature |= types | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(kernel.arg_names)
        if x.endswith(("_ptr", "_row", "_batch", "_stride", "width", "size"))
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps})
    return {"shared": built.metadata.shared, "size": len(built.asm["cubin"])}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm_90(name):
    outcome = printed(__file__)[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["size"] > 0 and outcome["shared"] <= SHARED_LIMIT, outcome


def main() -> None:
    results = {}
    for name in KERNELS:
        try:
            results[name] = compile_for_h100(name)
        except Exception:  # reported by the test of that name
            results[name] = {"error": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
