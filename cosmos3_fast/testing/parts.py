"""The matrix products and attentions of a denoising step, alone, and their FLOP.

They run by the engine's own layers and `ops`, on random inputs of the step's exact shapes, as one
captured graph each; the weights of a call are those of its layer, so they come from memory as they
do in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cosmos3_fast import denoise, ops
from cosmos3_fast.config import CheckpointConfig, Cosmos3PolicyWNArgs, TransformerConfig
from cosmos3_fast.graph import Captured
from cosmos3_fast.layers.linear import MergedColumnLinear
from cosmos3_fast.layers.residual import Residual
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.request import Cosmos3ActionRequest

ROTATED_BYTES = 128 << 20  # inputs of attentions rotate over more than this, past L2


@dataclass(frozen=True)
class StepShape:
    """Sizes of a network call: `tokens` a branch, of which the last layer keeps `noisy`; `und`:
    prompt tokens of each branch, in buffers of `capacity`.
    """

    branches: int
    tokens: int
    noisy: int
    video_tokens: int
    noisy_video: int
    und: tuple[int, ...]
    capacity: int

    @classmethod
    def of(cls, plan: denoise.Plan) -> StepShape:
        """The shape of every step of a plan; all are guided, or none."""
        if len(set(plan.guided)) != 1:
            raise ValueError("the steps differ: measure a request without guidance_interval")
        branches = 1 + plan.guided[0]
        return cls(
            branches=branches,
            tokens=plan.layout.tokens,
            noisy=plan.key.noisy_video + plan.key.noisy_rows,
            video_tokens=plan.layout.video_tokens,
            noisy_video=plan.key.noisy_video,
            und=tuple(len(ids) for ids in plan.prompts[:branches]),
            capacity=plan.key.capacity,
        )

    def product_flop(self, config: TransformerConfig) -> float:
        """FLOP of the products of one network call."""
        hidden, width, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = hidden * (heads + 2 * kv_heads) * width
        rest = hidden * heads * width + 3 * hidden * config.intermediate_size
        rows, last = self.branches * self.tokens, self.branches * self.noisy
        ends = self.video_tokens + self.branches * self.noisy_video
        total = rows * (layers * qkv + (layers - 1) * rest) + last * rest
        return 2.0 * (total + ends * config.patch_latent_dim * hidden)

    def attention_flop(self, config: TransformerConfig) -> float:
        """FLOP of the attentions of one network call."""
        queries = (config.num_hidden_layers - 1) * self.tokens + self.noisy
        keys = sum(self.tokens + und for und in self.und)
        return 4.0 * queries * keys * config.num_attention_heads * config.head_dim


class StepParts:
    """Two captured calls: `products` and `attentions` of one step of a request, on one rank."""

    def __init__(
        self,
        model: Cosmos3Transformer,
        checkpoint: CheckpointConfig,
        request: Cosmos3ActionRequest,
        args: Cosmos3PolicyWNArgs,
    ) -> None:
        if model.mesh.world_size != 1:
            raise ValueError("parts of a step are timed on one rank")
        schedule = denoise.schedule_of(args, checkpoint.scheduler, request.num_inference_steps)
        self.model = model
        self.shape = StepShape.of(denoise.plan(request, checkpoint.transformer, schedule))
        config = model.config
        self.flop = self.shape.product_flop(config) + self.shape.attention_flop(config)
        self._make_inputs()
        with torch.no_grad():
            self.products = Captured(self._products, model.device, True)
            self.attentions = Captured(self._attentions, model.device, True)

    def close(self) -> None:
        """Give the graphs and the inputs back."""
        self.products.reset()
        self.attentions.reset()
        del (
            self._sets,
            self._last_query,
            self._x,
            self._residual,
            self._inner,
            self._attended,
            self._patches,
        )

    def _make_inputs(self) -> None:
        shape, config, device = self.shape, self.model.config, self.model.device

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=device).to(self.model.dtype)

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, rows, groups = config.head_dim, shape.branches * shape.tokens, shape.branches
        self._x, self._residual = (random(rows, config.hidden_size) for _ in range(2))
        self._attended = random(rows, heads * width)
        self._inner = random(rows, config.intermediate_size)
        self._patches = random(shape.video_tokens, config.patch_latent_dim)
        keys = [(groups, n, kv_heads, width) for n in (shape.tokens, shape.capacity)]

        def attention_inputs() -> tuple[torch.Tensor, ...]:
            query = random(groups, shape.tokens, heads, width)
            return query, *(random(*size) for size in keys for _ in range(2))

        self._und_len = torch.tensor(shape.und, dtype=torch.int32, device=device)
        first = attention_inputs()
        nbytes = sum(x.numel() * x.element_size() for x in first)
        count = min(-(-ROTATED_BYTES // nbytes), config.num_hidden_layers)
        self._last_query = first[0][:, : shape.noisy].contiguous()
        more = count - 1 if device.type == "cuda" else 0
        self._sets = [first, *(attention_inputs() for _ in range(more))]

    def _products(self) -> None:
        shape, model, layers = self.shape, self.model, len(self.model.gen)
        model.proj_in(self._patches)
        for index, layer in enumerate(model.gen):
            rows = shape.branches * (shape.tokens if index + 1 < layers else shape.noisy)
            residual, x = self._residual[:rows], self._x[:rows]
            layer.attention.qkv(self._x)
            layer.attention.out.add_to(Residual(residual, model.sums), self._attended[:rows])
            self._gate_up(layer.mlp.gate_up, x)
            layer.mlp.down.add_to(Residual(residual, model.sums), self._inner[:rows])
        if shape.noisy_video:
            model.proj_out(self._x[: shape.branches * shape.noisy_video])

    def _gate_up(self, linear: MergedColumnLinear, x: torch.Tensor) -> None:
        """The product alone; where one kernel does the activation too, that kernel."""
        if ops.gate_up_is_fused(x, linear.weight):
            ops.gate_up_silu(x, linear.weight)
        else:
            linear(x)

    def _attentions(self) -> None:
        layers = len(self.model.gen)
        for index in range(layers):
            query, k, v, und_k, und_v = self._sets[index % len(self._sets)]
            used = query if index + 1 < layers else self._last_query
            ops.attention(used, k, v, und_k, und_v, self._und_len)
