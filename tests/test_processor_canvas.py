"""Canvas choice, resize and padding against diffusers, hand-computed truths and invariants."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _ACTION_RESOLUTION_BINS
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos3_fast.processor.canvas import TIERS, Canvas, content_size, nearest_canvas, pad, resize

SIDE = st.integers(1, 3000)
ORACLE_TIERS = [tier for tier in TIERS if str(tier) in _ACTION_RESOLUTION_BINS]


def noise(frames, height, width, seed=0):
    values = np.random.RandomState(seed).randint(0, 256, (frames, height, width, 3))
    return torch.from_numpy(values.astype(np.uint8))


@pytest.mark.parametrize("tier", ORACLE_TIERS)
@settings(max_examples=80, deadline=None)
@given(height=SIDE, width=SIDE)
def test_canvas_choice_equals_diffusers(tier, height, width):
    bins = _ACTION_RESOLUTION_BINS[str(tier)]
    expected = VideoProcessor.classify_height_width_bin(height, width, ratios=bins)
    assert nearest_canvas(tier, height, width) == expected


def test_the_768_tier_that_diffusers_lacks():
    wide, tall = nearest_canvas(768, 720, 1280), nearest_canvas(768, 1280, 720)
    assert (wide, tall) == ((768, 1360), (1360, 768))
    assert nearest_canvas(768, 540, 640) == (880, 1184)
    assert nearest_canvas(768, 9, 9) == (1024, 1024)


# (tier, source) -> canvas, content; the DROID mosaic and shared inputs, worked out by hand
PLACED = {
    "droid mosaic": (480, (540, 640), (544, 736), (540, 640)),
    "droid exterior": (480, (360, 640), (480, 832), (360, 640)),
    "umi": (480, (256, 256), (640, 640), (256, 256)),
    "full hd": (480, (1080, 1920), (480, 832), (468, 832)),
    "portrait": (256, (1920, 1080), (320, 192), (320, 180)),
    "one pixel row": (256, (1, 1000), (192, 320), (1, 320)),
}


@pytest.mark.parametrize(("tier", "source", "canvas", "content"), PLACED.values(), ids=PLACED)
def test_known_placements(tier, source, canvas, content):
    frames, size = Canvas(16, 16, tier)(noise(1, *source))
    assert (tuple(frames.shape[1:3]), size) == (canvas, content)


@pytest.mark.parametrize(
    ("tier", "source"),
    [(256, (240, 320)), (256, (512, 640)), (480, (720, 1280)), (256, (64, 48)), (480, (608, 800))],
    ids=["pad only", "shrink exactly", "shrink and pad", "edge padding", "shrink by a little"],
)
def test_pixels_equal_diffusers_before_its_clamping(tier, source):
    """diffusers keeps the bicubic overshoot in floats; ours clamps and rounds to uint8."""
    frames = noise(2, *source)
    pipeline = SimpleNamespace(
        video_processor=VideoProcessor(vae_scale_factor=16, resample="bilinear")
    )
    clip = frames.permute(0, 3, 1, 2)[None].float() / 255
    theirs, size, *_ = Cosmos3OmniPipeline._prepare_action_video_conditioning(
        pipeline, clip, tier, 2, "cpu", torch.float32
    )
    ours, content = Canvas(16, 16, tier)(frames)
    assert (*ours.shape[1:3], *content) == tuple(size.int().tolist())
    expected = ((theirs[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert (ours.float() - expected).abs().max() <= 0.5 + 1e-3


def test_resize_clamps_overshoot_instead_of_wrapping():
    frames = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    frames[:, :, 16:] = 255
    small = resize(frames, (32, 21))
    assert int(small[0, 0, 0, 0]) == 0
    assert int(small[0, 0, -1, 0]) == 255
    assert bool((small[0, :, :9] < 20).all()) and bool((small[0, :, 12:] > 235).all())


def test_resize_keeps_a_constant_picture():
    assert resize(torch.full((1, 37, 53, 3), 201, dtype=torch.uint8), (11, 7)).unique() == 201


def test_reflection_does_not_repeat_the_border():
    frames = torch.tensor([[[10, 20, 30]]], dtype=torch.uint8)[..., None].expand(1, 1, 3, 3)
    frames = frames.expand(1, 2, 3, 3)
    padded = pad(frames, (3, 5))
    assert padded[0, 0, :, 0].tolist() == [10, 20, 30, 20, 10]


def test_edges_are_repeated_on_both_sides_once_one_padding_is_as_wide_as_its_content():
    frames = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3, 1).expand(1, 2, 3, 3)
    padded = pad(frames, (4, 4))[0, :, :, 0]
    assert padded.tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]


def test_half_a_pixel_of_content_is_a_whole_one():
    assert content_size((256, 256), 1024, 10) == (256, 3)  # 2.5
    assert content_size((256, 256), 10, 1024) == (3, 256)


@settings(max_examples=120, deadline=None)
@given(tier=st.sampled_from([*TIERS]), height=SIDE, width=SIDE)
def test_content_fits_the_canvas_and_is_never_enlarged(tier, height, width):
    canvas = nearest_canvas(tier, height, width)
    h, w = content_size(canvas, height, width)
    assert 1 <= h <= min(canvas[0], height) and 1 <= w <= min(canvas[1], width)
    fits = height <= canvas[0] and width <= canvas[1]
    assert (h, w) == (height, width) if fits else h == canvas[0] or w == canvas[1]


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 40), w=st.integers(1, 40), down=st.integers(0, 60), right=st.integers(0, 60)
)
def test_padding_equals_numpys(h, w, down, right):
    frames = noise(1, h, w, seed=h * 41 + w)
    mode = "reflect" if down < h and right < w else "edge"
    expected = np.pad(frames.numpy(), ((0, 0), (0, down), (0, right), (0, 0)), mode=mode)
    assert np.array_equal(pad(frames, (h + down, w + right)).numpy(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((480, 832, 512), r"image_size 512 .* \[256, 480, 704, 720, 768\]"),
        ((481, 832, None), "canvas 481x832"),
        ((480, 0, None), "canvas 480x0"),
    ],
    ids=["unknown tier", "not a multiple of 16", "no width"],
)
def test_bad_canvases_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Canvas(*arguments)
