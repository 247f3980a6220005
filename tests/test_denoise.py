"""What is decided around the loop: schedule, pictures, idle guidance, the ranks' end; and what the
engine hands to its parts.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_fixtures import checkpoint, engine_args, noise, picture, request, shared_engine

from cosmos3_fast import Engine, RuntimeConfig, denoise, sampler
from cosmos3_fast.checks import check
from cosmos3_fast.config import CheckpointConfig, Cosmos3PolicyWNArgs, SchedulerConfig
from cosmos3_fast.parallel import Mesh

CONFIG = CheckpointConfig.read(checkpoint()).transformer


def plan_of(asked, name="native"):
    schedule = sampler.sigmas(name, asked.num_inference_steps, shift=5.0)
    return denoise.plan(asked, CONFIG, schedule)


CLIP = {
    "action_chunk": 8,
    "video_shape": (3, 5, 6),
    "cond_frame_indexes": (0, 2),
    "cond_video_latents": None,
    "cond_video_pixels": picture(1, 3, 13, 96, 112),
}
TO_ENCODE, TO_DECODE = ((3, 6, 7), False), ((3, 5, 6), True)
GIVEN = {"cond_video_latents": noise(1, 48, 3, 5, 6), "cond_video_pixels": None}


@pytest.mark.parametrize(
    ("changes", "decode", "sizes"),
    [
        ({}, True, [TO_ENCODE, TO_DECODE]),
        ({}, False, [TO_ENCODE]),
        (GIVEN, True, [TO_DECODE]),
        (GIVEN, False, []),
    ],
    ids=["to encode and decode", "to encode", "to decode", "neither"],
)
def test_the_vae_is_asked_for_the_sizes_that_it_will_see(changes, decode, sizes):
    """Latent frames, rows and columns: of the pixels up to the last clean frame, and of the
    result."""
    asked, seen = request(**CLIP | changes), []
    vae = SimpleNamespace(check_size=lambda *size, decode: seen.append((size, decode)))
    denoise.check_pictures(vae, asked, plan_of(asked).layout, decode=decode)
    assert seen == sizes


def test_idle_guidance_names_the_timesteps_from_first_to_last():
    asked = request(num_inference_steps=4, guidance_interval=(0.2, 0.8))
    first, *_, last = plan_of(asked).schedule.timesteps
    want = f"guidance_interval (0.2, 0.8) holds none of the timesteps {first} to {last}"
    assert first > last
    assert denoise.idle_guidance(asked, plan_of(asked)) == want


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": 1.0, "guidance_interval": (1, 2)}], ids=["guided", "scale 1"]
)
def test_guidance_that_is_not_idle_needs_no_words(changes):
    asked = request(**changes)
    assert denoise.idle_guidance(asked, plan_of(asked)) == ""


@pytest.mark.parametrize(
    ("cards", "error", "words"),
    [
        ([["", ""], ["", "KeyError: 1"], ["", "no"]], RuntimeError, "rank 1: KeyError: 1; rank 2"),
        ([["", ""], ["rank 0 is late", ""]], TimeoutError, "^rank 0 is late$"),
        ([["late", ""], ["", "KeyError: 1"]], RuntimeError, "^rank 1: KeyError: 1$"),
    ],
    ids=["failed", "late", "both"],
)
def test_what_the_ranks_said_at_the_end_is_raised_with_their_numbers(cards, error, words):
    mesh = SimpleNamespace(gather_objects=lambda own: cards)
    with pytest.raises(error, match=words):
        denoise.require_in_time(mesh, ())


FILES = {
    "native": (SchedulerConfig(flow_shift=3.0, use_native_flow_schedule=True), 3.0),
    "flow": (SchedulerConfig(flow_shift=2.0), 2.0),
}


@pytest.mark.parametrize("name", FILES)
def test_the_files_decide_the_schedule_and_its_shift(name):
    found, shift = FILES[name]
    silent = Cosmos3PolicyWNArgs(schedule=None, use_karras_sigmas=None, flow_shift=None)
    schedule, want = denoise.schedule_of(silent, found, 4), sampler.sigmas(name, 4, shift=shift)
    assert (schedule.name, schedule.timesteps) == (name, want.timesteps)
    assert np.array_equal(schedule.sigmas, want.sigmas)


def test_an_argument_wins_over_the_files():
    args = Cosmos3PolicyWNArgs(schedule="flow", flow_shift=1.5)
    schedule = denoise.schedule_of(args, FILES["native"][0], 4)
    assert schedule.name == "flow"
    assert np.array_equal(schedule.sigmas, sampler.sigmas("flow", 4, shift=1.5).sigmas)


def test_latents_without_a_frame_are_refused_though_none_is_read():
    empty = {"cond_frame_indexes": (), "cond_video_latents": noise(1, 48, 0, 5, 6)}
    want = r"cond_video_latents must be \[1, 48, 1, 5, 6\] .* got \[1, 48, 0, 5, 6\]"
    with pytest.raises(ValueError, match=want):
        check(request(**empty), CONFIG, has_encoder=True)


def test_columns_past_the_robots_own_are_not_read():
    """Of the given actions, which are as wide as the model's."""
    given = noise(1, 4, 64)
    bare = given.clone()
    bare[..., 10:] = 0
    got, want = (
        shared_engine().step(request(mode="forward_dynamics", cond_action=action))
        for action in (given, bare)
    )
    assert torch.equal(got["video"], want["video"]) and torch.equal(got["action"], want["action"])


def test_an_engine_that_cannot_be_built_is_closed(monkeypatch, tmp_path):
    closed, close = [], Mesh.close
    monkeypatch.setattr(Mesh, "close", lambda mesh: (closed.append(mesh.rank), close(mesh)))
    with pytest.raises(ValueError, match="does not exist"):
        Engine(engine_args(tmp_path / "gone"))
    assert closed == [0]


def test_the_watchdog_gets_both_times():
    runtime = RuntimeConfig(step_deadline_s=7.0, silence_s=3.0)
    with Engine(engine_args(runtime=runtime)) as engine:
        assert (engine._watchdog.deadline, engine._watchdog.silence) == (7.0, 3.0)


@pytest.mark.parametrize("part", ["model", "vae"])
def test_a_kernel_that_gave_up_waiting_is_the_requests_error(monkeypatch, part):
    engine = shared_engine()
    peers = engine.model.sums if part == "model" else engine.vae._edges
    monkeypatch.setattr(peers, "failure", lambda: "rank 0: rank 1 did not come")
    with pytest.raises(TimeoutError, match=r"^rank 0: rank 1 did not come$"):
        engine.step(request())
