"""Calls of the engine: one at a time, what `close` gives back, which deadline a request gets."""

from __future__ import annotations

import gc
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from engine_fixtures import counted, engine_args, equal, ids, noise, picture, request, shared_engine
from ranks import argument, run_cases
from test_engine_ranks import parallel_args
from torch.multiprocessing.reductions import StorageWeakRef

from cosmos3_fast import DeviceConfig, Engine
from cosmos3_fast.startup import PREPARE_S
from cosmos3_fast.testing import fill_random, make_tiny_checkpoint

AGAIN = "this engine is in another call; it runs one at a time"
TALLER = {"video_shape": (2, 6, 6), "cond_video_latents": noise(1, 48, 2, 6, 6)}  # of one ShapeKey


def outcome(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["step", "warmup", "refuse", "together", "close"])
def test_a_call_while_another_runs_is_refused_at_once(name):
    """From another thread and from the loop itself; the request that runs is not disturbed."""
    engine, said = shared_engine(), []
    want = engine.step(request())
    calls = {
        "step": (engine.step, request(seed=7)),
        "warmup": (engine.warmup, request(seed=7)),
        "refuse": (engine.refuse, ValueError("cannot read a.png")),
        "together": (engine.together, lambda: said.append("ran")),
        "close": (engine.close,),
    }

    def on_step(_: int) -> None:
        call, *args = calls[name]
        other = threading.Thread(target=lambda: said.append(outcome(call, *args)))
        other.start()
        other.join(timeout=60)
        said.append(outcome(call, *args))

    with counted(engine) as networks:
        got = engine.step(request(), on_step=on_step)
    assert said == [AGAIN] * 4  # two steps, two callers each
    assert networks.count("velocity") == 2 and equal(got, want)
    assert equal(engine.step(request()), want)


def test_a_call_that_raised_is_over():
    engine = shared_engine()
    with pytest.raises(ValueError, match="seed"):
        engine.step(request(seed=-1))
    with pytest.raises(ValueError, match=r"cannot read a\.png"):
        engine.refuse(ValueError("cannot read a.png"))
    with pytest.raises(KeyError):
        engine.together(lambda: {}["x"])
    assert engine.together(lambda: 3) == 3
    assert engine.step(request())


def test_close_gives_the_networks_and_the_caches_back():
    """While the name `engine` lives, and without the garbage collector."""
    pixels = {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)}
    engine = Engine(engine_args(decode_video=True))
    result = engine.step(request(**pixels))
    tensors = [*engine.model.parameters(), *engine.model.buffers(), *engine.vae.parameters()]
    for runner in engine._kept.runners._values.values():
        tensors += [runner.sample, runner.inputs.und_k, runner.model_in]
    for und in engine._kept.prompts._values.values():
        tensors += und
    tensors += [static for static, _ in engine._kept.encoders._kept._values.values()]
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
    assert len(held) > 100
    gc.collect()
    gc.disable()
    try:
        del tensors, runner, und
        assert not any(storage.expired() for storage in held)
        engine.close()
        assert [storage.expired() for storage in held] == [True] * len(held)
    finally:
        gc.enable()
    assert all(torch.isfinite(tensor).all() for tensor in result.values())


def test_a_closed_engine_refuses_every_call():
    engine = Engine(engine_args())
    engine.close()
    engine.close()
    for call, *args in (
        (engine.step, request()),
        (engine.warmup, request()),
        (engine.refuse, ValueError("x")),
        (engine.together, lambda: 1),
        (lambda: engine.model,),
    ):
        assert outcome(call, *args) == "this engine must be rebuilt: closed"
    assert engine.vae is None and engine.peak_bytes == 0


@contextmanager
def deadlines(engine: Engine) -> Iterator[list[float | None]]:
    """The deadlines that requests get while this lasts; None is the configured one."""
    found: list[float | None] = []
    watchdog = engine._watchdog
    begin = watchdog.begin

    def record(step: int, deadline: float | None = None) -> None:
        found.append(deadline)
        begin(step, deadline)

    watchdog.begin = record
    try:
        yield found
    finally:
        del watchdog.begin


def test_a_request_that_must_compile_capture_or_search_gets_the_long_deadline():
    """Two shapes of one key: the second decodes a size for which cuDNN has not searched yet."""
    pixels = {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)}
    with Engine(engine_args(decode_video=True)) as engine, deadlines(engine) as found:
        for changes in ({}, {}, TALLER, TALLER, {}, pixels, {"text": ids(30)}):
            engine.step(request(**changes))
        assert len(engine._kept.runners) == 1
        other = threading.Thread(
            target=engine.step, args=(request(),)
        )  # cuDNN's caches are its own
        other.start()
        other.join()
    assert found == [PREPARE_S, None, PREPARE_S, None, None, PREPARE_S, None, PREPARE_S]


