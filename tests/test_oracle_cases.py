"""The engine against diffusers: 24 requests in every mode, from pixels (or latents) to the end."""

import dataclasses

import oracle
import ours
import pytest
import torch
from oracle import Case

from cosmos3_fast import sampler
from cosmos3_fast.testing import make_tiny_checkpoint

POLICY, FORWARD, INVERSE = "policy", "forward_dynamics", "inverse_dynamics"
FULL, ODD, TALL, SQUARE = (192, 320), (112, 176), (256, 192), (256, 256)

CASES = [
    Case(POLICY, "image", 16, "umi", 1.0, "karras", steps=4),
    Case(POLICY, "image", 16, "umi", 3.0, "native", steps=4, size=FULL),
    Case(POLICY, "image", 16, "av", 3.0, "flow", size=ODD),
    Case(POLICY, "image", 4, "av", 1.0, "native", steps=2, size=SQUARE),
    Case(POLICY, "image", 8, "umi", 3.0, "flow", fps=15.0, view_point="third_person_view"),
    Case(POLICY, "video", 8, "umi", 3.0, "karras"),
    Case(POLICY, "video", 16, "av", 1.0, "flow", steps=2, size=TALL),
    Case(POLICY, "video", 4, "umi", 3.0, "native", size=ODD),
    Case(POLICY, "image", 60, "umi", 1.0, "native", steps=2),
    Case(POLICY, "latents", 16, "droid_lerobot", 3.0, "native", steps=4, fps=15.0),
    Case(FORWARD, "image", 16, "av", 1.0, "karras"),
    Case(FORWARD, "image", 8, "umi", 3.0, "flow", size=ODD, fps=10.0),
    Case(FORWARD, "image", 4, "umi", 3.0, "native", steps=2),
    Case(FORWARD, "video", 16, "umi", 1.0, "native", size=FULL),
    Case(FORWARD, "video", 4, "av", 3.0, "karras", steps=4),
    Case(FORWARD, "image", 60, "av", 1.0, "flow", steps=2),
    Case(FORWARD, "latents", 8, "umi", 3.0, "karras", steps=2),
    Case(INVERSE, "video", 16, "umi", 1.0, "karras"),
    Case(INVERSE, "video", 16, "av", 3.0, "native", size=ODD),
    Case(INVERSE, "video", 8, "umi", 3.0, "flow", size=TALL),
    Case(INVERSE, "video", 8, "av", 1.0, "native", steps=4, fps=30.0),
    Case(INVERSE, "video", 4, "av", 3.0, "karras", steps=2, view_point="wrist_view"),
    Case(INVERSE, "video", 60, "umi", 1.0, "native", steps=2, size=(64, 96)),
    Case(INVERSE, "latents", 16, "av", 3.0, "flow", steps=2),
]
IN_BF16 = [
    Case(POLICY, "image", 16, "umi", 3.0, "native", steps=4),
    Case(FORWARD, "image", 16, "av", 1.0, "karras"),
    Case(INVERSE, "video", 8, "umi", 3.0, "flow"),
    Case(POLICY, "latents", 4, "umi", 1.0, "flow", steps=2),
]
ONE_CALL = [
    Case(POLICY, "image", 16, "umi", 1.0, "native", steps=1, size=ODD),
    Case(FORWARD, "image", 8, "av", 1.0, "karras", steps=1),
    Case(INVERSE, "video", 8, "umi", 1.0, "flow", steps=1),
]


def in_words(case):
    return case.id


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    yield make_tiny_checkpoint(tmp_path_factory.mktemp("fp32"), kv_heads=2)
    ours.close_engines()


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory):
    """Stored in bf16, so that its fp32 run is the exact model of its bf16 runs."""
    folder = tmp_path_factory.mktemp("bf16")
    yield make_tiny_checkpoint(folder, kv_heads=2, seed=1, dtype=torch.bfloat16)
    ours.close_engines()


@pytest.mark.parametrize("case", CASES, ids=in_words)
def test_request_in_fp32(tiny, case):
    want = oracle.run(tiny, case)
    request = ours.request(tiny, case)
    assert request.text_ids[0].tolist() == want.ids
    assert request.neg_text_ids[0].tolist() == want.negative_ids
    got = ours.engine(tiny, case.schedule, shift=case.shift).step(request)
    assert oracle.error(got["action"], want.action) <= 1e-5
    assert oracle.error(got["video"], want.video) <= 1e-5


