"""One tower's attention weights: merged QKV, per-head norms, output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.layers.linear import MergedColumnLinear, RowLinear, empty, share
from cosmos3_fast.parallel import Mesh

UND = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
GEN = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")


class Attention(nn.Module):
    """Projections of one tower in one layer. `names` are its six keys (`UND` or `GEN`) under
    `prefix`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        prefix: str,
        names: tuple[str, ...],
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        q, k, v, out, self.q_norm_name, self.k_norm_name = (f"{prefix}.{n}" for n in names)
        self.dim, self.eps = config.head_dim, config.rms_norm_eps
        self.heads = share(config.num_attention_heads, mesh, "num_attention_heads")
        self.kv_heads = share(config.num_key_value_heads, mesh, "num_key_value_heads")
        width, kv_width = (
            n * self.dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        parts = {q: width, k: kv_width, v: kv_width}
        self.qkv = MergedColumnLinear(config.hidden_size, parts, mesh, **place)
        self.out = RowLinear(width, config.hidden_size, out, mesh, **place)
        self.q_norm = empty(self.dim, device=device, dtype=dtype)
        self.k_norm = empty(self.dim, device=device, dtype=dtype)

    def project(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_out: torch.Tensor,
        v_out: torch.Tensor,
    ) -> torch.Tensor:
        """Normed and rotated queries [M, Hq, D] of x [M, H]; keys and values go into k_out, v_out
        [M, Hk, D].
        """
        q_out = x.new_empty(x.shape[0], self.heads, self.dim)
        ops.qk_norm_rope(
            self.qkv(x),
            self.q_norm,
            self.k_norm,
            cos,
            sin,
            self.eps,
            q_out=q_out,
            k_out=k_out,
            v_out=v_out,
        )
        return q_out

    def slots(self) -> dict[str, Slot]:
        norms = {self.q_norm_name: self.q_norm, self.k_norm_name: self.k_norm}
        return (
            self.qkv.slots()
            | self.out.slots()
            | {f"{name}.weight": Slot(t, tuple(t.shape)) for name, t in norms.items()}
        )
