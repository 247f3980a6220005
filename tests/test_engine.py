"""The engine end to end on the CPU: the drop-in example, results, repeats, caches, refusals."""

import dataclasses
import logging
import re

import numpy as np
import oracle
import pytest
import torch
from engine_fixtures import (
    checkpoint,
    counted,
    engine_args,
    equal,
    ids,
    noise,
    picture,
    request,
    shared_engine,
)
from PIL import Image

from cosmos3_fast import Cosmos3ActionRequest, DeviceConfig, Engine, RuntimeConfig

NAN = float("nan")


def test_the_seed_example(tmp_path):
    """PhyAI's example, in one piece as the page has it, import lines replaced; tiny, cpu, fp32."""
    from cosmos3_fast import (
        Cosmos3ActionRequest,
        Cosmos3PolicyProcessor,
        Cosmos3PolicyWNArgs,
        DeviceConfig,
        Engine,
        EngineArgs,
        EngineConfig,
        ParallelConfig,
        RuntimeConfig,
        pixel_to_latent_shape,
    )

    checkpoint_dir, observation = str(checkpoint()), tmp_path / "observation.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (96, 160, 3), np.uint8)).save(
        observation
    )
    cfg_size = tp_size = 1
    device, dtype = "cpu", torch.float32
    engine = Engine(
        EngineArgs(
            plugin="cosmos3_policy_wn",
            plugin_args=Cosmos3PolicyWNArgs(
                checkpoint_dir=checkpoint_dir,
                flow_shift=10.0,
                use_karras_sigmas=None,
                decode_video=True,
            ),
            config=EngineConfig(
                device=DeviceConfig(target=device, params_dtype=dtype),
                parallel=ParallelConfig(
                    world_size=cfg_size * tp_size, cfg_size=cfg_size, tp_size=tp_size
                ),
                runtime=RuntimeConfig(use_cuda_graph=False),
            ),
        )
    )
    processor = Cosmos3PolicyProcessor(
        tokenizer_name_or_path=f"{checkpoint_dir}/text_tokenizer",
        height=480,
        width=832,
        num_frames=17,
        mode="policy",
        domain_name="droid_lerobot",
        action_chunk_size=16,
        fps=24.0,
        image_size=256,
        prompt_format="json",
        view_point="ego_view",
        cond_frame_indexes=(0,),
        device=device,
        params_dtype=dtype,
    )
    processed = processor.preprocess({"images": str(observation), "task": "robot picks up the cup"})
    request = Cosmos3ActionRequest(
        text_ids=processed.text_ids.to(device),
        text_mask=processed.text_mask.to(device),
        neg_text_ids=processed.neg_text_ids.to(device),
        neg_text_mask=processed.neg_text_mask.to(device),
        video_shape=pixel_to_latent_shape(*processed.video_shape),
        mode=processed.mode,
        domain_id=processed.domain_id,
        action_chunk=processed.action_chunk,
        raw_action_dim=processed.raw_action_dim,
        cond_video_pixels=processed.pixel_values.to(device=device, dtype=dtype),
        cond_action=(
            processed.cond_action.to(device=device, dtype=dtype)
            if processed.cond_action is not None
            else None
        ),
        cond_frame_indexes=processed.cond_frame_indexes,
        fps=24.0,
        num_inference_steps=4,
        guidance_scale=1.0,
        seed=42,
    )
    result = engine.step(request)
    output = processor.postprocess(result)
    action, pixels = output["action"], output.get("pixels")
    engine.close()
    assert tuple(action.shape) == (1, 16, 10)
    assert tuple(result["video"].shape) == (1, 48, 5, 6, 10)
    assert pixels is not None and tuple(pixels.shape) == (1, 3, 17, 96, 160)
    want = oracle.loop(checkpoint(), with_latents(request), "karras", 10.0)
    assert oracle.error(action, want.action) <= 1e-5
    assert oracle.error(output["video"], want.video) <= 1e-5
    assert oracle.error(pixels, oracle.decode(checkpoint(), want.video)) <= 1e-5


def with_latents(asked):
    """The request with its picture encoded by the oracle and cut to the content."""
    with torch.no_grad():
        latents = oracle.pipeline(checkpoint(), torch.float32)._encode_video(
            asked.cond_video_pixels
        )
    return dataclasses.replace(asked, cond_video_latents=latents.float()[..., :6, :10])


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "no decode"])
def test_keys_shapes_and_dtypes(decode):
    result = shared_engine(decode).step(request())
    shapes = {"action": (1, 4, 10), "video": (1, 48, 2, 5, 6)}
    shapes |= {"pixels": (1, 3, 5, 80, 96)} if decode else {}
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == shapes
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in result.values())
    if decode:
        assert result["pixels"].min() >= 0 and result["pixels"].max() <= 1


def test_results_are_the_callers_own():
    """A later request must not write into what an earlier one returned."""
    engine = shared_engine()
    first = engine.step(request())
    kept = {name: tensor.clone() for name, tensor in first.items()}
    engine.step(request(seed=7))
    assert equal(first, kept)


