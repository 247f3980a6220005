"""How an engine comes to be: schedules, sources of weights, devices; and its small parts."""

import logging
import time

import pytest
import torch
from engine_fixtures import (
    checkpoint,
    engine_args,
    picture,
    request,
    shared_engine,
)

import cosmos3_fast
from cosmos3_fast import DeviceConfig, Engine, denoise, startup
from cosmos3_fast.cache import BoundedCache
from cosmos3_fast.config import (
    CheckpointConfig,
    Cosmos3PolicyWNArgs,
    EngineArgs,
    EngineConfig,
    RuntimeConfig,
)
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.stages import Stages
from cosmos3_fast.testing import fill_random, make_tiny_checkpoint

NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "name", "last"),
    [
        ({"schedule": None, "flow_shift": None}, "karras", 0.128),
        ({"schedule": "native", "flow_shift": 5.0}, "native", 0.62469),
        ({"schedule": "flow", "flow_shift": 5.0}, "flow", 0.625936),
    ],
    ids=["the files", "native", "flow"],
)
def test_from_pretrained_chooses_the_schedule(arguments, name, last):
    with Engine.from_pretrained(checkpoint(), device="cpu", **arguments) as engine:
        plugin = engine.args.plugin_args
        schedule = denoise.schedule_of(plugin, engine.checkpoint.scheduler, 4)
        assert (engine.model.dtype, engine.mesh.world_size) == (torch.float32, 1)
    assert schedule.name == name and abs(float(schedule.sigmas[3]) - last) < 1e-3


@pytest.mark.parametrize(("seconds", "decode", "patience"), [(5, True, 600), (1000, False, 1000)])
def test_the_networks_get_what_the_configuration_says(seconds, decode, patience):
    """Kernels wait for the other ranks as long as a request may take that must compile first."""
    runtime = RuntimeConfig(step_deadline_s=seconds, decode_max_bytes=12345)
    args, found = (
        engine_args(runtime=runtime, decode_video=decode),
        CheckpointConfig.read(checkpoint()),
    )
    model, vae, _ = startup.build(args, found, Mesh.single("cpu"), lambda slots: None, False)
    assert model.sums.deadline == vae._edges.deadline == patience
    assert vae.max_bytes == 12345 and (vae.decoder is not None) == decode


def test_ranks_agree_on_their_dtype_and_not_on_the_folder(tmp_path):
    found = CheckpointConfig.read(checkpoint())

    def facts(folder, dtype):
        plugin = Cosmos3PolicyWNArgs(checkpoint_dir=folder)
        config = EngineConfig(device=DeviceConfig("cpu", dtype))
        return startup.facts(EngineArgs(plugin_args=plugin, config=config), found, False)

    one, other = facts("a", torch.float32), facts("b", torch.bfloat16)
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"dtype"}


def test_from_pretrained_downloads_what_is_no_folder(monkeypatch):
    asked = []

    def snapshot_download(name, revision):
        asked.append((name, revision))
        return str(checkpoint())

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with Engine.from_pretrained("nvidia/none", revision="main", device="cpu") as engine:
        assert engine.checkpoint.folder == checkpoint()
    assert asked == [("nvidia/none", "main")]


def test_the_log_of_the_start_says_what_runs_where(caplog):
    with caplog.at_level(logging.INFO), Engine(engine_args(), progress=True) as engine:
        report = engine.load_reports["transformer"]
    text = caplog.text
    assert "cpu torch.float32, mesh cfg 1 x tp 1" in text and "graphs off" in text
    assert "attention torch reference" in text and "image_to_tensor _C" in text
    assert set(report.skipped) == {"lm_head.weight", "norm.weight"}
    assert "2 not loaded: lm_head.weight, norm.weight" in str(report)


def test_random_weights_need_no_tensor_files(tmp_path):
    folder = make_tiny_checkpoint(tmp_path, kv_heads=2)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with Engine(engine_args(folder), weights=fill_random) as engine:
        result = engine.step(request())
        assert not engine.load_reports
    assert torch.equal(result["action"], shared_engine().step(request())["action"])


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_a_name_that_the_hub_does_not_give_is_said(monkeypatch, error):
    def snapshot_download(name, revision):
        raise error("no such thing\nand more")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    want = r"^checkpoint folder results/tinyy does not exist; the hub: no such thing$"
    with pytest.raises(ValueError, match=want):
        Engine.from_pretrained("results/tinyy", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "params_dtype must be torch.bfloat16, .* got 'bfloat16'"),
        ({"device": 0}, "device target must be cpu, cuda or cuda:N, got '0'"),
        ({"revision": "main"}, "is a folder; revision 'main' is for names of the hub"),
    ],
    ids=["dtype", "device", "revision"],
)
def test_from_pretrained_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(checkpoint(), **{"device": "cpu"} | arguments)


@pytest.mark.parametrize("name", ["", None, 3], ids=str)
def test_what_is_no_checkpoint_is_refused(name):
    with pytest.raises(ValueError, match="a checkpoint is a folder or a name of the hub, got "):
        Engine.from_pretrained(name)


def test_a_device_may_be_torch_s():
    with Engine.from_pretrained(checkpoint(), device=torch.device("cpu")) as engine:
        assert engine.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./gone", "../gone", "a/b/c", "~/x", "tinyy"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=r"checkpoint folder .* does not exist"):
        Engine.from_pretrained(name, device="cpu")


def test_without_a_vae_latents_still_run(tmp_path):
    folder = make_tiny_checkpoint(tmp_path, kv_heads=2)
    for file in (folder / "vae").iterdir():
        file.unlink()
    with Engine(engine_args(folder)) as engine:
        result = engine.step(request())
        pixels = {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)}
        with pytest.raises(ValueError, match="need the checkpoint's vae/"):
            engine.step(request(**pixels))
    assert torch.equal(result["action"], shared_engine().step(request())["action"])


def test_another_gpu_than_there_is_is_refused(monkeypatch):
    args = engine_args(device=DeviceConfig("cuda:2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda:2 was asked for, but no CUDA GPU is available"):
        Engine(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:2 was asked for; there are 2 GPUs"):
        Engine(args)


def test_a_bounded_cache_drops_the_least_recently_used():
    dropped = []
    cache = BoundedCache(2, dropped.append)
    for key in "abac":
        assert cache.get(key, lambda key=key: f"value {key}") == f"value {key}"
    assert dropped == ["value b"] and "a" in cache and "b" not in cache and len(cache) == 2
    cache.forget("nothing")
    cache.clear()
    assert dropped == ["value b", "value a", "value c"] and len(cache) == 0


def test_a_value_that_cannot_be_made_is_not_kept():
    cache = BoundedCache(1)
    with pytest.raises(KeyError):
        cache.get("a", lambda: {}["x"])
    assert "a" not in cache and cache.get("a", lambda: 1) == 1


def test_stages_of_one_name_add_up(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stages = Stages(torch.device("cpu"))
    for name in ("a", "b", "a"):
        stages.mark(name)
    assert list(stages.milliseconds().items()) == [("a", 5000.0), ("b", 2000.0)]


def test_what_the_package_exports_is_there():
    assert all(hasattr(cosmos3_fast, name) for name in cosmos3_fast.__all__)
