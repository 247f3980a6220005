"""The blocks of the VAE by themselves, and how much memory a pass plans with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import vae_oracle as oracle

from cosmos3_fast.config import VAEConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.vae import WanVAE
from cosmos3_fast.vae.blocks import AttentionBlock, CausalConv, Pending, Place, Stage
from cosmos3_fast.vae.encoder import DownBlock
from cosmos3_fast.vae.model import LIVE_TENSORS, _cudnn
from cosmos3_fast.vae.strips import Flow, Strips

DOUBLE = Place(torch.device("cpu"), torch.float64)
FLOW = Flow(Strips.plan(Mesh.single("cpu"), 3, 5))


def filled(block):
    draw = torch.Generator().manual_seed(1)
    for weight in block.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw, dtype=weight.dtype))
    return block


def test_attention_sees_the_direction_of_a_pixel_alone():
    """Its norm has no floor that a small activation would meet; zeros stay zeros."""
    block = filled(AttentionBlock(DOUBLE, 8))
    x = torch.randn(1, 8, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[:, :, 1, 2, 4] = 0

    def added(scale):
        return block(Pending(x * scale), FLOW).x - x * scale

    want = added(1.0)
    assert torch.isfinite(want).all() and want.abs().max() > 0.1
    torch.testing.assert_close(added(1e-4), want, rtol=1e-9, atol=1e-9)


def test_a_shortcut_may_average_over_frames_too():
    DownBlock(DOUBLE, Stage(2, 16, space=True, time=True), 1)
    with pytest.raises(ValueError, match="no down-shortcut from 2 to 16 channels, 1 x 2 x 2"):
        DownBlock(DOUBLE, Stage(2, 16, space=True, time=False), 1)


@pytest.mark.parametrize("net", ["encoder", "decoder"])
def test_a_group_is_as_long_as_the_bound_allows_and_groups_are_even(net):
    """bf16: live tensors of the largest size; beside them, in groups alone, a history of two frames
    a convolution."""
    vae = WanVAE(VAEConfig(), device="meta", dtype=torch.bfloat16, mesh=Mesh.single("meta"))
    net, strips = getattr(vae, net), Strips.plan(vae.mesh, 2, 3)

    def groups(most, frames, less=0):
        sizes = list(net.sizes(most, 2, 3, first=most == frames))
        planned = LIVE_TENSORS * max(size for size, _ in sizes)
        if most < frames:
            planned += 2 * sum(plane for _, plane in sizes)
        vae.max_bytes = 2 * planned - less
        return vae._groups(net, strips, frames, 2, 3)

    assert groups(9, 9) == [(0, 9)] != groups(9, 9, less=1)
    assert groups(5, 9) == [(0, 5), (5, 9)]
    assert groups(5, 9, less=1) == groups(4, 9) == [(0, 3), (3, 6), (6, 9)]


def test_the_encoders_sizes_are_those_of_its_convolutions(monkeypatch):
    """Elements of each padded input, and of one frame of it, in the blocks that resample."""
    vae, seen, convolve = oracle.build(), [], CausalConv._convolve
    inside = {id(part) for part in vae.encoder.down_blocks.modules()}

    def record(conv, padded, flow, history):
        if id(conv) in inside:
            seen.append((padded.numel(), padded[:, :, 0].numel()))
        return convolve(conv, padded, flow, history)

    monkeypatch.setattr(CausalConv, "_convolve", record)
    vae.encode(oracle.pixels(9, 2, 3))
    assert seen == list(vae.encoder.sizes(3, 2, 3, first=True))


def test_members_past_the_stages_count_for_nothing():
    longer = dataclasses.replace(oracle.config(), temperal_downsample=(False, True, True, True))
    vae = WanVAE(longer, device="meta", dtype=torch.float32)
    assert [stage.time for stage in vae.encoder.stages] == [False, True, True, False]


@pytest.mark.parametrize("search", [True, False], ids=["search", "no search"])
def test_cudnns_flags_are_the_passs_own(search):
    cudnn = torch.backends.cudnn

    def flags():
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic

    with torch.backends.cudnn.flags(enabled=False, benchmark=not search, deterministic=False):
        with pytest.raises(KeyError), _cudnn(torch.device("cuda"), search=search):
            assert flags() == (True, search, True)
            raise KeyError
        assert flags() == (False, not search, False)
