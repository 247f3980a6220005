"""The VAE on one rank against diffusers' AutoencoderKLWan on small random weights."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import vae_oracle as oracle

from cosmos3_fast.config import VAEConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.vae import WanVAE
from cosmos3_fast.vae.model import MAX_ELEMENTS
from cosmos3_fast.vae.strips import Strips

EXACT = 1e-5


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return oracle.build()


def grouped(most: int, net: str, vae: WanVAE, frames: int, height: int, width: int) -> WanVAE:
    """The same VAE with a memory bound that lets `most` latent frames of such a clip through."""
    bounds = copy.copy(vae)
    strips = Strips.plan(vae.mesh, height, width)
    for bound in range(12, 40):
        bounds.max_bytes = 1 << bound
        if any(
            stop - start > most
            for start, stop in bounds._groups(getattr(vae, net), strips, frames, height, width)
        ):
            bounds.max_bytes = 1 << (bound - 1)
            return bounds
    raise AssertionError("no bound cuts the clip")


def test_slots_are_the_keys_and_shapes_of_diffusers(vae):
    want = {name: tuple(weight.shape) for name, weight in oracle.reference().state_dict().items()}
    assert {name: slot.shape for name, slot in vae.slots().items()} == want


def test_without_decoder_its_keys_are_unused():
    vae = WanVAE(oracle.config(), device="cpu", dtype=torch.float32, decoder=False)
    rest = set(oracle.reference().state_dict()) - set(vae.slots())
    assert rest and all(name.startswith(vae.unused) for name in rest)
    assert not any(name.startswith(vae.unused) for name in vae.slots())
    with pytest.raises(ValueError, match="without its decoder"):
        vae.decode(oracle.latents(1, 1, 1))


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(1, 3, 5), (5, 3, 5), (9, 1, 1), (13, 2, 3), (17, 3, 2)],
    ids=lambda v: str(v),
)
def test_encode_equals_diffusers(vae, frames, height, width):
    pixels = oracle.pixels(frames, height, width)
    got = vae.encode(pixels)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert oracle.error(got, oracle.reference_encode(pixels)) <= EXACT


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(1, 3, 5), (2, 1, 1), (3, 3, 5), (4, 2, 3), (5, 3, 2)],
    ids=lambda v: str(v),
)
def test_decode_equals_diffusers(vae, frames, height, width):
    latents = oracle.latents(frames, height, width)
    want = oracle.reference_decode(latents)
    got = vae.decode(latents)
    assert got.dtype == torch.float32 and got.min() >= 0 and got.max() <= 1
    assert ((want == 0) | (want == 1)).float().mean() < 0.2, "the truth is mostly clamped"
    assert oracle.error(got, want) <= EXACT


def test_decode_of_droid_latents_equals_diffusers(vae):
    latents = oracle.latents(1, 33, 40)
    assert oracle.error(vae.decode(latents), oracle.reference_decode(latents)) <= EXACT


def test_pixels_outside_the_range_are_clamped(vae):
    latents = oracle.latents(3, 3, 5)
    want = oracle.reference_decode(latents)
    assert (want == 0).any() and (want == 1).any()
    assert oracle.error(vae.decode(latents), want) <= EXACT


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("frames", [2, 5])
def test_groups_of_latent_frames_equal_all_at_once(vae, most, frames):
    latents, pixels = oracle.latents(frames, 2, 3), oracle.pixels(4 * frames - 3, 2, 3)
    if most < frames:
        decoder = grouped(most, "decoder", vae, frames, 2, 3)
        encoder = grouped(most, "encoder", vae, frames, 2, 3)
        assert oracle.error(decoder.decode(latents), vae.decode(latents)) <= 1e-6
        assert oracle.error(encoder.encode(pixels), vae.encode(pixels)) <= 1e-6


def test_a_bound_below_one_frame_still_runs_frame_by_frame(vae):
    tight = copy.copy(vae)
    tight.max_bytes = 1
    strips = Strips.plan(vae.mesh, 2, 3)
    assert vae._groups(vae.decoder, strips, 5, 2, 3) == [(0, 5)]
    assert tight._groups(vae.decoder, strips, 5, 2, 3) == [(i, i + 1) for i in range(5)]
    latents = oracle.latents(3, 2, 3)
    assert oracle.error(tight.decode(latents), vae.decode(latents)) <= 1e-6


def test_carried_history_matters(vae, monkeypatch):
    """The planted fault of the test above: groups that forget what came before."""
    tight = copy.copy(vae)
    tight.max_bytes = 1
    monkeypatch.setattr("cosmos3_fast.vae.strips.Flow.carry", lambda self, owner, x, frames: x)
    latents = oracle.latents(3, 2, 3)
    assert oracle.error(tight.decode(latents), vae.decode(latents)) > 1e-2


def test_later_frames_leave_earlier_latents_bit_equal(vae):
    pixels = oracle.pixels(13, 2, 3)
    base = vae.encode(pixels)
    for latent in range(3):
        changed = pixels.clone()
        changed[:, :, 4 * latent + 1 :] = oracle.pixels(13, 2, 3, seed=1)[:, :, 4 * latent + 1 :]
        got = vae.encode(changed)
        assert torch.equal(got[:, :, : latent + 1], base[:, :, : latent + 1])
        assert not torch.equal(got[:, :, latent + 1], base[:, :, latent + 1])


def test_a_causal_prefix_encodes_to_the_first_latents(vae):
    pixels = oracle.pixels(13, 2, 3)
    base = vae.encode(pixels)
    assert oracle.error(vae.encode(pixels[:, :, :5]), base[:, :, :2]) <= 1e-6
    one = vae.encode(pixels[:, :, :1])  # 2-D convolutions
    assert oracle.error(one, base[:, :, :1]) <= 2e-6


def test_one_frame_runs_no_temporal_convolution(vae, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.conv3d", None)
    vae.encode(oracle.pixels(1, 2, 3))
    vae.decode(oracle.latents(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_errs_at_most_twice_as_much_as_diffusers(dtype):
    vae, model = oracle.build(dtype), copy.deepcopy(oracle.reference()).to(dtype)
    pixels, latents = oracle.pixels(5, 3, 5), oracle.latents(3, 3, 5)
    truth = oracle.reference_encode(pixels)
    theirs = oracle.error(oracle.reference_encode(pixels, model), truth)
    assert oracle.error(vae.encode(pixels.to(dtype)), truth) <= 2 * theirs
    truth = oracle.reference_decode(latents)
    theirs = oracle.error(oracle.reference_decode(latents, model), truth)
    assert oracle.error(vae.decode(latents), truth) <= 2 * theirs


def test_inputs_are_left_as_they_were(vae):
    pixels, latents = oracle.pixels(5, 2, 3), oracle.latents(3, 2, 3)
    kept = pixels.clone(), latents.clone()
    weights = {name: slot.target.clone() for name, slot in vae.slots().items()}
    vae.encode(pixels)
    vae.decode(latents)
    assert torch.equal(pixels, kept[0]) and torch.equal(latents, kept[1])
    assert all(torch.equal(slot.target, weights[name]) for name, slot in vae.slots().items())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 2, 16, 16), r"1 \+ 4 k"),
        ((1, 3, 1, 17, 16), "16 h"),
        ((1, 3, 1, 16, 8), "16 w"),
        ((1, 3, 0, 16, 16), "pixels must be"),
        ((1, 3, 1, 0, 16), "pixels must be"),
        ((2, 3, 1, 16, 16), "pixels must be"),
        ((1, 4, 1, 16, 16), "pixels must be"),
        ((3, 1, 16, 16), "5 dimensions"),
    ],
    ids=lambda v: str(v),
)
def test_pixels_of_another_shape_are_refused(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_latents_of_another_shape_are_refused(vae):
    for shape in [(2, oracle.Z, 1, 1, 1), (1, 5, 1, 1, 1), (1, oracle.Z, 0, 1, 1)]:
        with pytest.raises(ValueError, match="latents must be"):
            vae.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="5 dimensions"):
        vae.decode(torch.zeros(oracle.Z, 1, 1, 1))
    with pytest.raises(ValueError, match="gather"):
        vae.decode(oracle.latents(1, 1, 1), gather="rank1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 3),
        ("out_channels", 3),
        ("scale_factor_spatial", 8),
        ("scale_factor_temporal", 2),
        ("temperal_downsample", (True, True)),
    ],
    ids=lambda v: str(v),
)
def test_a_config_that_does_not_agree_is_refused_by_name(key, value):
    config = dataclasses.replace(oracle.config(), **{key: value})
    with pytest.raises(ValueError, match=key):
        WanVAE(config, device="meta", dtype=torch.float32)


@pytest.mark.parametrize(
    ("dim_mult", "message"), [((1, 2, 4, 2), "up-shortcut"), ((1, 2, 3, 4), "down-shortcut")]
)
def test_widths_without_a_shortcut_are_refused(dim_mult, message):
    config = dataclasses.replace(oracle.config(), dim_mult=dim_mult)
    with pytest.raises(ValueError, match=message):
        WanVAE(config, device="meta", dtype=torch.float32)


@pytest.fixture(scope="module")
def real() -> WanVAE:
    mesh = Mesh.single("meta")
    return WanVAE(VAEConfig(), device="meta", dtype=torch.bfloat16, mesh=mesh)


def test_the_real_config_has_wan_2_2s_size(real):
    assert sum(slot.target.numel() for slot in real.slots().values()) == 704_688_668


@pytest.mark.parametrize(
    ("latent", "elements", "passes"),
    [((9, 33, 40), 1.5e9, 1), ((9, 45, 80), 4.2e9, 3), ((16, 45, 80), 7.3e9, 4)],
    ids=["D", "720x1280, 33 frames", "720x1280, 61 frames"],
)
def test_no_convolution_input_exceeds_32_bit_indices(real, latent, elements, passes):
    real.max_bytes = 1 << 60
    frames, height, width = latent
    strips = Strips.plan(real.mesh, height, width)
    whole = max(size for size, _ in real.decoder.sizes(*latent, first=True))
    assert whole == pytest.approx(elements, rel=0.03)
    groups = real._groups(real.decoder, strips, frames, height, width)
    assert len(groups) == passes and groups[0][0] == 0 and groups[-1][1] == frames
    for start, stop in groups:
        sizes = real.decoder.sizes(stop - start, height, width, first=start == 0)
        assert max(elements for elements, _ in sizes) <= MAX_ELEMENTS


# Latent frames, height, width; whether encoded or decoded. 104 x 16 = 1664 pixels, 147 x 16 = 2352.
LARGEST = {
    "decode": ((2, 104, 104), True),
    "decode one frame": ((1, 147, 147), True),
    "encode": ((2, 186, 186), False),
}


@pytest.mark.parametrize(("size", "decode"), LARGEST.values(), ids=LARGEST)
def test_a_picture_past_32_bit_indices_is_refused(real, size, decode):
    """One latent pixel more, each way, is too many; so it is to the pass itself."""
    frames, height, width = size
    real.check_size(*size, decode=decode)
    message = rf"pixels of {16 * height + 16} x {16 * width + 16} over 1 rank are too many"
    with pytest.raises(ValueError, match=message):
        real.check_size(frames, height + 1, width + 1, decode=decode)
    net = real.decoder if decode else real.encoder
    strips = Strips.plan(real.mesh, height + 1, width + 1)
    with pytest.raises(ValueError, match=message):
        real._groups(net, strips, frames, height + 1, width + 1)
