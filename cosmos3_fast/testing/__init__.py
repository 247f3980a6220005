"""For tests, demos and benchmarks: tiny checkpoints, random weights, the real model's shapes."""

from cosmos3_fast.testing.fill import fill_random, random_tensor, write_sharded
from cosmos3_fast.testing.shapes import (
    NANO_SCHEDULER,
    NANO_TRANSFORMER,
    NANO_VAE,
    transformer_shapes,
    vae_shapes,
)
from cosmos3_fast.testing.tiny import make_nano_folder, make_tiny_checkpoint

__all__ = [
    "NANO_SCHEDULER",
    "NANO_TRANSFORMER",
    "NANO_VAE",
    "fill_random",
    "make_nano_folder",
    "make_tiny_checkpoint",
    "random_tensor",
    "transformer_shapes",
    "vae_shapes",
    "write_sharded",
]