def test_without_decoding_the_size_does_not_matter():
    with Engine(engine_args()) as engine, deadlines(engine) as found:
        for changes in ({}, TALLER):
            engine.step(request(**changes))
    assert found == [PREPARE_S, None]


def test_a_decode_that_failed_is_not_remembered():
    with Engine(engine_args(decode_video=True)) as engine, deadlines(engine) as found:
        engine.step(request())
        decode, engine.vae.decode = engine.vae.decode, lambda _: {}["x"]
        with pytest.raises(KeyError):
            engine.step(request(**TALLER))
        engine.vae.decode = decode
        engine.step(request(**TALLER))
    assert found == [PREPARE_S, PREPARE_S, PREPARE_S]


def case_decoders() -> dict[str, Any]:
    """One rank has forgotten a decoded shape: all of them get the long deadline."""
    with Engine(parallel_args(argument("folder"), 1, 2, decode_video=True)) as engine:
        with deadlines(engine) as found:
            for lost in (False, False, True, False):
                if lost and engine.mesh.rank == 1:
                    engine._kept.decoded.shapes.clear()
                engine.step(request())
        return {"found": found}


def test_ranks_get_one_deadline(tmp_path):
    folder = str(make_tiny_checkpoint(tmp_path))
    for got in run_cases(2, [case_decoders], arguments={"folder": folder})["case_decoders"]:
        assert got["found"] == [PREPARE_S, None, PREPARE_S, None]


def case_late() -> dict[str, Any]:
    """A kernel of rank 1 gave up waiting: no rank may return what it then computed."""
    with Engine(parallel_args(argument("folder"), 1, 2)) as engine:
        if engine.mesh.rank == 1:
            engine.model.failure = lambda: "rank 1: rank 0 did not come"
        try:
            engine.step(request())
        except TimeoutError as error:
            return {"said": str(error)}
        return {"said": "nothing"}


def test_a_late_neighbour_is_every_ranks_error(tmp_path):
    folder = str(make_tiny_checkpoint(tmp_path))
    for got in run_cases(2, [case_late], arguments={"folder": folder})["case_late"]:
        assert got["said"] == "rank 1: rank 0 did not come"


def test_the_watchdog_is_told_the_step():
    engine, noted = shared_engine(), []
    engine._watchdog.note = noted.append
    try:
        engine.step(request(num_inference_steps=3), on_step=lambda i: noted.append(f"issued {i}"))
    finally:
        del engine._watchdog.note
    steps = [word for i in range(3) for word in (f"step {i + 1} of 3", f"issued {i}")]
    assert noted == [
        "before its first step",
        *steps,
        "decode",
        "after step 3 of 3, waiting for the device",
    ]


@pytest.mark.parametrize("head_dim", [24, 256])
def test_heads_that_the_kernels_do_not_take_are_refused_on_a_gpu_alone(
    tmp_path, monkeypatch, head_dim
):
    """The torch references take any even head_dim."""
    folder = make_tiny_checkpoint(tmp_path)
    file = folder / "transformer" / "config.json"
    heads = {"head_dim": head_dim, "rope_axes_dim": [head_dim // 2 - 4, 2, 2]}
    file.write_text(json.dumps(json.loads(file.read_text()) | heads))
    with Engine(engine_args(folder), weights=fill_random) as engine:
        assert all(torch.isfinite(tensor).all() for tensor in engine.step(request()).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with pytest.raises(
        ValueError, match=rf"head_dim must be one of \(16, 32, 64, 128\) on a GPU, got {head_dim}"
    ):
        Engine(engine_args(folder, device=DeviceConfig("cuda:0", torch.float32)))


def test_the_sigmas_of_a_new_schedule_are_logged_once(caplog):
    with Engine(engine_args()) as engine, caplog.at_level(logging.INFO, "cosmos3_fast"):
        for steps in (2, 2, 3):
            engine.step(request(num_inference_steps=steps))
    said = [line for line in caplog.messages if line.startswith("native schedule, sigmas ")]
    assert [len(line.split()) for line in said] == [3 + 3, 3 + 4]  # the last sigma is 0
    assert all(line.endswith(" 0") for line in said)


def test_guidance_that_no_step_has_is_told_once(caplog):
    """Sigmas taken for timesteps."""
    asked = request(guidance_interval=(0.2, 0.8))
    with Engine(engine_args()) as engine, caplog.at_level(logging.WARNING, "cosmos3_fast"):
        got = [engine.step(asked) for _ in range(2)]
        plain = engine.step(request(guidance_scale=1.0))
    said = [line for line in caplog.messages if line.startswith("no step is guided")]
    assert len(said) == 1
    want = r"guidance_interval \(0.2, 0.8\) holds none of the timesteps \d+ to \d+"
    assert re.search(want, said[0])
    assert torch.equal(got[0]["action"], plain["action"]) and equal(*got)
