"""`--preset droid`: actions there and back, what counts as a mosaic, and clips of any name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast.cli import main, parser
from cosmos3_fast.cli.flags import Settings
from cosmos3_fast.cli.observation import blank, observe
from cosmos3_fast.cli.output import write_video
from cosmos3_fast.processor import DROID, compose_droid_views, read_actions, write_actions
from cosmos3_fast.processor.views import droid_mosaic

STATE = ("--state", "0.1,-0.2,0.3,-1.5,0.2,1.4,0.7,0.9")
SMALL = ("--steps", "1", "--image-size", "256", "--action-chunk-size", "4", "--no-video")
Run = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mosaic, three cameras, a clip of mosaics."""
    folder = tmp_path_factory.mktemp("droid")
    random = np.random.RandomState(0)
    for name, size in {"mosaic": (270, 320), "wrist": (90, 160), "left": (72, 128)}.items():
        Image.fromarray(random.randint(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    write_video(folder / "clip.mp4", torch.rand(1, 3, 6, 270, 320), 15.0)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def call(*flags: str) -> torch.Tensor:
        base = ["run", "--checkpoint", str(checkpoint()), "--preset", "droid", *STATE, *SMALL]
        image = ["--image", str(folder / "mosaic.png"), "--out", str(tmp_path / "out")]
        assert main([*base, *image, *flags]) == 0
        return read_actions(tmp_path / "out_action.json")

    return call


def settings(*flags: str) -> Settings:
    base = ["info", "--checkpoint", "c", "--preset", "droid"]
    return Settings.of(parser().parse_args([*base, *flags]))


def test_forward_dynamics_echoes_the_actions_of_the_policy(run, tmp_path, monkeypatch):
    """On the way in the gripper is turned as it is on the way out; the model sees its own rows."""
    given = run()
    (tmp_path / "policy.json").write_text((tmp_path / "out_action.json").read_text())
    seen = []
    made = DROID.encode_action
    monkeypatch.setattr(
        DROID, "encode_action", lambda droid, rows: seen.append(made(droid, rows)) or seen[-1]
    )
    forward = ("--mode", "forward_dynamics", "--action-file")
    assert torch.equal(run(*forward, str(tmp_path / "policy.json")), given)
    (rows,) = seen
    assert torch.equal(rows, DROID().encode_action(given))
    rows = torch.from_numpy(np.random.RandomState(1).uniform(0, 1, (4, 8))).float()
    write_actions(tmp_path / "own.json", rows)
    torch.testing.assert_close(run(*forward, str(tmp_path / "own.json")), rows, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(540, 640), (1080, 1280), (270, 320), (542, 640), (27, 32)])
def test_a_picture_of_the_mosaics_shape_is_one(tmp_path, size):
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = observe(settings("--image", str(tmp_path / "a.png")), 33)
    assert torch.equal(got, droid_mosaic(pixels)[None])


@pytest.mark.parametrize("size", [(480, 640), (360, 640), (540, 652), (548, 640), (640, 540)])
def test_a_picture_of_another_shape_is_refused(tmp_path, size):
    Image.new("RGB", size[::-1]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"--image: .* 540x640 .* got {size[0]}x{size[1]}: pass"):
        observe(settings("--image", str(tmp_path / "a.png")), 33)


def test_three_cameras_are_composed(folder):
    views = [str(folder / f"{name}.png") for name in ("wrist", "left", "left")]
    got = observe(settings("--image", *views), 33)
    assert torch.equal(got, compose_droid_views(*views)[None])


def test_a_clip_of_mosaics_is_brought_to_their_size(folder):
    got = observe(settings("--video", str(folder / "clip.mp4")), 5)
    assert got.shape == (5, 540, 640, 3) and got.float().std() > 10


@pytest.mark.parametrize("command", ["run", "info"])
@pytest.mark.parametrize(("mode", "read"), [("policy", 1), ("inverse_dynamics", 5)])
def test_frames_of_a_clip_that_are_not_read_are_said(folder, tmp_path, caplog, command, mode, read):
    """The clip has 6."""
    base = [command, "--checkpoint", str(checkpoint()), "--domain-name", "umi", "--mode", mode]
    flags = [*SMALL[:-1], "--video", str(folder / "clip.mp4")]
    out = ["--no-video", "--out", str(tmp_path / "out")] if command == "run" else []
    assert main([*base, *flags, *out]) == 0
    (said,) = [line for line in caplog.messages if "frames" in line]
    where = f"{folder}/clip.mp4"
    assert said == f"mode {mode} reads {read} of 6 frames of '{where}'; the others are dropped"


def test_a_clip_of_as_many_frames_as_are_read_is_not_worth_a_word(folder, caplog):
    observe(settings("--video", str(folder / "clip.mp4")), 6)
    assert caplog.messages == []


def test_without_an_observation_the_mosaic_is_blank():
    assert blank(settings("--height", "64")).shape == (1, 540, 640, 3)


def test_info_describes_the_request_that_run_makes(folder, capsys, monkeypatch):
    """The same canvas, video and prompt for a blank picture, a mosaic and three cameras."""
    base = ["info", "--checkpoint", str(checkpoint()), "--preset", "droid"]
    wrist, left = str(folder / "wrist.png"), str(folder / "left.png")
    said = []
    for image in ((), ("--image", str(folder / "mosaic.png")), ("--image", wrist, left, left)):
        assert main([*base, *image]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert "(33, 540, 640)" in said[0]


@pytest.mark.parametrize("name", ["clip.mpg", "clip", "clip.png"])
def test_the_flag_says_what_a_file_is(folder, tmp_path, name):
    (tmp_path / name).write_bytes((folder / "clip.mp4").read_bytes())
    plain = Settings.of(parser().parse_args(["info", "--checkpoint", "c", "--video", "x"]))
    plain.args.video = str(tmp_path / name)
    assert observe(plain, 4).shape == (4, 270, 320, 3)
    plain.args.video, plain.args.image = None, [str(tmp_path / name)]
    with pytest.raises(ValueError, match=rf"--image: .*{name}.* \(a clip goes to --video\)"):
        observe(plain, 4)


def test_a_picture_named_like_a_clip_is_a_picture(folder, tmp_path):
    (tmp_path / "shot.mp4").write_bytes((folder / "mosaic.png").read_bytes())
    got = observe(settings("--image", str(tmp_path / "shot.mp4")), 4)
    assert torch.equal(got, observe(settings("--image", str(folder / "mosaic.png")), 4))


def test_actions_in_chunks_are_turned_too(run, tmp_path):
    chunks = np.random.RandomState(2).uniform(0, 1, (2, 4, 8)).tolist()
    (tmp_path / "chunks.json").write_text(json.dumps({"action_chunks": chunks}))
    flags = ("--mode", "forward_dynamics", "--action-file", str(tmp_path / "chunks.json"))
    got = run(*flags, "--action-chunk-index", "1")
    torch.testing.assert_close(got, torch.tensor(chunks[1]), rtol=0, atol=1e-7)
