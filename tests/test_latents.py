"""The flat state: patch order, masks, clean values, and that it comes apart as it went together."""

import pytest
import torch
from engine_fixtures import noise, request

from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.latents import (
    clean_state,
    flatten,
    from_patches,
    masks,
    split,
    to_patches,
)
from cosmos3_fast.request import layout
from cosmos3_fast.transfer import upload

CONFIG = TransformerConfig(latent_channel=3, patch_latent_dim=12, action_dim=5)
SIZES = [(1, 1, 1), (2, 5, 6), (1, 4, 7), (3, 33, 40)]
CPU = torch.device("cpu")


def lay(t=2, h=5, w=6, raw=2, **changes):
    fields = {"video_shape": (t, h, w), "action_dim": 5, "raw_action_dim": raw}
    return layout(request(**fields | changes), CONFIG)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_by_index(size):
    """Token (f, i, j), element (row, column, channel): the latent at (2 i + row, 2 j + column)."""
    t, h, w = size
    latents, (rows, cols) = noise(1, 3, t, h, w), (-(-h // 2), -(-w // 2))
    got = to_patches(latents, 2).view(t, rows, cols, 2, 2, 3)
    for f, i, j, r, c in torch.cartesian_prod(*map(torch.arange, (t, rows, cols, 2, 2))).tolist():
        y, x = 2 * i + r, 2 * j + c
        inside = y < h and x < w
        want = latents[0, :, f, y, x] if inside else torch.zeros(3)
        assert torch.equal(got[f, i, j, r, c], want), (f, i, j, r, c)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_state_comes_apart_as_it_went_together(size):
    shape = lay(*size)
    video, action = noise(1, 3, *size), noise(1, 4, 5, seed=2)
    state = flatten(video, action, shape)
    assert state.shape == (shape.values,)
    back, rows = split(state, shape)
    assert torch.equal(back, video) and torch.equal(rows, action)
    patches = to_patches(video, 2)
    assert torch.equal(from_patches(patches, shape), video)


def test_flatten_takes_the_dtype_of_the_video():
    state = flatten(noise(1, 3, 2, 5, 6).double(), noise(1, 4, 5), lay())
    assert state.dtype is torch.float64


def parts(values, shape):
    """A mask over the state as video [C, T, H, W] (padding cut), its padding, and rows."""
    ones = flatten(torch.ones(1, 3, shape.frames, shape.height, shape.width),
                   torch.ones(1, shape.rows, 5), shape).bool()  # fmt: skip
    assert not values[~ones].any(), "the padding beyond an odd height moves"
    video, rows = split(values.float(), shape)
    return video[0], rows[0]


@pytest.mark.parametrize(
    ("mode", "frames", "state_rows", "noisy_frames", "noisy_rows"),
    [
        ("policy", None, 0, [1], [0, 1, 2, 3]),
        ("policy", (), 0, [0, 1], [0, 1, 2, 3]),
        ("policy", None, 2, [1], [2, 3, 4, 5]),
        ("forward_dynamics", None, 1, [1], []),
        ("inverse_dynamics", None, 0, [], [0, 1, 2, 3]),
        ("inverse_dynamics", (1,), 0, [0], [0, 1, 2, 3]),
    ],
)
def test_what_moves(mode, frames, state_rows, noisy_frames, noisy_rows):
    state = noise(1, state_rows, 2) if state_rows else None
    shape = lay(mode=mode, cond_frame_indexes=frames, clean_action=state)
    found = masks(shape, 2)
    video, rows = parts(found.values, shape)
    for f in range(2):
        assert video[:, f].unique().tolist() == [float(f in noisy_frames)]
    for k in range(4 + state_rows):
        assert rows[k, :2].unique().tolist() == [float(k in noisy_rows)]
    assert not rows[:, 2:].any(), "channels past the robot's own move"
    per_frame = 3 * 3
    tokens = [f * per_frame + i for f in noisy_frames for i in range(per_frame)]
    assert found.video_rows.tolist() == tokens
    assert found.action_rows.tolist() == noisy_rows
    moving = [*tokens, *(2 * per_frame + k for k in noisy_rows)]
    assert found.tokens.nonzero()[:, 0].tolist() == moving


def test_clean_values_stand_at_their_places():
    shape = lay(cond_frame_indexes=(1,), clean_action=noise(1, 1, 2))
    latents, state = noise(1, 3, 2, 7, 8, seed=3), noise(1, 1, 2, seed=4)
    video, rows = split(clean_state(shape, latents, None, state, CPU), shape)
    assert not video[:, :, 0].any()
    assert torch.equal(video[:, :, 1], latents[:, :, 1, :5, :6])
    assert torch.equal(rows[0, 0], torch.cat((state[0, 0], torch.zeros(3))))
    assert not rows[0, 1:].any()


def test_clean_actions_follow_the_state_rows():
    shape = lay(mode="forward_dynamics", clean_action=noise(1, 2, 2))
    actions, state = noise(1, 4, 2, seed=5), noise(1, 2, 2, seed=6).bfloat16()
    values = clean_state(shape, noise(1, 3, 1, 5, 6).half(), actions, state, CPU)
    _, rows = split(values, shape)
    assert values.dtype is torch.float32
    assert torch.equal(rows[:, 2:, :2], actions)
    assert torch.equal(rows[:, :2, :2], state.float())
    assert not rows[:, :, 2:].any()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2)])
def test_video_latents_have_memory_of_their_own(size):
    """One latent pixel is a view of the state all the way."""
    shape = lay(1, *size)
    state = torch.zeros(shape.values)
    video, _ = split(state, shape)
    assert video.is_contiguous()
    assert video.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


def test_nothing_clean_is_all_zero():
    shape = lay(cond_frame_indexes=())
    assert not clean_state(shape, None, None, None, CPU).any()
    assert not clean_state(shape, noise(1, 3, 2, 5, 6), None, None, CPU).any()


@pytest.mark.gpu
def test_an_upload_does_not_wait_for_the_device():
    """And reads what the host holds when it is called."""
    values, device = noise(1, 1000), torch.device("cuda:0")
    assert torch.equal(upload(values, device).cpu(), values)
    done = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    done.record()
    got, want = upload(values, device), values.clone()
    assert not done.query()
    values.zero_()
    assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "view", [lambda x: x[:, :, :1], lambda x: x[:, :1].expand(1, 3, 4, 5, 6)], ids=["cut", "grey"]
)
def test_a_view_is_uploaded_as_what_it_shows(view):
    values = view(noise(1, 3, 4, 5, 6))
    assert torch.equal(upload(values, torch.device("cuda:0")).cpu(), values)
