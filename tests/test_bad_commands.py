"""What the command refuses: one line on stderr, exit status 2, no network call, no file."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast.cli import main
from cosmos3_fast.cli.output import say, write_video
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.testing import make_tiny_checkpoint
from cosmos3_fast.vae import WanVAE

NAN = float("nan")


@pytest.fixture
def never_runs(monkeypatch):
    """No network may run in these tests; loading the weights is all right."""

    def fail(*_, **__):
        raise AssertionError("a network ran before the input was refused")

    monkeypatch.setattr(Cosmos3Transformer, "velocity", fail)
    monkeypatch.setattr(Cosmos3Transformer, "encode_prompt", fail)
    monkeypatch.setattr(WanVAE, "encode", fail)
    monkeypatch.setattr(WanVAE, "decode", fail)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad observations and action files in one folder."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    (folder / "empty.mp4").write_bytes(b"")
    write_video(folder / "clip.mp4", torch.rand(1, 3, 2, 48, 64), 24.0)
    (folder / "clip.mp4").rename(folder / "good.mpg")
    rows = [[0.1] * 10 for _ in range(4)]
    documents = {
        "nan": [[NAN] * 10, *rows[1:]],
        "ragged": [[0.1] * 10, [0.1] * 9],
        "wide": [[0.1] * 11] * 4,
        "shape": {"shape": [1, 5, 10], "dtype": "float32", "data": rows},
        "chunks": {"action_chunks": [rows]},
        "good": rows,
        "chunks of chunks": {"action_chunks": [{"action_chunks": [rows]}]},
        "upside down": {"min": [0.0], "max": [-1.0]},
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "text.json").write_text("joints: 1 2 3")
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "nested.json").write_text("[" * 300 + "]" * 300)
    (folder / "stats.json").write_text(json.dumps({"min": [0.0], "max": ["high"]}))
    return folder


GOOD = ("--image", "{files}/good.png")
FORWARD = (*GOOD, "--mode", "forward_dynamics")
DROID, STATE = ("--preset", "droid", "--state"), "0,0,0,0,0,0,0,1"
COMMANDS = {
    "no observation": ((), "pass exactly one of --image and --video"),
    "two observations": ((*GOOD, "--video", "x.mp4"), "exactly one of --image and --video"),
    "two images": (("--image", "a.png", "b.png"), "--image takes 1 image here, got 2"),
    "unreadable image": (("--image", "{files}/broken.png"), "cannot read an image from .*broken"),
    "no image": (("--image", "{files}/gone.png"), "cannot read an image from .*gone.png"),
    "empty video": (("--video", "{files}/empty.mp4"), "cannot read a video from .*empty.mp4"),
    "forward dynamics without actions": (FORWARD, "forward_dynamics needs --action-file"),
    "actions with nan": (
        (*FORWARD, "--action-file", "{files}/nan.json"),
        "nan.json' has 10 values that are not finite, the first is nan in row 0, column 0",
    ),
    "ragged actions": (
        (*FORWARD, "--action-file", "{files}/ragged.json"),
        "ragged.json' is ragged: row 0 has 10 values, row 1 has 9",
    ),
    "too many columns": (
        (*FORWARD, "--action-file", "{files}/wide.json"),
        "cond_action has 11 columns, more than raw_action_dim 10",
    ),
    "actions of another shape": (
        (*FORWARD, "--action-file", "{files}/shape.json"),
        r"shape says \[1, 5, 10\], data has \[4, 10\]",
    ),
    "action chunk out of range": (
        (*FORWARD, "--action-file", "{files}/chunks.json", "--action-chunk-index", "3"),
        "action chunk 3 asked for, action_chunks holds 1",
    ),
    "actions that are no json": (
        (*FORWARD, "--action-file", "{files}/text.json"),
        "cannot read actions from .*text.json",
    ),
    "unknown domain": ((*GOOD, "--domain-name", "umbrella"), "unknown domain 'umbrella'"),
    "condition frames out of range": (
        (*GOOD, "--condition-frames", "0,2"),
        r"cond_frame_indexes \[0, 2\] out of range: 5 frames have 2 latent frames",
    ),
    "condition frames in words": (
        (*GOOD, "--condition-frames", "first"),
        "--condition-frames takes comma-separated numbers, got 'first'",
    ),
    "no condition frame": (
        (*GOOD, "--condition-frames", ""),
        "--condition-frames takes comma-separated numbers, got ''",
    ),
    "a condition frame left out": (
        (*GOOD, "--condition-frames", "0,,1"),
        "--condition-frames takes comma-separated numbers, got '0,,1'",
    ),
    "half a condition frame": ((*GOOD, "--condition-frames", "0.5"), "takes integers, got '0.5'"),
    "zero steps": ((*GOOD, "--steps", "0"), "num_inference_steps must be .* got 0"),
    "a billion steps": (
        (*GOOD, "--steps", "1000000000"),
        r"num_inference_steps must be an integer in \[1, 1000\], got 1000000000",
    ),
    "fps of no video": ((*GOOD, "--fps", "1e300"), r"cannot have 1e\+300 frames a second"),
    "fps of a still": ((*GOOD, "--fps", "1e-6"), "a video cannot have 1e-06 frames a second"),
    "chunk of 6": ((*GOOD, "--action-chunk-size", "6"), "multiple of 4, got 6"),
    "empty prompt": ((*GOOD, "--prompt", " "), "must be an instruction that is not empty"),
    "tier": ((*GOOD, "--image-size", "300"), "image_size 300 is no resolution tier"),
    "canvas": (
        (*GOOD, "--image-size", "0", "--height", "100"),
        "canvas 100x832: height and width must be positive multiples of 16",
    ),
    "negative height": (
        (*GOOD, "--image-size", "0", "--height", "-5"),
        "--height must be at least 1 pixel, got -5",
    ),
    "no width": ((*GOOD, "--width", "0"), "--width must be at least 1 pixel, got 0"),
    "width of the domain": (
        (*GOOD, "--raw-action-dim", "11"),
        r"raw_action_dim 11 differs from \[10, 8\]",
    ),
    "interval of one number": (
        (*GOOD, "--guidance-interval", "400"),
        "--guidance-interval takes 2 numbers, got 1",
    ),
    "interval upside down": (
        (*GOOD, "--guidance-interval", "900,100"),
        r"guidance_interval must be .* lo < hi.*, got \(900.0, 100.0\)",
    ),
    "no checkpoint": (("--checkpoint", "", *GOOD), "--checkpoint must not be empty, got ''"),
    "no device": ((*GOOD, "--device", ""), "--device must not be empty, got ''"),
    "no statistics": ((*GOOD, "--action-stats-path", ""), "--action-stats-path must not be empty"),
    "no action file": ((*FORWARD, "--action-file", ""), "--action-file must not be empty, got ''"),
    "an image without a name": (("--image", ""), "--image must not be empty, got ''"),
    "a clip without a name": (("--video", ""), "--video must not be empty, got ''"),
    "actions nested without end": (
        (*FORWARD, "--action-file", "{files}/deep.json"),
        "cannot read actions from .*deep.json': maximum recursion depth",
    ),
    "actions nested deeper than any": (
        (*FORWARD, "--action-file", "{files}/nested.json"),
        "nested.json' is nested more than 8 lists deep",
    ),
    "chunks of chunks": (
        (*FORWARD, "--action-file", "{files}/chunks of chunks.json"),
        r"action_chunks\[0\] must hold rows, got action_chunks again",
    ),
    "an instruction that is no UTF-8": (
        (*GOOD, "--prompt", "caf\udce9", "--prompt-format", "json"),
        r"'task' must be Unicode text .*, got '\\udce9' at character 3",
    ),
    "a negative prompt that is no UTF-8": (
        (*GOOD, "--negative-prompt", "\udce9", "--guidance-scale", "3"),
        r"negative_prompt must be Unicode text .*, got '\\udce9' at character 0",
    ),
    "a view that is no UTF-8": (
        (*GOOD, "--view-description", "a \udce9", "--prompt-format", "plain"),
        r"view_description must be Unicode text .*, got '\\udce9' at character 2",
    ),
    "statistics upside down": (
        (*GOOD, "--action-stats-path", "{files}/upside down.json"),
        "upside down.json': max must not be below min, got -1 < 0 in channel 0",
    ),
    "statistics": (
        (*GOOD, "--action-stats-path", "{files}/stats.json"),
        "stats.json': 'max' is no list of numbers",
    ),
    "shift": ((*GOOD, "--flow-shift", "-1"), "flow_shift must be positive, got -1.0"),
    "ranks": ((*GOOD, "--cfg", "3"), "cfg_size must be 1 or 2"),
    "device": ((*GOOD, "--device", "tpu"), "device target must be cpu, cuda or cuda:N, got 'tpu'"),
    "results in a file": (
        (*GOOD, "--out", "{files}/good.png/out"),
        r"cannot write .*/good\.png/out_action\.json: Not a directory",
    ),
    "results without a name": ((*GOOD, "--out", ""), "--out PREFIX must end in a name, .*got ''"),
    "results here": ((*GOOD, "--out", "."), "--out PREFIX must end in a name, .* got '.'"),
    "results above": ((*GOOD, "--out", "r/.."), "--out PREFIX must end in a name, .* got 'r/..'"),
    "results in a folder": (
        (*GOOD, "--out", "r/"),
        "--out PREFIX must end in a name, as in results/policy; got 'r/'",
    ),
    "a clip as an image": (
        ("--image", "{files}/empty.mp4"),
        r"--image: cannot read an image from .*empty.mp4.* \(a clip goes to --video\)",
    ),
    "text as a video": (("--video", "{files}/text.json"), "--video: cannot read a video from"),
    "state of another robot": (
        (*GOOD, "--state", "0,0,0,0,0,0,0,1"),
        "--state is the DROID robot's, and goes with --preset droid alone",
    ),
    "droid without a state": (
        ("--preset", "droid", *GOOD),
        "--preset droid needs --state",
    ),
    "droid with two images": (
        ("--preset", "droid", "--state", "0", "--image", "a", "b"),
        "--image takes 1 or 3 images here, got 2",
    ),
    "droid with seven numbers": (
        ("--preset", "droid", "--state", "1,2,3,4,5,6,7", *GOOD),
        "--state takes 8 numbers, got 7",
    ),
    "droid with a number left out": (
        (*DROID, "1,2,3,,5,6,7,0.5", *GOOD),
        "--state takes comma-separated numbers, got '1,2,3,,5,6,7,0.5'",
    ),
    "droid with an open gripper": (
        (*DROID, "1,2,3,4,5,6,7,1.5", *GOOD),
        r"--state: the gripper of a state must lie in \[0, 1\], got 1.5",
    ),
    "droid with one camera": (
        (*DROID, STATE, *GOOD),
        r"--image: the DROID policy sees a mosaic .* 540x640 .* got 48x64: pass three pictures",
    ),
    "droid with the clip of one camera": (
        (*DROID, STATE, "--video", "{files}/good.mpg"),
        "--video: the DROID policy sees a mosaic .* got 48x64: pass three pictures",
    ),
    "droid with actions of another robot": (
        (*DROID, STATE, *FORWARD, "--action-file", "{files}/good.json"),
        "--action-file: DROID actions have 8 columns, got 10",
    ),
    "droid with nan": (
        ("--preset", "droid", "--state", "1,2,3,4,5,6,7,nan", *GOOD),
        "state has 1 values that are not finite",
    ),
}
SMALL = (
    "--image-size", "256", "--action-chunk-size", "4", "--domain-name", "droid_lerobot",
    "--steps", "2",
)  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), COMMANDS.values(), ids=COMMANDS)
@pytest.mark.usefixtures("never_runs")
def test_the_command_refuses_in_one_line_with_status_2(
    files, tmp_path, capsys, monkeypatch, flags, message
):
    flags = [flag.format(files=files) for flag in flags]
    small = () if "--preset" in flags else SMALL
    base = ["--checkpoint", str(checkpoint()), "--out", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)  # some say --out themselves
    assert main(["run", *base, *small, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("cosmos3-fast run: ")]
    assert len(said) == 1 and "Traceback" not in "".join(lines)
    with pytest.raises(ValueError, match=message):
        raise ValueError(said[0])
    assert list(tmp_path.iterdir()) == []


INFO = {
    "no ranks": (("--tp", "0"), "world_size must be a positive integer, got 0"),
    "three groups": (("--cfg", "3"), "cfg_size must be 1 or 2"),
    "device": (("--device", "tpu"), "device target must be cpu, cuda or cuda:N, got 'tpu'"),
    "a billion steps": (("--steps", "1000000000"), r"must be an integer in \[1, 1000\]"),
    "negative height": (("--height", "-5"), "--height must be at least 1 pixel, got -5"),
    "no height": (("--height", "0"), "--height must be at least 1 pixel, got 0"),
    "two observations": (("--image", "a", "--video", "b"), "exactly one of --image and --video"),
    "two images": (("--preset", "droid", "--image", "a", "b"), "1 or 3 images here, got 2"),
    "no statistics": (("--action-stats-path", ""), "--action-stats-path must not be empty, got ''"),
    "no device": (("--device", ""), "--device must not be empty, got ''"),
    "no UTF-8": (("--prompt", "\udce9"), r"'task' must be Unicode text .*, got '\\udce9'"),
    "a huge chunk": (("--action-chunk-size", "400000000"), "tokens, more than 1048576"),
}


@pytest.mark.parametrize(("flags", "message"), INFO.values(), ids=INFO)
def test_info_refuses_what_run_would(capsys, flags, message):
    base = ["info", "--checkpoint", str(checkpoint()), "--domain-name", "umi"]
    assert main([*base, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cosmos3-fast info: ") and re.search(message, line)


def test_a_missing_vae_is_named_when_pixels_come(tmp_path, capsys, files):
    folder = make_tiny_checkpoint(tmp_path / "tiny", kv_heads=2)
    shutil.rmtree(folder / "vae")
    base = ["run", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    image = ["--image", str(files / "good.png")]
    assert main([*base, *image]) == 2
    assert "decode_video needs" in capsys.readouterr().err
    assert main([*base, *image, "--no-video"]) == 2
    assert "cond_video_pixels need the checkpoint's vae/, which is missing" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["run", "info", "check"])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, capsys, command):
    where = [str(tmp_path)] if command == "check" else ["--checkpoint", str(tmp_path)]
    image = ["--image", "a.png"] if command == "run" else []
    assert main([command, *where, *image]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"cosmos3-fast {command}: cannot read {tmp_path}/transformer")
    assert len(said.splitlines()) == 1


def test_a_line_is_written_in_one_piece(monkeypatch):
    """Two ranks' lines would run into one another if the end of each came apart from it."""

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    pieces = []
    monkeypatch.setattr(sys, "stderr", Pieces())
    say("run", ValueError("no picture"))
    assert pieces == ["cosmos3-fast run: no picture\n"]


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("make-tiny", [""], "DIR must name a folder, got ''"),
        ("make-tiny", ["."], ". must be empty or hold a tiny checkpoint"),
        ("demo", ["--out", ""], "--out must name a folder, got ''"),
        ("demo", ["--device", ""], "--device must not be empty, got ''"),
        ("check", [""], "DIR must name a folder, got ''"),
        ("check", [".", "--device", ""], "--device must not be empty, got ''"),
        ("bench", ["--tiny", "--json", ""], "--json must not be empty, got ''"),
        ("bench", ["--tiny", "--device", ""], "--device must not be empty, got ''"),
    ],
)
def test_a_folder_in_use_is_not_written_to(tmp_path, monkeypatch, capsys, command, flags, message):
    (tmp_path / "model_index.json").write_text('{"_class_name": "Cosmos3OmniPipeline"}')
    monkeypatch.chdir(tmp_path)
    assert main([command, *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"cosmos3-fast {command}: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
