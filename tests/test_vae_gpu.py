"""The VAE on one GPU: float32 without TF32, bf16, a captured encode, the memory plan."""

from __future__ import annotations

import copy

import pytest
import torch
import vae_oracle as oracle

from cosmos3_fast import ops
from cosmos3_fast.config import VAEConfig
from cosmos3_fast.testing import fill_random
from cosmos3_fast.vae import WanVAE

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


def test_float32_equals_the_cpu():
    cpu, gpu = oracle.build(), oracle.build(device=DEVICE)
    for frames in (1, 5):
        pixels = oracle.pixels(frames, 3, 5)
        assert oracle.error(gpu.encode(pixels.to(DEVICE)).cpu(), cpu.encode(pixels)) <= 1e-5
    for frames in (1, 3):
        latents = oracle.latents(frames, 3, 5)
        assert oracle.error(gpu.decode(latents.to(DEVICE)).cpu(), cpu.decode(latents)) <= 1e-5
    grouped = oracle.build(device=DEVICE, max_bytes=1)
    assert oracle.error(grouped.decode(latents.to(DEVICE)).cpu(), cpu.decode(latents)) <= 1e-5


def test_bf16_errs_at_most_twice_as_much_as_diffusers():
    vae = oracle.build(torch.bfloat16, device=DEVICE)
    model = copy.deepcopy(oracle.reference()).to(DEVICE, torch.bfloat16)
    pixels, latents = oracle.pixels(5, 3, 5), oracle.latents(3, 3, 5)
    mean, std = (m.to(DEVICE) for m in oracle.moments(model))
    with torch.no_grad():
        theirs = model.encode(pixels.to(DEVICE, torch.bfloat16)).latent_dist.mean.float()
        shown = model.decode((latents.to(DEVICE) * std + mean).bfloat16()).sample.float()
    truth = oracle.reference_encode(pixels).to(DEVICE)
    ours = vae.encode(pixels.to(DEVICE))
    assert oracle.error(ours, truth) <= 2 * oracle.error((theirs - mean) / std, truth)
    truth = oracle.reference_decode(latents).to(DEVICE)
    ours = vae.decode(latents.to(DEVICE))
    assert oracle.error(ours, truth) <= 2 * oracle.error(shown * 0.5 + 0.5, truth)
    with ops.reference():
        plain = vae.decode(latents.to(DEVICE))
    assert oracle.error(ours, truth) <= 2 * oracle.error(plain, truth)


@pytest.mark.parametrize("frames", [1, 5])
def test_a_captured_encode_is_bit_equal_to_the_eager_one(frames):
    vae = oracle.build(torch.bfloat16, device=DEVICE)
    static = oracle.pixels(frames, 3, 5).to(DEVICE, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        vae.encode(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vae.encode(static)
    for seed in (1, 2):
        static.copy_(oracle.pixels(frames, 3, 5, seed=seed))
        graph.replay()
        assert torch.equal(captured, vae.encode(static))


def test_the_decoder_keeps_to_its_memory_plan():
    bound = 24 << 30
    vae = WanVAE(VAEConfig(), device=DEVICE, dtype=torch.bfloat16, max_bytes=bound)
    fill_random(vae.slots(), 0)
    latents = torch.randn(1, 48, 9, 33, 40, device=DEVICE)
    at_once = vae.decode(latents)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.isfinite(vae.decode(latents)).all()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= bound, f"{peak / 2**30:.1f} GiB"
    vae.max_bytes = 6 << 30
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grouped = vae.decode(latents)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= vae.max_bytes, f"{peak / 2**30:.1f} GiB"
    assert oracle.error(grouped, at_once) <= 2e-2
