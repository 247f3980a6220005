"""Upsampling by phases against what it stands for: nearest by two, then a 3x3 convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import vae_oracle as oracle

from cosmos3_fast.parallel import Mesh
from cosmos3_fast.vae.blocks import Pending, Place, Stage
from cosmos3_fast.vae.strips import Flow, Strips
from cosmos3_fast.vae.upsample import PhaseConv, Upsample, phase_taps

F64 = torch.float64
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
SIZES = [(1, 1, 1), (2, 3, 5), (3, 1, 4), (1, 33, 2)]  # frames, height, width
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def direct(frames: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """frames [T, C, H, W] -> [T, O, 2 H, 2 W]."""
    return F.conv2d(F.interpolate(frames, scale_factor=2, mode="nearest"), weight, padding=1)


def by_phases(frames: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same by the phases, put in their places one by one."""
    count, _, height, width = frames.shape
    padded = F.pad(frames, (1, 1, 1, 1))
    out = frames.new_full((count, len(weight), 2 * height, 2 * width), torch.nan)
    for (p, q), taps in zip(PHASES, phase_taps(weight), strict=True):
        phase = F.conv2d(padded, taps)
        out[:, :, p::2, q::2] = phase[:, :, p : p + height, q : q + width]
    return out


def flow() -> Flow:
    return Flow(Strips.plan(Mesh.single("cpu"), 1, 1))


def filled(layer: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    for i, parameter in enumerate(layer.parameters()):
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_(random(*parameter.shape, seed=seed + i, dtype=parameter.dtype) * scale)
    return layer


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_phases_are_the_convolution_of_the_doubled_picture(shape):
    frames, height, width = shape
    x, weight = random(frames, 5, height, width), random(4, 5, 3, 3, seed=1)
    torch.testing.assert_close(by_phases(x, weight), direct(x, weight), rtol=0, atol=1e-12)


def test_each_tap_counts():
    """One tap of the nine at a time, so that none can make up for another."""
    x = random(1, 1, 3, 4)
    for tap in range(9):
        weight = torch.zeros(1, 1, 3, 3, dtype=F64)
        weight.view(-1)[tap] = 1
        assert torch.equal(by_phases(x, weight), direct(x, weight)), tap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_taps_are_summed_in_float32_and_rounded_once(device, dtype):
    weight = random(33, 40, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    taps = phase_taps(weight.to(device)).cpu()
    assert taps.dtype == dtype and taps.shape == (4, 33, 40, 2, 2)
    wide, groups = weight.double(), (((0,), (1, 2)), ((0, 1), (2,)))
    for (p, q), got in zip(PHASES, taps, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        for a in range(2):
            for b in range(2):
                want = wide[:, :, groups[p][a]][:, :, :, groups[q][b]].sum((2, 3))
                if dtype == torch.float32:
                    torch.testing.assert_close(got[:, :, a, b].double(), want, rtol=0, atol=2e-6)
                else:  # three additions in float32 are exact but for a last bit of theirs
                    off = (got[:, :, a, b] != want.to(dtype)).float().mean()
                    assert off < 1e-3, (p, q, a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_errs_at_most_twice_as_much_as_the_direct_form(device):
    x = random(3, 64, 9, 7).to(torch.bfloat16)
    weight = (random(48, 64, 3, 3, seed=1) / 24).to(torch.bfloat16)
    truth = direct(x.double(), weight.double())
    ours, plain = (
        (run(x.to(device), weight.to(device)).cpu().double() - truth).norm()
        for run in (by_phases, direct)
    )
    assert 0 < ours <= 2 * plain


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_layer_pads_after_the_pending_bias(bias):
    conv = filled(PhaseConv(Place(torch.device("cpu"), F64), 6, 6))
    x = random(1, 6, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    pending = random(6, seed=7) if bias else None
    phases, left = conv(Pending(x, pending), flow())
    assert left is conv.bias
    assert [tuple(phase.shape) for phase in phases] == [(3, 6, 5, 6)] * 4
    settled = x if pending is None else x + pending.view(-1, 1, 1, 1)
    want = direct(settled[0].transpose(0, 1), conv.weight)
    for (p, q), phase in zip(PHASES, phases, strict=True):
        got = phase[:, :, p : p + 4, q : q + 5]
        torch.testing.assert_close(got, want[:, :, p::2, q::2], rtol=0, atol=1e-12)


def duplicated(x: torch.Tensor, out: int, time: int, *, first: bool) -> torch.Tensor:
    """diffusers' DupUp3D: channels repeated, then unfolded into frames, rows and columns."""
    _, into, frames, height, width = x.shape
    y = x.repeat_interleave(out * 4 * time // into, 1)
    y = y.view(1, out, time, 2, 2, frames, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
    y = y.reshape(1, out, frames * time, 2 * height, 2 * width)
    return y[:, :, time - 1 :] if first else y


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("into", "out", "time"),
    [(8, 8, True), (8, 4, False), (8, 4, True), (16, 4, False), (32, 4, True)],
)
def test_the_block_is_the_convolution_plus_the_duplicated_input(into, out, time, first):
    layer = filled(Upsample(Place(torch.device("cpu"), F64), Stage(into, out, True, time)))
    x, whole = random(1, out, 3, 2, 5), random(1, into, 3, 2, 5, seed=2)
    pending = random(into, seed=3) if layer.uniform else None
    run = Flow(flow().strips, first=first, history=None if first else {})
    got = layer(Pending(x.clone()), Pending(whole, pending), run).settle().x
    if time:
        again = Flow(run.strips, first=first, history=None if first else {})
        x = layer._double_frames(Pending(x), layer.time_conv, again).x
    frames = x[0].transpose(0, 1)
    conv = layer.resample["1"]
    want = (direct(frames, conv.weight) + conv.bias.view(-1, 1, 1)).transpose(0, 1)
    settled = whole if pending is None else whole + pending.view(-1, 1, 1, 1)
    want = want + duplicated(settled, out, 2 if time else 1, first=first)[0]
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-12)


def test_a_changed_weight_is_used_at_once():
    """Nothing that is made of the weights outlives the call."""
    vae, latents = oracle.build(), oracle.latents(1, 2, 3)
    before = vae.decode(latents)
    weight = vae.slots()["decoder.up_blocks.1.upsampler.resample.1.weight"].target
    weight.neg_()
    assert oracle.error(vae.decode(latents), before) > 1e-2
    weight.neg_()
    assert torch.equal(vae.decode(latents), before)
