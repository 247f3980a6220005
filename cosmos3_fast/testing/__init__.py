"""For tests, demos and benchmarks: tiny checkpoints, random weights of any size, the real model's shapes."""

from .fill import fill_random, random_tensor, write_sharded
from .shapes import (
    NANO_SCHEDULER,
    NANO_TRANSFORMER,
    NANO_VAE,
    transformer_shapes,
    vae_shapes,
)
from .tiny import make_tiny_checkpoint

__all__ = [
    "NANO_SCHEDULER",
    "NANO_TRANSFORMER",
    "NANO_VAE",
    "fill_random",
    "make_tiny_checkpoint",
    "random_tensor",
    "transformer_shapes",
    "vae_shapes",
    "write_sharded",
]
