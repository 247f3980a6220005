"""The command: all modes, the example's command lines, the DROID preset, what it writes."""

import json
import runpy
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast import Engine
from cosmos3_fast.cli import check, main, parser
from cosmos3_fast.cli.demo import FRAMES, render
from cosmos3_fast.cli.flags import Settings
from cosmos3_fast.cli.output import plot_actions, require_writers, write_video
from cosmos3_fast.processor import read_actions, write_actions

PROMPT = "robot picks up the cup"
STEPS = ("--steps", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An observation, a clip of 17 frames and actions of the droid width."""
    folder = tmp_path_factory.mktemp("files")
    frames = [render(index).resize((80, 64)) for index in range(FRAMES)]
    frames[0].save(folder / "observation.png")
    clip = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    write_video(folder / "obs.mp4", clip.permute(3, 0, 1, 2)[None] / 255, 24.0)
    rows = np.random.RandomState(0).uniform(-1, 1, (16, 10))
    write_actions(folder / "action.json", torch.from_numpy(rows))
    return folder


@pytest.fixture
def run(files, tmp_path, capsys):
    """The example script's command line, its script path exchanged; tier 256 and two steps."""

    def call(*flags, status=0):
        base = ["run", "--tp", "1", "--checkpoint", str(checkpoint()), *STEPS]
        base += ["--image-size", "256", "--out", str(tmp_path / "out" / "wn")]
        assert main([*base, *flags]) == status
        said = capsys.readouterr()
        return tmp_path / "out", said.err if status else said.out

    return call


def decoded(path):
    """Frames uint8 [T, H, W, 3] and frames a second of a video file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def action(folder):
    document = json.loads((folder / "wn_action.json").read_text())
    assert set(document) == {"shape", "dtype", "data"} and document["dtype"] == "float32"
    rows = np.array(document["data"])
    assert document["shape"] == [1, *rows.shape] and np.isfinite(rows).all()
    return rows


EXAMPLES = {
    "policy": (("--image", "{}/observation.png"), {}),
    "forward_dynamics": (
        ("--image", "{}/observation.png", "--mode", "forward_dynamics", "--action-file",
         "{}/action.json"), {},
    ),
    "inverse_dynamics": (
        ("--video", "{}/obs.mp4", "--mode", "inverse_dynamics", "--condition-frames", "0,1"), {},
    ),
}  # fmt: skip


def test_warmup_prepares_with_the_commands_own_request(run, files, monkeypatch):
    calls = []
    for name in ("warmup", "step"):
        made = getattr(Engine, name)

        def noted(engine, request, *args, name=name, made=made, **more):
            calls.append((name, request))
            return made(engine, request, *args, **more)

        monkeypatch.setattr(Engine, name, noted)
    flags = ["--image", str(files / "observation.png"), "--prompt", PROMPT, "--no-video"]
    plain, _ = run(*flags)
    rows = action(plain)
    assert [name for name, _ in calls] == ["step"]
    warm, _ = run(*flags, "--warmup")
    assert [name for name, _ in calls[1:]] == ["warmup", "step"] and calls[1][1] is calls[2][1]
    assert np.array_equal(action(warm), rows)


@pytest.mark.parametrize("mode", EXAMPLES)
def test_the_examples_command_lines(run, files, mode):
    """Three modes: action JSON [1, 16, 10], an mp4 of 17 frames and a plot that can be read."""
    flags = [flag.format(files) for flag in EXAMPLES[mode][0]]
    folder, out = run("--prompt", PROMPT, "--domain-name", "droid_lerobot", *flags)
    rows = action(folder)
    assert rows.shape == (16, 10)
    if mode == "forward_dynamics":
        given = read_actions(files / "action.json").numpy()
        assert np.array_equal(rows.astype(np.float32), given)
    video, rate = decoded(folder / "wn.mp4")
    assert video.shape == (17, 64, 80, 3) and rate == 24.0
    with Image.open(folder / "wn_action.png") as plot:
        plot.load()
        assert plot.size[0] > 300 and len(plot.convert("RGB").getcolors(1 << 20)) > 8
    for stage in ("encode", "prompt", "denoise", "decode", "total"):
        assert stage in out
    assert [line for line in out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {folder}/wn{end}" for end in ("_action.json", "_action.png", ".mp4")
    ]


def test_the_command_gives_the_engines_numbers(run, files):
    """Guidance, interval, seed and schedule reach the engine: the same request made by hand."""
    flags = ["--seed", "7", "--guidance-scale", "3", "--guidance-interval", "900,1000"]
    flags += ["--schedule", "flow", "--flow-shift", "5", "--fps", "15", "--action-chunk-size", "4"]
    flags += ["--domain-name", "umi", "--prompt-format", "plain", "--no-video"]
    image = str(files / "observation.png")
    folder, _ = run("--image", image, "--prompt", PROMPT, *flags)
    assert not (folder / "wn.mp4").exists()
    from cosmos3_fast import Cosmos3ActionRequest, Cosmos3PolicyProcessor, pixel_to_latent_shape

    processor = Cosmos3PolicyProcessor(
        tokenizer_name_or_path=checkpoint() / "text_tokenizer", image_size=256, fps=15,
        action_chunk_size=4, domain_name="umi", params_dtype=torch.float32,
    )  # fmt: skip
    got = processor.preprocess({"images": image, "task": PROMPT})
    request = Cosmos3ActionRequest(
        got.text_ids, got.text_mask, got.neg_text_ids, got.neg_text_mask,
        pixel_to_latent_shape(*got.video_shape), "policy", 6, 4, 10,
        cond_video_pixels=got.pixel_values, fps=15.0, num_inference_steps=2, guidance_scale=3.0,
        seed=7, guidance_interval=(900, 1000),
    )  # fmt: skip
    source = {"device": "cpu", "schedule": "flow", "flow_shift": 5.0}
    with Engine.from_pretrained(checkpoint(), **source) as engine:
        want = engine.step(request)["action"][0].numpy()
    assert np.array_equal(action(folder).astype(np.float32), want)


def test_the_droid_preset_gives_32_rows_of_8(run, files):
    """Three views, the joints and the gripper in; joints and gripper out, the state row dropped."""
    views = [files / f"{name}.png" for name in ("wrist", "left", "right")]
    for seed, view in enumerate(views):
        pixels = np.random.RandomState(seed).randint(0, 256, (90, 160, 3), np.uint8)
        Image.fromarray(pixels).save(view)
    state = "0.1,-0.2,0.3,-1.5,0.2,1.4,0.7,0.9"
    flags = ["--preset", "droid", "--state", state, "--no-video", "--prompt", "open the drawer"]
    folder, _ = run(*flags, "--image", *map(str, views))
    rows = action(folder)
    assert rows.shape == (32, 8)
    mosaic = Image.new("RGB", (640, 540))
    mosaic.save(files / "mosaic.png")
    folder, _ = run(*flags, "--image", str(files / "mosaic.png"))
    assert action(folder).shape == (32, 8)
    assert not np.array_equal(action(folder), rows)


def test_the_droid_presets_settings(files):
    flags = ["--preset", "droid", "--checkpoint", str(checkpoint()), "--image", "a", "--steps", "5"]
    settings = Settings.of(parser().parse_args(["run", *flags]))
    assert settings.values["guidance_scale"] == 3.0 and settings.values["steps"] == 5
    plugin = settings.plugin_args(True)
    assert (plugin.schedule, plugin.flow_shift) == ("native", 5.0)
    karras = parser().parse_args(["run", *flags, "--use-karras-sigmas", "true"])
    plugin = Settings.of(karras).plugin_args(True)
    assert (plugin.schedule, plugin.use_karras_sigmas) == (None, True)
    processor = settings.processor("cpu")
    assert (processor.fps, processor.action_chunk_size, processor.raw_action_dim) == (15.0, 32, 8)
    dtypes = [
        Settings.of(parser().parse_args(["run", *flags, *more])).dtype
        for more in (["--device", "cpu"], ["--device", "cuda"], ["--dtype", "float16"])
    ]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]


def test_the_defaults_are_the_example_scripts():
    flags = ["run", "--checkpoint", str(checkpoint()), "--image", "a"]
    settings = Settings.of(parser().parse_args(flags))
    plugin = settings.plugin_args(True)
    assert (plugin.flow_shift, plugin.use_karras_sigmas, plugin.schedule) == (10.0, None, None)
    assert settings.sampling() == {
        "fps": 24.0, "num_inference_steps": 30, "guidance_scale": 1.0, "seed": 42,
        "guidance_interval": None,
    }  # fmt: skip
    assert settings.values["domain_name"] == "agibotworld"
    assert settings.args.prompt_format == "json" and settings.args.condition_frames is None


def lines(text):
    """`info`'s lines as a dict."""
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}


