"""The request's checks, one by one, and the token layout that follows from it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_fixtures import ids, noise, picture, request

from cosmos3_fast import checks
from cosmos3_fast.checks import check
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.request import (
    Layout,
    clean_frames,
    layout,
    pixel_to_latent_shape,
    prompt_ids,
)

CONFIG = TransformerConfig(vocab_size=600)
NAN = float("nan")


@pytest.mark.parametrize(
    ("pixels", "latents"),
    [
        ((17, 480, 832), (5, 30, 52)),
        ((33, 528, 640), (9, 33, 40)),
        ((33, 540, 640), (9, 33, 40)),
        ((1, 480, 832), (1, 30, 52)),
        ((2, 15, 1), (1, 1, 1)),
        ((5, 16, 31), (2, 1, 1)),
    ],
    ids=str,
)
def test_latent_shape_of_pixels(pixels, latents):
    assert pixel_to_latent_shape(*pixels) == latents


@pytest.mark.parametrize("pixels", [(0, 16, 16), (1, 0, 16), (1, 16, -1), (True, 16, 16)], ids=str)
def test_no_pixels_no_shape(pixels):
    with pytest.raises(ValueError, match="must be positive integers, got"):
        pixel_to_latent_shape(*pixels)


PIXELS = {"cond_video_latents": None}
GOOD = {
    "policy": {},
    "pixels": {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)},
    "uint8 pixels": {
        "cond_video_latents": None,
        "cond_video_pixels": torch.zeros(1, 3, 1, 80, 96, dtype=torch.uint8),
    },
    "pixels larger than the shape": {
        "cond_video_latents": None,
        "cond_video_pixels": picture(1, 3, 9, 96, 112),
    },
    "latents larger than the shape": {"cond_video_latents": noise(1, 48, 3, 7, 6)},
    "latents that stop after the clean frame": {"cond_video_latents": noise(1, 48, 1, 5, 6)},
    "bf16 latents": {"cond_video_latents": noise(1, 48, 2, 5, 6).bfloat16()},
    "frames as a range": {"cond_frame_indexes": range(1)},
    "pixels a little outside": {
        "cond_video_latents": None,
        "cond_video_pixels": picture(1, 3, 1, 80, 96) * 1.005,
    },
    "no clean frame": {"cond_frame_indexes": [], "cond_video_latents": None},
    "one latent frame": {"video_shape": (1, 5, 6), "cond_video_latents": noise(1, 48, 1, 5, 6)},
    "chunk 1": {
        "action_chunk": 1,
        "video_shape": (1, 5, 6),
        "cond_video_latents": noise(1, 48, 1, 5, 6),
    },
    "unconditional prompt not needed": {"guidance_scale": 1.0, "neg_text_ids": None},
    "interval": {"guidance_interval": (0, 1000)},
    "longest prompt, largest offset": {"text": ids(4096), "action_frame_offset": 1 << 20},
    "least offset": {"action_frame_offset": -(1 << 20)},
    "pixels that are not read": PIXELS
    | {"cond_video_pixels": F.pad(picture(1, 3, 1, 80, 96), (0,) * 5 + (4,), value=2.0)},
    "state rows": {"clean_action": noise(1, 3, 10), "action_frame_offset": -2},
    "int32 ids": {"text": ids(5).int()},
    "largest seed": {"seed": 2**32 - 1},
    "most steps": {"num_inference_steps": 1000},
    "numpy numbers": {
        "num_inference_steps": np.int64(2),
        "seed": np.uint32(7),
        "domain_id": np.int32(8),
        "video_shape": tuple(np.array([2, 5, 6])),
        "cond_frame_indexes": np.array([0]),
        "guidance_scale": np.float32(3),
        "fps": np.float64(15),
        "guidance_interval": np.array([1.0, 900.0]),
    },
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_good_requests_pass(changes):
    check(request(**changes), CONFIG, has_encoder=True)


@pytest.mark.parametrize("given", [None, {}, request], ids=["none", "a dict", "a function"])
def test_what_is_no_request_is_refused(given):
    with pytest.raises(ValueError, match=r"must be a Cosmos3ActionRequest, got (None|dict|func)"):
        check(given, CONFIG, has_encoder=True)


def test_as_many_tokens_as_may_be_pass(monkeypatch):
    monkeypatch.setattr(checks, "MAX_TOKENS", layout(request(), CONFIG).tokens)
    check(request(), CONFIG, has_encoder=True)


FORWARD = {"mode": "forward_dynamics"}
BAD = {
    "mode": ({"mode": "plan"}, "mode must be one of .*policy.*got 'plan'"),
    "no steps": (
        {"num_inference_steps": 0},
        r"num_inference_steps must be an integer in \[1, 1000\], got 0",
    ),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps must be .* got 2.5"),
    "true steps": ({"num_inference_steps": True}, "num_inference_steps must be .* got True"),
    "1001 steps": ({"num_inference_steps": 1001}, r"an integer in \[1, 1000\], got 1001"),
    "a billion steps": ({"num_inference_steps": 10**9}, r"in \[1, 1000\], got 1000000000"),
    "seed": ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
    "large seed": ({"seed": 2**32}, "seed must be an integer .* got 4294967296"),
    "guidance": ({"guidance_scale": NAN}, "guidance_scale must be a finite number, got nan"),
    "fps 0": ({"fps": 0.0}, "fps must be a positive, finite number, got 0.0"),
    "fps inf": ({"fps": float("inf")}, "fps must be a positive, finite number, got inf"),
    "domain": ({"domain_id": 32}, r"domain_id must be an integer in \[0, 32\), got 32"),
    "domain name": ({"domain_id": "av"}, r"domain_id must be an integer in \[0, 32\), got 'av'"),
    "empty interval": (
        {"guidance_interval": (5, 5)},
        r"\(lo, hi\) with 0 <= lo < hi <= 1000, got \(5, 5\)",
    ),
    "nan interval": (
        {"guidance_interval": (NAN, 5)},
        r"\(lo, hi\) with 0 <= lo < hi <= 1000, got \(nan, 5\)",
    ),
    "long interval": ({"guidance_interval": (1, 2, 3)}, r"got \(1, 2, 3\)"),
    "chunk 6": ({"action_chunk": 6}, "action_chunk must be 1 or an integer multiple of 4, got 6"),
    "chunk 0": ({"action_chunk": 0}, "action_chunk must be 1 or an integer multiple of 4, got 0"),
    "flat shape": ({"video_shape": (5, 6)}, r"three positive integers .* got \(5, 6\)"),
    "empty shape": ({"video_shape": (2, 0, 6)}, r"three positive integers .* got \(2, 0, 6\)"),
    "frames": (
        {"video_shape": (3, 5, 6)},
        r"3 latent frames; action_chunk 4 needs 2 \(or 1\)",
    ),
    "clean frame": (
        {"cond_frame_indexes": (0, 2)},
        r"cond_frame_indexes must lie in \[0, 2\) .*got \(0, 2\)",
    ),
    "negative frame": ({"cond_frame_indexes": (-1,)}, r"must lie in \[0, 2\) .*got \(-1,\)"),
    "no video": (
        {"cond_video_latents": None},
        r"clean frames \(0,\) need cond_video_latents or cond_video_pixels; neither came",
    ),
    "latent height": (
        {"cond_video_latents": noise(1, 48, 2, 4, 6)},
        r"cond_video_latents must be \[1, 48, 1, 5, 6\] .* got \[1, 48, 2, 4, 6\]",
    ),
    "latent channels": ({"cond_video_latents": noise(1, 16, 2, 5, 6)}, r"got \[1, 16, 2, 5, 6\]"),
    "latent axes": ({"cond_video_latents": noise(48, 2, 5, 6)}, r"got \[48, 2, 5, 6\]"),
    "too few latent frames": (
        {"mode": "inverse_dynamics", "cond_video_latents": noise(1, 48, 1, 5, 6)},
        r"must be \[1, 48, 2, 5, 6\] .* got \[1, 48, 1, 5, 6\]",
    ),
    "nan latents": (
        {"cond_video_latents": torch.full((1, 48, 2, 5, 6), NAN)},
        "cond_video_latents holds values that are not finite",
    ),
    "integer latents": (
        {"cond_video_latents": torch.zeros(1, 48, 2, 5, 6, dtype=torch.int64)},
        "cond_video_latents must hold floating-point numbers, got torch.int64",
    ),
    "pixel axes": (
        PIXELS | {"cond_video_pixels": picture(3, 1, 80, 96)},
        r"cond_video_pixels must be \[1, 3, T, H, W\], got \[3, 1, 80, 96\]",
    ),
    "grey pixels": (PIXELS | {"cond_video_pixels": picture(1, 1, 1, 80, 96)}, r"got \[1, 1, 1, 80"),
    "few frames": (
        PIXELS | {"mode": "inverse_dynamics", "cond_video_pixels": picture(1, 3, 4, 80, 96)},
        "cond_video_pixels need 5 frames for clean latent frame 1, got 4",
    ),
    "ragged pixels": (
        PIXELS | {"cond_video_pixels": picture(1, 3, 1, 81, 96)},
        "must be a multiple of 16 high and wide, got 81x96",
    ),
    "small pixels": (
        PIXELS | {"cond_video_pixels": picture(1, 3, 1, 64, 96)},
        r"64x96 give 4x6 latents, fewer than video_shape \(2, 5, 6\)",
    ),
    "inf pixels": (
        PIXELS | {"cond_video_pixels": torch.full((1, 3, 1, 80, 96), float("inf"))},
        r"must be uint8 or lie in \[-1, 1\], got inf to inf",
    ),
    "pixels too far outside": (
        PIXELS | {"cond_video_pixels": torch.full((1, 3, 1, 80, 96), 1.01)},
        r"must be uint8 or lie in \[-1, 1\], got 1.01 to 1.01",
    ),
    "pixels of odd width": (
        PIXELS | {"cond_video_pixels": picture(1, 3, 1, 80, 97)},
        "must be a multiple of 16 high and wide, got 80x97",
    ),
    "low offset": ({"action_frame_offset": -(1 << 20) - 1}, "offset must be .* got -1048577"),
    "action_dim": ({"action_dim": 32}, "action_dim must be the model's 64, got 32"),
    "raw 0": ({"raw_action_dim": 0}, r"raw_action_dim must be an integer in \[1, 64\], got 0"),
    "raw 65": ({"raw_action_dim": 65}, r"raw_action_dim must be an integer in \[1, 64\], got 65"),
    "no actions": (FORWARD, r"forward_dynamics needs cond_action \[1, 4, 64\]; none came"),
    "narrow actions": (
        FORWARD | {"cond_action": noise(1, 4, 10)},
        r"cond_action must be \[1, 4, 64\], got \[1, 4, 10\]",
    ),
    "nan actions": (
        FORWARD | {"cond_action": torch.full((1, 4, 64), NAN)},
        "cond_action holds values that are not finite",
    ),
    "wide state": (
        {"clean_action": noise(1, 1, 11)},
        r"clean_action must be \[1, r, 10\], got \[1, 1, 11\]",
    ),
    "flat state": ({"clean_action": noise(1, 10)}, r"clean_action must be \[1, r, 10\]"),
    "nan state": ({"clean_action": torch.full((1, 1, 10), NAN)}, "clean_action holds values that"),
    "half a frame": ({"cond_frame_indexes": (0.5,)}, r"a sequence of integers, got \(0.5,\)"),
    "frames in words": ({"cond_frame_indexes": "0"}, "a sequence of integers, got '0'"),
    "frames to be read once": (
        {"cond_frame_indexes": map(int, "0")},
        "sequence of integers, got <map",
    ),
    "pixels of 0 to 255": (
        PIXELS | {"cond_video_pixels": picture(1, 3, 1, 80, 96).abs() * 255},
        r"cond_video_pixels must be uint8 or lie in \[-1, 1\], got 0.* to 255",
    ),
    "pixels and latents": (
        {"cond_video_pixels": picture(1, 3, 1, 80, 96)},
        "cond_video_latents and cond_video_pixels are both given",
    ),
    "pixels without numbers": (
        PIXELS | {"cond_video_pixels": torch.empty(1, 3, 1, 80, 96, device="meta")},
        "cond_video_pixels must be dense, got a torch.strided tensor on meta",
    ),
    "sparse latents": (
        {"cond_video_latents": noise(1, 48, 2, 5, 6).to_sparse()},
        "cond_video_latents must be dense, got a torch.sparse_coo tensor",
    ),
    "offset beyond measure": (
        {"action_frame_offset": 10**30},
        r"in \[-1048576, 1048576\], got 1000",
    ),
    "interval past the end": ({"guidance_interval": (500, 1001)}, "got .500, 1001."),
    "interval before the start": ({"guidance_interval": (-1, 500)}, "got .-1, 500."),
    "a number for a shape": ({"video_shape": 3}, r"three positive integers .* got \(3,\)"),
    "interval of truths": ({"guidance_interval": (False, True)}, r"got \(False, True\)"),
    "no shape": ({"video_shape": None}, r"three positive integers .* got \(\)"),
    "huge fps": ({"fps": 10**400}, "fps must be a positive, finite number, got 1000"),
    "inf guidance": (
        {"guidance_scale": float("inf")},
        "guidance_scale must be a finite number, got inf",
    ),
    "no fps": ({"fps": None}, "fps must be a positive, finite number, got None"),
    "guidance in words": (
        {"guidance_scale": "3"},
        "must be a finite number, got '3'",
    ),
    "guidance of two numbers": (
        {"guidance_scale": torch.ones(2)},
        "guidance_scale must be a finite number",
    ),
    "interval in words": (
        {"guidance_interval": "05"},
        r"\(lo, hi\) with 0 <= lo < hi <= 1000, got '05'",
    ),
    "half an interval": ({"guidance_interval": 5}, r"\(lo, hi\) with 0 <= lo < hi <= 1000, got 5"),
    "list of ids": ({"text_ids": [[1, 2]]}, "text_ids must be a tensor, got list"),
    "no negative prompt": ({"neg_text_ids": None}, "neg_text_ids must be a tensor, got NoneType"),
    "array of latents": (
        {"cond_video_latents": np.zeros((1, 48, 2, 5, 6))},
        "cond_video_latents must be a tensor, got ndarray",
    ),
    "half offset": (
        {"action_frame_offset": 0.5},
        "action_frame_offset must be an integer .* got 0",
    ),
    "long prompt": ({"text": ids(4097)}, "text_ids must hold 1 to 4096 tokens, got 4097"),
    "empty prompt": ({"text": ids(0)}, "text_ids must hold 1 to 4096 tokens, got 0"),
    "vocabulary": (
        {"text": torch.tensor([[3, 600]])},
        r"text_ids must lie in \[0, 600\), got 3 to 600",
    ),
    "negative id": ({"text": torch.tensor([[-1, 5]])}, r"\[0, 600\), got -1 to 5"),
    "negative prompt": ({"negative": torch.tensor([[999]])}, "neg_text_ids must lie in"),
    "two prompts": ({"text": ids(6).view(2, 3)}, "text_ids: batch size must be 1, got 2"),
    "float ids": ({"text": torch.ones(1, 3)}, "text_ids must hold integers, got torch.float32"),
    "complex ids": (
        {"text": torch.ones(1, 3, dtype=torch.complex64)},
        "text_ids must hold integers, got torch.complex64",
    ),
    "bool ids": ({"text": torch.ones(1, 3).bool()}, "text_ids must hold integers, got torch.bool"),
    "flat ids": ({"text": ids(3)[0]}, r"both be \[1, n\], got \[3\] and \[3\]"),
    "mask shape": (
        {"text_mask": torch.ones(1, 3)},
        r"text_ids and its mask must both be \[1, n\], got \[1, 19\] and \[1, 3\]",
    ),
    "mask hole": (
        {"text": ids(3), "text_mask": torch.tensor([[1, 0, 1]])},
        "text_ids: zeros of the mask may only be a tail",
    ),
    "a huge picture": (
        {"video_shape": (2, 10**5, 10**5), "cond_frame_indexes": (), "cond_video_latents": None},
        r"\(2, 100000, 100000\) and action_chunk 4 make 5000000004 tokens, more than 1048576",
    ),
    "a huge chunk": (
        {
            "video_shape": (1, 5, 6),
            "action_chunk": 4 * 10**9,
            "cond_video_latents": noise(1, 48, 1, 5, 6),
        },
        "action_chunk 4000000000 make 4000000009 tokens, more than 1048576",
    ),
    "all masked": ({"text_mask": torch.zeros(1, 19)}, "text_ids must hold 1 to 4096 tokens, got 0"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(request(**changes), CONFIG, has_encoder=True)


def test_pixels_need_the_encoder():
    asked = request(cond_video_latents=None, cond_video_pixels=picture(1, 3, 1, 80, 96))
    with pytest.raises(ValueError, match="cond_video_pixels need the checkpoint's vae/"):
        check(asked, CONFIG, has_encoder=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_the_masked_tail_is_cut(dtype):
    mask = torch.tensor([[1, 1, 1, 0, 0]]).to(dtype)
    assert prompt_ids(torch.tensor([[7, 8, 9, 599, -5]]), mask, "text_ids", 600) == [7, 8, 9]


@pytest.mark.parametrize(
    ("changes", "frames"),
    [
        ({}, (0,)),
        ({"mode": "forward_dynamics"}, (0,)),
        ({"mode": "inverse_dynamics"}, (0, 1)),
        ({"mode": "inverse_dynamics", "cond_frame_indexes": (1,)}, (1,)),
        ({"cond_frame_indexes": [1, 0, 1]}, (0, 1)),
        ({"cond_frame_indexes": torch.tensor([0, 1])}, (0, 1)),
        ({"cond_frame_indexes": ()}, ()),
    ],
    ids=str,
)
def test_clean_frames_of_a_mode(changes, frames):
    assert clean_frames(request(**changes)) == frames


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"rows": 4, "clean_rows": 0, "dropped_rows": 0, "offset": 1}),
        ({"mode": "forward_dynamics"}, {"rows": 4, "clean_rows": 4, "dropped_rows": 0}),
        (
            {"clean_action": noise(1, 1, 10)},
            {"rows": 5, "clean_rows": 1, "dropped_rows": 1, "offset": 0},
        ),
        (
            {"clean_action": noise(1, 3, 10), "mode": "forward_dynamics"},
            {"rows": 7, "clean_rows": 7, "dropped_rows": 3, "offset": -2},
        ),
        (
            {"clean_action": noise(1, 1, 10), "action_frame_offset": 5},
            {"rows": 5, "offset": 5},
        ),
        ({"action_frame_offset": 0}, {"rows": 4, "offset": 0}),
    ],
    ids=["policy", "forward", "state row", "state rows in forward", "offset", "offset 0"],
)
def test_rows_of_a_layout(changes, expected):
    got = dataclasses.asdict(layout(request(**changes), CONFIG))
    assert {name: got[name] for name in expected} == expected


def test_the_droid_layout():
    """33 rows and 9x33x40 latents: 3060 video tokens and 33 action tokens."""
    droid = Layout(9, 33, 40, 33, (0,), 1, 1, 0, channels=48, patch=2, action_dim=64)
    assert (droid.grid, droid.video_tokens, droid.tokens) == ((9, 17, 20), 3060, 3093)
    assert (droid.patch_dim, droid.video_values) == (192, 3060 * 192)
    assert droid.values == 3060 * 192 + 33 * 64