def test_repeats_are_bit_equal_whatever_came_between():
    engine = shared_engine()
    want = engine.step(request())
    engine.step(request(text=ids(40, seed=8), seed=1, domain_id=2, fps=10.0))
    engine.step(request(mode="inverse_dynamics", guidance_scale=1.0))
    assert equal(engine.step(request()), want)


def test_prompt_cache_on_and_off_are_bit_equal():
    engine = shared_engine()
    asked = request(text=ids(23, seed=9))
    with counted(engine) as calls:
        first = engine.step(asked)
        again = engine.step(asked)
    assert calls.count("encode_prompt") <= 2 and calls.count("velocity") == 4
    engine._kept.prompts.clear()
    engine._kept.runners.clear()
    with counted(engine) as calls:
        cold = engine.step(asked)
    assert calls.count("encode_prompt") == 2
    assert equal(first, again) and equal(first, cold)


def test_caches_keep_to_their_bounds():
    runtime = RuntimeConfig(max_graphs=1, max_prompts=2)
    with Engine(engine_args(runtime=runtime)) as engine:
        first = engine.step(request())
        for count in (2, 3, 4):
            engine.step(request(text=ids(count), action_chunk=8, video_shape=(3, 5, 6)))
        assert (len(engine._kept.prompts), len(engine._kept.runners)) == (2, 1)
        assert equal(engine.step(request()), first)


def test_one_frame_is_phyais_shape():
    one = {"video_shape": (1, 5, 6), "cond_video_latents": noise(1, 48, 1, 5, 6)}
    result = shared_engine().step(request(**one))
    assert tuple(result["action"].shape) == (1, 4, 10)
    assert torch.equal(result["video"], one["cond_video_latents"])
    assert tuple(result["pixels"].shape) == (1, 3, 1, 80, 96)


def test_clean_frames_come_back_as_they_were_given():
    given = noise(1, 48, 2, 5, 6)
    video = shared_engine().step(request(cond_video_latents=given))["video"]
    assert torch.equal(video[:, :, 0], given[:, :, 0])
    assert not torch.equal(video[:, :, 1], given[:, :, 1])


def test_state_rows_are_dropped_and_matter():
    engine, state = shared_engine(), noise(1, 1, 10)
    result = engine.step(request(clean_action=state))
    assert tuple(result["action"].shape) == (1, 4, 10)
    other = engine.step(request(clean_action=state + 1))
    assert not torch.equal(result["action"], other["action"])


def test_forward_dynamics_returns_its_actions():
    given = noise(1, 4, 64)
    given[..., 10:] = 0
    result = shared_engine().step(request(mode="forward_dynamics", cond_action=given))
    assert torch.equal(result["action"], given[..., :10])


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 3.0}, 2),
        ({"guidance_scale": 0.0}, 2),
        ({"guidance_scale": 3.0, "guidance_interval": (0, 1)}, 1),
    ],
    ids=["1", "3", "0", "interval without a step"],
)
def test_branches_that_run(changes, calls):
    """One call serves both branches; the unconditional one is left out when it counts for nothing.

    The prompts of a guided request are both encoded only if a step reads them.
    """
    engine, seen = shared_engine(), []
    velocity = engine.model.velocity
    engine.model.velocity = lambda inputs, out: seen.append(len(out)) or velocity(inputs, out)
    try:
        engine.step(request(**changes))
    finally:
        del engine.model.velocity
    assert seen == [calls, calls]


def test_guidance_1_equals_the_conditional_branch_alone():
    engine = shared_engine()
    unguided = engine.step(request(guidance_scale=1.0))
    without = engine.step(request(guidance_interval=(0, 1)))
    assert all(oracle.error(without[name], unguided[name]) <= 1e-6 for name in unguided)
    guided = engine.step(request())
    assert oracle.error(guided["action"], unguided["action"]) > 1e-2


def test_an_interval_guides_the_steps_inside_alone():
    engine, seen = shared_engine(), []
    velocity = engine.model.velocity
    engine.model.velocity = lambda inputs, out: seen.append(len(out)) or velocity(inputs, out)
    try:  # native, shift 5, 4 steps: timesteps 999 937 833 624
        engine.step(request(num_inference_steps=4, guidance_interval=(624, 999)))
    finally:
        del engine.model.velocity
    assert seen == [1, 2, 2, 1]


def test_on_step_counts_the_steps():
    steps = []
    shared_engine().step(request(num_inference_steps=3), on_step=steps.append)
    assert steps == [0, 1, 2]


def test_times_name_every_stage():
    engine = shared_engine()
    engine.step(request())
    stages = ["prepare", "encode", "prompt", "load", "denoise", "decode"]
    assert list(engine.times) == stages
    assert all(ms >= 0 for ms in engine.times.values()) and engine.times["denoise"] > 0
    assert engine.peak_bytes == 0