@pytest.mark.parametrize("case", IN_BF16, ids=in_words)
def test_request_in_bf16_errs_no_more_than_twice_what_diffusers_does(tiny_bf16, case):
    truth = oracle.run(tiny_bf16, case)
    theirs = oracle.run(tiny_bf16, case, torch.bfloat16)
    engine = ours.engine(tiny_bf16, case.schedule, torch.bfloat16, shift=case.shift)
    got = engine.step(ours.request(tiny_bf16, case, torch.bfloat16))
    for name in ("action", "video"):
        allowed = 2 * oracle.error(getattr(theirs, name), getattr(truth, name))
        assert oracle.error(got[name], getattr(truth, name)) <= allowed, name


@pytest.mark.parametrize("case", ONE_CALL, ids=in_words)
def test_one_network_call(tiny, case):
    """After one step the state is noise - sigma * velocity, so the velocity can be read off it."""
    want, clean = oracle.run(tiny, case), oracle.clean_latents(tiny, case)
    schedule = ours.engine(tiny, case.schedule).args.plugin_args.schedule
    sigma = float(sampler.sigmas(schedule, 1, shift=5.0, sigma_min=0.147, sigma_max=200).sigmas[0])
    got = ours.engine(tiny, case.schedule).step(ours.request(tiny, case))
    video = oracle.start(want.video.shape, clean, case.clean, case.seed)
    starts = {"video": video, "action": oracle.noise(case.seed, (1, case.chunk, 64))}
    moving = {FORWARD: ["video"], INVERSE: ["action"]}.get(case.mode, ["video", "action"])
    for name in moving:
        begin = starts[name][..., : case.raw] if name == "action" else starts[name]
        velocity, expected = ((begin - end) / sigma for end in (got[name], getattr(want, name)))
        assert oracle.error(velocity, expected) <= 2e-6, name


def test_decoded_rollout(tiny):
    case = dataclasses.replace(CASES[7], steps=2)
    want = oracle.run(tiny, case, pixels=True)
    engine = ours.engine(tiny, case.schedule, decode=True)
    got = engine.step(ours.request(tiny, case))
    assert got["pixels"].shape == (1, 3, 5, 112, 176)
    assert oracle.error(got["pixels"], want.pixels) <= 1e-5


def test_forward_dynamics_returns_the_actions_it_was_given(tiny):
    case = CASES[12]
    got = ours.engine(tiny, case.schedule).step(ours.request(tiny, case))
    assert torch.equal(got["action"][0], oracle.actions(case))


@pytest.mark.parametrize("case", [CASES[2], CASES[11], CASES[18], CASES[9]], ids=in_words)
def test_oracles_own_loop_is_its_pipeline(tiny, case):
    """Its index lists, positions and steps are written by hand: the pipeline confirms them."""
    want = oracle.run(tiny, case)
    request = ours.request(tiny, case)
    request.cond_video_latents = oracle.clean_latents(tiny, case)
    got = oracle.loop(tiny, request, case.schedule, case.shift)
    assert oracle.error(got.action, want.action) <= 5e-6
    assert oracle.error(got.video, want.video) <= 5e-6


def test_oracles_prefix_encode_is_its_whole_clip(tiny):
    case = Case(POLICY, "video", 8, "umi", 1.0, "flow", size=ODD)
    whole = oracle.encode(tiny, case, whole=True)
    prefix = oracle.encode(tiny, case)
    assert whole.shape[2] == 3 and prefix.shape[2] == 1
    assert oracle.error(prefix, whole[:, :, :1]) <= 1e-6


def test_the_cases_cover_what_they_should():
    def met(**what):
        return any(all(getattr(case, k) == v for k, v in what.items()) for case in CASES)

    for mode in (POLICY, FORWARD, INVERSE):
        assert met(mode=mode, source="latents") and met(mode=mode, source="video")
        for chunk in (4, 8, 16, 60):
            assert met(mode=mode, chunk=chunk)
        for guidance in (1.0, 3.0):
            assert met(mode=mode, guidance=guidance)
        for schedule in ("karras", "flow", "native"):
            assert met(mode=mode, schedule=schedule)
        for domain in ("umi", "av"):
            assert met(mode=mode, domain=domain)
    assert len({case.id for case in CASES}) == len(CASES) == 24
