"""The two towers: UND reads the prompt once, GEN denoises video and action against its keys and
values.

UND never sees GEN nor the timestep, so a prompt's keys and values are a function of the prompt
alone. GEN is one call a step: `velocity(inputs)` reads static tensors only, so that the call can be
captured (docs/model.md, section 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.layers.attention import GEN, UND, Attention
from cosmos3_fast.layers.embeddings import DomainLinear, TimestepEmbedding
from cosmos3_fast.layers.linear import ReplicatedLinear, empty
from cosmos3_fast.layers.mlp import GatedMLP
from cosmos3_fast.layers.norm import RMSNorm
from cosmos3_fast.layers.residual import Residual
from cosmos3_fast.layers.rotary import Rotary, text_positions
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_sum import RowSums
from cosmos3_fast.transfer import upload

UNUSED = ("norm.", "lm_head.", "audio_")  # known tensors of the family that this path does not read


@dataclass(frozen=True)
class Adapter:
    """One domain's action projections: w_in [A, H], b_in [H], w_out [H, A], b_out [A]."""

    w_in: torch.Tensor
    b_in: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor


@dataclass(frozen=True)
class GenInputs:
    """What one GEN call reads. G branches (conditional, unconditional) share the M tokens, video
    then action.

    video [Nv, P], action [Na, A] in the network's dtype; table [S, H] and step int32 [1] give the
    timestep embedding of the `noisy` uint8 [M] tokens; cos, sin [G, M, D/2] float32; und_k, und_v
    [L, G, C, Hk, D] of which the first und_len int32 [G] rows are the prompt. video_rows,
    action_rows int64: the tokens whose velocity is used.
    """

    video: torch.Tensor
    action: torch.Tensor
    adapter: Adapter
    table: torch.Tensor
    step: torch.Tensor
    noisy: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    und_k: torch.Tensor
    und_v: torch.Tensor
    und_len: torch.Tensor
    video_rows: torch.Tensor
    action_rows: torch.Tensor

    def branches(self, first: int, last: int) -> GenInputs:
        """The same inputs for branches first..last-1 (views)."""
        part = slice(first, last)
        return GenInputs(
            **vars(self)
            | {
                "cos": self.cos[part],
                "sin": self.sin[part],
                "und_k": self.und_k[:, part],
                "und_v": self.und_v[:, part],
                "und_len": self.und_len[part],
            }
        )