def test_info_says_what_a_request_would_be(capsys):
    droid = ["--preset", "droid", "--device", "cpu"]
    assert main(["info", "--checkpoint", str(checkpoint()), *droid]) == 0
    said = lines(capsys.readouterr().out)
    assert said["canvas (HxW)"] == "544x736"
    assert said["latents (t, h, w)"] == "(9, 33, 40)"
    assert said["tokens"] == "3093 = 9x17x20 video + 33 action"
    assert said["sigmas (native)"] == "0.9998 0.937265 0.833055 0.624687 0"
    assert said["timesteps"] == "999 937 833 624" and said["network calls"] == "8"
    assert '"aspect_ratio": "4,3"' in said["prompt"]
    assert said["prompt keys and values"] == "0.4 MB (capacity 256 tokens)"


def test_info_needs_no_weights_and_refuses_what_run_does(tmp_path, capsys, files):
    assert main(["make-tiny", str(tmp_path / "tiny"), "--seed", "3"]) == 0
    for file in (tmp_path / "tiny").rglob("*.safetensors"):
        file.unlink()
    flags = ["--mode", "forward_dynamics", "--image", str(files / "observation.png")]
    base = ["info", "--checkpoint", str(tmp_path / "tiny"), *flags, "--domain-name", "umi"]
    capsys.readouterr()
    assert main(base) == 0
    assert lines(capsys.readouterr().out)["tokens"] == "46 = 5x2x3 video + 16 action"
    shutil.rmtree(tmp_path / "tiny" / "vae")
    assert main(base) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "cond_video_pixels need the checkpoint's vae/, which is missing" in said


