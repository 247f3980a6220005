"""What diffusers' pipeline has no words for, against its transformer called directly.

State rows, the action offset, one action, one latent frame, a guidance interval, chosen clean
frames: all on 33x40 latents fed directly, the request one object for both sides.
"""

import dataclasses

import oracle
import ours
import pytest
import torch
from oracle import Case

from cosmos3_fast.testing import make_tiny_checkpoint

POLICY = Case("policy", "latents", 8, "umi", 3.0, "native", steps=3)
DROID = dataclasses.replace(POLICY, domain="droid_lerobot", fps=15.0)
FORWARD = dataclasses.replace(POLICY, mode="forward_dynamics")
INVERSE = dataclasses.replace(POLICY, mode="inverse_dynamics")
ONE_ACTION = dataclasses.replace(POLICY, chunk=1)
NO_PICTURE = {"cond_frame_indexes": (), "cond_video_latents": None}


def state(rows, raw, seed=5):
    """Clean rows in front of the chunk: [1, rows, raw]."""
    return oracle.noise(seed, (1, rows, raw)) * 0.3


# name -> (case, what the request says besides)
REQUESTS = {
    "state row, 8 joints wide": (DROID, {"clean_action": state(1, 8), "raw_action_dim": 8}),
    "state row in forward dynamics": (FORWARD, {"clean_action": state(1, 10)}),
    "state row in inverse dynamics": (INVERSE, {"clean_action": state(1, 10)}),
    "three state rows": (POLICY, {"clean_action": state(3, 10)}),
    "state row, offset 1": (POLICY, {"clean_action": state(1, 10), "action_frame_offset": 1}),
    "offset 0 without a state row": (POLICY, {"action_frame_offset": 0}),
    "offset -2": (POLICY, {"action_frame_offset": -2}),
    "one action": (ONE_ACTION, {}),
    "one action at 15 fps": (dataclasses.replace(ONE_ACTION, fps=15.0), {}),
    "one action after a state row": (ONE_ACTION, {"clean_action": state(1, 10)}),
    "one action given, the frame rolled out": (
        dataclasses.replace(ONE_ACTION, mode="forward_dynamics"),
        NO_PICTURE,
    ),
    "one latent frame, eight actions": (POLICY, {"video_shape": (1, 33, 40)}),
    "interval that guides two steps": (POLICY, {"guidance_interval": (800.5, 1000.0)}),
    "interval whose ends are timesteps": (POLICY, {"guidance_interval": (713, 999)}),
    "interval that guides the last step": (POLICY, {"guidance_interval": (0, 800)}),
    "interval that guides no step": (POLICY, {"guidance_interval": (1, 2)}),
    "two clean frames": (POLICY, {"cond_frame_indexes": (0, 1)}),
    "the last frame clean": (FORWARD, {"cond_frame_indexes": (2,)}),
    "no clean frame": (POLICY, NO_PICTURE),
    "inverse dynamics with two clean frames": (INVERSE, {"cond_frame_indexes": (0, 1)}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    yield make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), kv_heads=2)
    ours.close_engines()


def request(folder, case, changes):
    return ours.request_of_latents(case, *oracle.tokens(folder, case), **changes)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_against_the_transformer_called_directly(tiny, name):
    case, changes = REQUESTS[name]
    asked = request(tiny, case, changes)
    want = oracle.loop(tiny, asked, case.schedule, case.shift)
    got = ours.engine(tiny, case.schedule, shift=case.shift).step(asked)
    assert got["action"].shape == (1, case.chunk, asked.raw_action_dim)
    assert oracle.error(got["action"], want.action) <= 1e-5
    assert oracle.error(got["video"], want.video) <= 1e-5


@pytest.mark.parametrize("name", ["state row, 8 joints wide", "one action"])
def test_request_against_float64(tiny, name):
    """The same loop with network and solver in float64: both fp32 runs are as near to it."""
    case, changes = REQUESTS[name]
    asked = request(tiny, case, changes)
    truth = oracle.loop(tiny, asked, case.schedule, case.shift, torch.float64)
    got = ours.engine(tiny, case.schedule, shift=case.shift).step(asked)
    assert oracle.error(got["action"], truth.action) <= 1e-5
    assert oracle.error(got["video"], truth.video) <= 1e-5


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("state row, 8 joints wide", "clean_action"),
        ("state row, offset 1", "action_frame_offset"),
        ("offset 0 without a state row", "action_frame_offset"),
        ("interval whose ends are timesteps", "guidance_interval"),
        ("two clean frames", "cond_frame_indexes"),
    ],
)
def test_every_field_matters_to_the_oracle(tiny, name, left_out):
    """A comparison that a field does not move could not find it ignored."""
    case, changes = REQUESTS[name]
    rest = {key: value for key, value in changes.items() if key != left_out}
    said, unsaid = (
        oracle.loop(tiny, request(tiny, case, fields), case.schedule, case.shift)
        for fields in (changes, rest)
    )
    assert oracle.error(unsaid.action, said.action) > 1e-3


def test_intervals_end_on_timesteps_where_they_say_so(tiny):
    solver = oracle.scheduler(oracle.pipeline(tiny, torch.float32), "native", 3, 5.0)
    assert solver.timesteps.tolist() == [999, 908, 713]