class Tower(nn.Module):
    """One tower's layer: two norms, attention, MLP. `tower` is "und" or "gen"."""

    def __init__(
        self,
        config: TransformerConfig,
        index: int,
        tower: str,
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        prefix, suffix = f"layers.{index}", "_moe_gen" if tower == "gen" else ""
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        size, eps = config.hidden_size, config.rms_norm_eps
        names = GEN if tower == "gen" else UND
        self.norm_in = RMSNorm(size, eps, f"{prefix}.input_layernorm{suffix}", **place)
        self.attention = Attention(config, f"{prefix}.self_attn", names, mesh, **place)
        self.norm_mlp = RMSNorm(size, eps, f"{prefix}.post_attention_layernorm{suffix}", **place)
        self.mlp = GatedMLP(config, f"{prefix}.mlp{suffix}", mesh, **place)

    def finish(self, residual: Residual, attended: torch.Tensor) -> None:
        """Add output projection and MLP to residual [M, H]."""
        self.attention.out.add_to(residual, attended)
        self.mlp.add_to(residual, self.norm_mlp(residual))


class Cosmos3Transformer(nn.Module):
    """This rank's part of both towers and the projections around them.

    `deadline`: seconds that a kernel waits for the other ranks' products.
    """

    unused = UNUSED
    und: Sequence[Tower]
    gen: Sequence[Tower]

    def __init__(
        self,
        config: TransformerConfig,
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
        deadline: float = 30.0,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.dtype, self.device = config, mesh, dtype, device
        self.sums = RowSums(mesh, deadline=deadline)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, patch, action = config.hidden_size, config.patch_latent_dim, config.action_dim
        layers, domains = range(config.num_hidden_layers), config.num_embodiment_domains
        self.embed_tokens = empty(config.vocab_size, hidden, **place)
        und, gen = (
            nn.ModuleList(Tower(config, i, tower, mesh, **place) for i in layers)
            for tower in ("und", "gen")
        )
        self.und, self.gen = cast("Sequence[Tower]", und), cast("Sequence[Tower]", gen)
        self.norm_gen = RMSNorm(hidden, config.rms_norm_eps, "norm_moe_gen", **place)
        self.proj_in = ReplicatedLinear(patch, hidden, "proj_in", **place)
        self.proj_out = ReplicatedLinear(hidden, patch, "proj_out", **place)
        self.time = TimestepEmbedding(config, "time_embedder", device=device)
        self.action_in = DomainLinear(action, hidden, domains, "action_proj_in", **place)
        self.action_out = DomainLinear(hidden, action, domains, "action_proj_out", **place)
        self.action_modality_embed = empty(hidden, **place)
        self.rotary = Rotary(config, device)

    def slots(self) -> dict[str, Slot]:
        """Checkpoint key -> where this rank keeps its part."""
        slots = {
            "embed_tokens.weight": Slot(self.embed_tokens, tuple(self.embed_tokens.shape)),
            "action_modality_embed": Slot(
                self.action_modality_embed, tuple(self.action_modality_embed.shape)
            ),
        }
        for module in self.modules():
            if module is not self and hasattr(module, "slots"):
                slots |= module.slots()  # type: ignore[operator]
        return slots

    def adapter(self, domain: int) -> Adapter:
        """One domain's action projections (views); the modality embedding stays separate, as it is
        rounded apart.
        """
        return Adapter(*self.action_in.of_domain(domain), *self.action_out.of_domain(domain))

    def timestep_table(self, timesteps: Sequence[int]) -> torch.Tensor:
        """Timestep embeddings of a whole schedule, [len(timesteps), H] in the network's dtype."""
        return self.time(timesteps).to(self.dtype)

    def encode_prompt(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a prompt of n tokens in every layer: two tensors [L, n, Hk / tp, D].

        The last layer stops after its keys and values: nothing reads its output.
        """
        count, first = len(ids), self.und[0].attention
        shape = (len(self.und), count, first.kv_heads, first.dim)
        keys = torch.empty(shape, device=self.device, dtype=self.dtype)
        values = torch.empty_like(keys)
        cos, sin = self.rotary.tables(text_positions(count, self.device))
        tokens = upload(torch.tensor(ids, device="cpu"), self.device)
        x = Residual(self.embed_tokens[tokens], self.sums)
        for index, layer in enumerate(self.und):
            k, v = keys[index], values[index]
            q = layer.attention.project(layer.norm_in(x), cos, sin, k, v)
            if index + 1 < len(self.und):
                layer.finish(x, ops.causal_attention(q, k, v).flatten(1))
        return keys, values

    def velocity(self, inputs: GenInputs, out: torch.Tensor) -> torch.Tensor:
        """One network call for G branches; writes out [G, Nv * P + Na * A], whose clean rows keep
        their value (0).

        The last layer computes only the tokens whose velocity is used.
        """
        groups, tokens = inputs.cos.shape[:2]
        rows = torch.cat((inputs.video_rows, inputs.action_rows + inputs.video.shape[0]))
        cos, sin = inputs.cos.flatten(0, 1), inputs.sin.flatten(0, 1)
        x = self._stream(self._embed(inputs), groups)
        for index, layer in enumerate(self.gen):
            attention, last = layer.attention, index + 1 == len(self.gen)
            normed = layer.norm_in(x, whole=last)
            keys = normed.new_empty(2, groups * tokens, attention.kv_heads, attention.dim)
            q = attention.project(normed, cos, sin, keys[0], keys[1])
            q = q.unflatten(0, (groups, tokens))
            if last:
                q, x = q.index_select(1, rows), x.select(groups, rows)
            k, v = keys.unflatten(1, (groups, tokens))
            und = inputs.und_k[index], inputs.und_v[index], inputs.und_len
            attended = ops.attention(q, k, v, *und)
            layer.finish(x, attended.flatten(2).flatten(0, 1))
        self._project(self.norm_gen(x).unflatten(0, (groups, -1)), inputs, out)
        return out

    def failure(self) -> str | None:
        """Which ranks' products did not come before the deadline; None if all did. Waits for the
        device. After a failure no result is to be used.
        """
        return self.sums.failure()

    def _stream(self, x: torch.Tensor, groups: int) -> Residual:
        """x [M, H] for each group, as a residual [G * M, H]."""
        stream = self.sums.residual(groups * x.shape[0], x.shape[1], x.dtype)
        stream.view(groups, *x.shape).copy_(x)
        return Residual(stream, self.sums)

    def _embed(self, inputs: GenInputs) -> torch.Tensor:
        """[M, H]: projected patches and action rows, the timestep embedding added to the noisy
        ones.
        """
        video = self.proj_in(inputs.video)
        adapter = inputs.adapter
        action = torch.addmm(adapter.b_in, inputs.action, adapter.w_in) + self.action_modality_embed
        x = torch.cat((video, action))
        return ops.timestep_add(x, inputs.table, inputs.step, inputs.noisy)

    def _project(self, x: torch.Tensor, inputs: GenInputs, out: torch.Tensor) -> None:
        """x [G, noisy, H] -> velocities of the noisy video and action tokens, put into out."""
        groups, (patches, width) = x.shape[0], inputs.video.shape
        split, adapter = inputs.video_rows.shape[0], inputs.adapter
        video = out[:, : patches * width].view(groups, patches, width)
        action = out[:, patches * width :].view(groups, *inputs.action.shape)
        if split:
            video.index_copy_(1, inputs.video_rows, self.proj_out(x[:, :split]).to(out.dtype))
        if inputs.action_rows.shape[0]:
            velocity = torch.matmul(x[:, split:], adapter.w_out) + adapter.b_out
            action.index_copy_(1, inputs.action_rows, velocity.to(out.dtype))


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of every parameter and buffer of a module on this rank."""
    tensors: Iterator[torch.Tensor] = (*module.parameters(), *module.buffers()).__iter__()
    return sum(t.numel() * t.element_size() for t in tensors)
