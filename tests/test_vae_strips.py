"""The VAE in strips over several ranks equals one rank; with the halo off it must not."""

from __future__ import annotations

import pytest
import ranks
import torch
import vae_oracle as oracle

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.vae.strips import Strips

EXACT = 1e-5
# Latent sizes and the sides that are cut: even and uneven strips, and more ranks than rows.
SIZES = {"4x8": (4, 8), "3x5": (3, 5), "9x2": (9, 2), "1x3": (1, 3)}


@pytest.fixture(scope="module")
def one():
    return oracle.build()


def decode_on(size: int, latents: torch.Tensor, **options):
    halo = options.pop("halo", True)
    gather = options.pop("gather", "all")
    return oracle.on_ranks(
        size,
        lambda mesh: oracle.build(mesh=mesh, **options).decode(latents, gather=gather),
        halo=halo,
    )


def encode_on(size: int, pixels: torch.Tensor, *, halo: bool = True, **options):
    return oracle.on_ranks(
        size, lambda mesh: oracle.build(mesh=mesh, **options).encode(pixels), halo=halo
    )


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_decode_equals_one_rank(one, size, name):
    latents = oracle.latents(2, *SIZES[name])
    want = one.decode(latents)
    results = decode_on(size, latents)
    assert oracle.error(results[0], want) <= EXACT
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_encode_equals_one_rank(one, size, name, frames):
    pixels = oracle.pixels(frames, *SIZES[name])
    want = one.encode(pixels)
    results = encode_on(size, pixels)
    assert oracle.error(results[0], want) <= EXACT
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("size", [2, 3])
def test_groups_and_strips_together(one, size):
    latents, pixels = oracle.latents(3, 3, 5), oracle.pixels(9, 3, 5)
    assert oracle.error(decode_on(size, latents, max_bytes=1)[0], one.decode(latents)) <= EXACT
    assert oracle.error(encode_on(size, pixels, max_bytes=1)[0], one.encode(pixels)) <= EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_with_the_halo_off_the_check_fails(one, size):
    latents, pixels = oracle.latents(2, 3, 5), oracle.pixels(5, 3, 5)
    assert oracle.error(decode_on(size, latents, halo=False)[0], one.decode(latents)) > 1e-2
    assert oracle.error(encode_on(size, pixels, halo=False)[0], one.encode(pixels)) > 1e-2


def test_only_rank_0_gets_pixels_when_asked(one):
    latents = oracle.latents(2, 3, 5)
    results = decode_on(3, latents, gather="rank0")
    assert oracle.error(results[0], one.decode(latents)) <= EXACT
    assert results[1:] == [None, None]


@pytest.mark.parametrize(
    ("height", "width", "ranks", "axis", "sizes"),
    [
        (33, 40, 1, 4, (40,)),
        (33, 40, 2, 4, (20, 20)),
        (33, 40, 3, 3, (11, 11, 11)),
        (33, 40, 4, 4, (10, 10, 10, 10)),
        (33, 40, 8, 4, (5,) * 8),
        (34, 46, 4, 4, (12, 12, 11, 11)),
        (30, 52, 4, 4, (13, 13, 13, 13)),
        (5, 3, 8, 3, (1, 1, 1, 1, 1, 0, 0, 0)),
    ],
    ids=str,
)
def test_the_better_dividing_side_is_cut(height, width, ranks, axis, sizes):
    mesh = oracle.ThreadMesh(0, ranks, {}, True)
    strips = Strips.plan(mesh, height, width)
    assert (strips.axis, strips.sizes) == (axis, sizes)


def case_gloo() -> dict:
    mesh = Mesh.create(ParallelConfig(3, 1, 3), "cpu")
    try:
        vae = oracle.build(mesh=mesh)
        pixels = vae.decode(oracle.latents(2, 2, 5))
        return {"pixels": pixels, "latents": vae.encode(oracle.pixels(5, 2, 5))}
    finally:
        mesh.close()


def test_over_gloo_processes(one):
    results = ranks.run_cases(3, [case_gloo])["case_gloo"]
    for result in results:
        assert oracle.error(result["pixels"], one.decode(oracle.latents(2, 2, 5))) <= EXACT
        assert oracle.error(result["latents"], one.encode(oracle.pixels(5, 2, 5))) <= EXACT
        assert torch.equal(result["pixels"], results[0]["pixels"])