def test_what_a_new_shape_prepares_is_logged_with_its_time(caplog):
    pixels = noise(1, 3, 1, 80, 96).clamp(-1, 1)
    asked = request(cond_video_latents=None, cond_video_pixels=pixels)
    with Engine(engine_args()) as engine, caplog.at_level(logging.INFO, "cosmos3_fast"):
        for _ in range(2):
            engine.step(asked)
    said = [line for line in caplog.messages if line.startswith("prepared")]
    assert len(said) == 2, said
    assert re.fullmatch(r"prepared the encoder of \(1, 3, 1, 80, 96\) in \d+\.\d\d s", said[1])
    assert re.fullmatch(r"prepared ShapeKey\(.*\), guided True, in \d+\.\d\d s", said[0])


def test_warmup_leaves_the_result_as_it_is():
    with Engine(engine_args()) as engine:
        engine.warmup(request(seed=5))
        with counted(engine) as calls:
            warm = engine.step(request())
    assert calls == ["velocity", "velocity"]
    assert torch.equal(warm["action"], shared_engine().step(request())["action"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pixels_are_encoded_up_to_the_last_clean_frame(dtype):
    """Frames behind it change nothing; they are not even read."""
    engine = shared_engine()
    pixels = torch.from_numpy(np.random.RandomState(3).randint(0, 256, (1, 3, 5, 80, 96)))
    pixels = pixels.to(torch.uint8)
    given = pixels if dtype is torch.uint8 else pixels / 127.5 - 1
    broken = given.clone()
    broken[:, :, 1:] = 0
    clips = [{"cond_video_latents": None, "cond_video_pixels": clip} for clip in (given, broken)]
    first, second = (engine.step(request(**clip)) for clip in clips)
    assert equal(first, second)
    encoded = engine.vae.encode(pixels[:, :, :1] / 127.5 - 1)
    assert oracle.error(first["video"][:, :, :1], encoded) <= 1e-6


def test_a_larger_latent_is_cut_to_the_request():
    engine, large = shared_engine(), noise(1, 48, 4, 9, 8)
    exact = large[:, :, :1, :5, :6].contiguous()
    assert equal(
        engine.step(request(cond_video_latents=large)),
        engine.step(request(cond_video_latents=exact)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_equal_the_eager_engine_on_a_gpu(dtype):
    """Bit for bit over prompts A, B, A, with pixels, two guidances and an interval."""
    asked = [
        request(**changes)
        for changes in (
            {},
            {"text": ids(40, seed=2), "guidance_interval": (900, 1000)},
            {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)},
            {"guidance_scale": 1.0, "num_inference_steps": 3},
            {},
        )
    ]
    answers = []
    for graphs in (False, True):
        args = engine_args(
            device=DeviceConfig("cuda:0", dtype),
            runtime=RuntimeConfig(use_cuda_graph=graphs),
            decode_video=True,
        )
        with Engine(args) as engine:
            answers.append([engine.step(one) for one in asked])
            assert engine.peak_bytes > 0 and engine.times["denoise"] > 0
    for eager, captured in zip(*answers, strict=True):
        assert torch.equal(eager["action"], captured["action"])
        assert torch.equal(eager["video"], captured["video"])
        assert oracle.error(captured["pixels"].cpu(), eager["pixels"].cpu()) <= 1e-2
    assert torch.equal(answers[1][0]["action"], answers[1][-1]["action"])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_between_a_request_and_its_last_step():
    """Of a prompt and a shape seen before: so the host prepares the loop while the VAE encodes."""

    def picture(seed: int) -> Cosmos3ActionRequest:
        pixels = (noise(1, 3, 1, 80, 96, seed=seed) * 60 + 128).clamp(0, 255).to(torch.uint8)
        changes = {"cond_video_latents": None, "cond_video_pixels": pixels}
        return request(**changes, clean_action=noise(1, 1, 10, seed=seed), seed=seed)

    def issued(step: int) -> None:
        if step + 1 == picture(1).num_inference_steps:
            torch.cuda.set_sync_debug_mode("default")

    with Engine(engine_args(device=DeviceConfig("cuda:0", torch.bfloat16))) as engine:
        want = engine.step(picture(2))
        engine.step(picture(1))
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = engine.step(picture(2), on_step=issued)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert equal(got, want)


@pytest.mark.gpu
def test_a_gpu_in_fp32_agrees_with_the_cpu():
    args = engine_args(device=DeviceConfig("cuda:0", torch.float32), decode_video=True)
    with Engine(args) as engine:
        got = engine.step(request())
    want = shared_engine().step(request())
    for name in want:
        assert oracle.error(got[name].cpu(), want[name]) <= 1e-5, name


@pytest.mark.gpu2
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
def test_an_engine_of_the_second_gpu_leaves_the_current_device(graphs):
    results = []
    for target in ("cuda:0", "cuda:1"):
        args = engine_args(
            device=DeviceConfig(target, torch.float32),
            runtime=RuntimeConfig(use_cuda_graph=graphs),
        )
        with torch.cuda.device(0), Engine(args) as engine:
            found = engine.step(request())
            assert torch.cuda.current_device() == 0
            assert all(str(tensor.device) == target for tensor in found.values())
            assert all(ms >= 0 for ms in engine.times.values())
        results.append({name: tensor.cpu() for name, tensor in found.items()})
    assert equal(*results)