def test_info_describes_a_clip_for_inverse_dynamics(capsys, files):
    flags = ["--mode", "inverse_dynamics", "--video", str(files / "obs.mp4"), "--domain-name"]
    assert main(["info", "--checkpoint", str(checkpoint()), *flags, "umi"]) == 0
    said = lines(capsys.readouterr().out)
    assert said["video (frames, H, W)"] == "(17, 64, 80)"


def test_make_tiny_writes_what_the_engine_runs(tmp_path, capsys):
    assert main(["make-tiny", str(tmp_path / "tiny"), "--seed", "3"]) == 0
    assert "wrote a tiny checkpoint" in capsys.readouterr().out
    Engine.from_pretrained(tmp_path / "tiny", device="cpu").close()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_check_agrees_with_diffusers(capsys, dtype, bound):
    assert main(["check", str(checkpoint()), "--device", "cpu", "--dtype", dtype]) == 0
    said = capsys.readouterr().out.splitlines()
    for name, line in zip(("action", "video"), said, strict=False):
        assert line.startswith(f"{name}: relative L2 difference ")
        assert float(line.split()[-1]) <= bound
    assert said[-1] == f"agrees with diffusers within {bound:.0e}"


@pytest.mark.parametrize("other", [1.001, float("nan")])
def test_check_finds_a_difference(monkeypatch, capsys, tmp_path, other):
    ours = {"action": torch.ones(1, 4, 2), "video": torch.ones(1, 2)}
    theirs = ours | {"video": torch.full((1, 2), other)}
    monkeypatch.setattr(check, "_ours", lambda *_: ours)
    monkeypatch.setattr(check, "_diffusers", lambda *_: theirs)
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 2
    assert "differs from diffusers by" in capsys.readouterr().err


def test_check_names_a_missing_folder(capsys):
    assert main(["check", "no/such/folder", "--device", "cpu"]) == 2
    assert "checkpoint folder no/such/folder does not exist" in capsys.readouterr().err


def test_check_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "_ours", lambda *_: {})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 2
    assert "pip install 'cosmos3-fast[test]'" in capsys.readouterr().err


def test_the_demo_runs_all_modes(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--steps", "1", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "three requests, one tiny checkpoint" in shown
    for name in ("policy", "forward", "inverse"):
        assert f"--- {name}" in shown
        assert read_actions(out / f"{name}_action.json").shape == (16, 10)
        assert len(decoded(out / f"{name}.mp4")[0]) == 17
        Image.open(out / f"{name}_action.png").load()


def test_the_demo_ends_with_the_status_of_what_failed(tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path), "--steps", "0"])
    assert ended.value.code == 2


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cosmos3_fast", "make-tiny", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cosmos3_fast", run_name="__main__")
    assert ended.value.code == 0 and "--seed" in capsys.readouterr().out


def test_an_unknown_flag_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--checkpoint", "x", "--turbo"])
    assert ended.value.code == 2 and "--turbo" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("av", True), ("matplotlib", False)])
def test_missing_writers_are_named_before_any_work(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}: pip install 'cosmos3-fast"):
        require_writers(extra, not extra)
    require_writers(not extra, extra) if extra else require_writers(False, False)


@pytest.mark.parametrize("fps", [24.0, 15.0, 29.97, 7.5])
def test_videos_keep_frames_rate_and_colours(tmp_path, fps):
    pixels = torch.zeros(1, 3, 5, 32, 48)
    pixels[0, 0, :, :, :24], pixels[0, 2, :, :, 24:] = 1, 1
    write_video(tmp_path / "a.mp4", pixels, fps)
    frames, rate = decoded(tmp_path / "a.mp4")
    assert frames.shape == (5, 32, 48, 3) and abs(rate - fps) < 1e-3
    assert (np.abs(frames[:, 8:24, 4:20].astype(int) - [255, 0, 0]) < 24).all()
    assert (np.abs(frames[:, 8:24, 28:44].astype(int) - [0, 0, 255]) < 24).all()


def test_plots_show_every_channel(tmp_path):
    plot_actions(tmp_path / "a.png", torch.randn(1, 16, 29), "a title")
    with Image.open(tmp_path / "a.png") as plot:
        plot.load()
        assert plot.format == "PNG"


def test_results_that_are_not_finite_are_not_written(run, files, monkeypatch):
    """The command ends with the engine's error in one line, and leaves no file."""
    step = Engine.step

    def broken(self, request, **keywords):
        self.model.proj_out.bias[0] = float("nan")
        return step(self, request, **keywords)

    monkeypatch.setattr(Engine, "step", broken)
    flags = "--image", str(files / "observation.png"), "--domain-name", "umi"
    folder, said = run(*flags, status=2)
    assert "not finite, so nothing is returned: action" in said.splitlines()[-1]
    assert not folder.exists()
