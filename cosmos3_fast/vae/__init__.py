"""Wan2.2's VAE (diffusers' AutoencoderKLWan, is_residual), exact over strips on all ranks."""

from cosmos3_fast.vae.model import WanVAE

__all__ = ["WanVAE"]
