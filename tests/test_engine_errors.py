"""An engine after refusals and failures, results that are not finite, and its end."""

import multiprocessing
import os

import pytest
import torch
from engine_fixtures import (
    counted,
    engine_args,
    equal,
    picture,
    request,
    shared_engine,
)

from cosmos3_fast import DeviceConfig, Engine, agreement, denoise

NAN = float("nan")
PIXELS = {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)}


def test_a_refused_request_leaves_the_engine_usable():
    engine = shared_engine()
    want = engine.step(request())
    with counted(engine) as calls, pytest.raises(ValueError, match="num_inference_steps"):
        engine.step(request(num_inference_steps=0))
    assert not calls
    assert equal(engine.step(request()), want)


@pytest.mark.parametrize("changes", [{}, PIXELS], ids=["to decode", "to encode"])
def test_a_picture_too_large_for_the_vae_is_refused_before_any_compute(monkeypatch, changes):
    engine = shared_engine()
    want = engine.step(request(**changes))
    with monkeypatch.context() as patched:
        patched.setattr("cosmos3_fast.vae.model.MAX_ELEMENTS", 1000)
        with counted(engine) as calls, pytest.raises(ValueError, match="too many for one frame"):
            engine.step(request(**changes))
    assert not calls
    assert equal(engine.step(request(**changes)), want)


def test_an_error_in_the_middle_leaves_the_engine_usable():
    engine = shared_engine()
    want = engine.step(request())

    def stop(step):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        engine.step(request(seed=1), on_step=stop)
    assert equal(engine.step(request()), want)


def test_refuse_raises_what_it_is_given():
    engine = shared_engine()
    with pytest.raises(ValueError, match="unreadable"):
        engine.refuse(ValueError("unreadable"))
    engine.step(request())


@pytest.mark.parametrize("call", ["step", "refuse", "together"])
def test_a_rank_that_did_not_meet_the_others_must_be_rebuilt(monkeypatch, call):
    """Whatever it was asked for: a later request would meet the others' one before."""
    engine = shared_engine()
    arguments = {"step": request(), "refuse": ValueError("unreadable"), "together": lambda: None}

    def late(*_, **__):
        raise TimeoutError("waited for rank 1")

    monkeypatch.setattr(engine.mesh, "world_size", 2)
    monkeypatch.setattr(engine, "_failed", "")
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "agree", late)
        with pytest.raises(TimeoutError, match="waited for rank 1"):
            getattr(engine, call)(arguments[call])
    with pytest.raises(RuntimeError, match="must be rebuilt: TimeoutError: waited for rank 1"):
        engine.step(request())


def test_a_forked_process_is_told_to_build_its_own_engine():
    """What the engine's threads would do there nobody does."""
    engine = shared_engine()
    engine.step(request())
    receive, send = multiprocessing.Pipe(duplex=False)

    def child():
        try:
            engine.step(request())
        except RuntimeError as error:
            send.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receive.poll(30), "no answer from the child"
    assert receive.recv() == f"this engine is process {os.getpid()}'s: build one after the fork"
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_result_that_is_not_finite_is_not_returned(value):
    with Engine(engine_args()) as engine:
        want = engine.step(request())
        weight = engine.model.proj_out.bias
        before = weight[0].clone()
        weight[0] = value
        with pytest.raises(FloatingPointError, match="nothing is returned: video, state"):
            engine.step(request(num_inference_steps=1))
        weight[0] = before
        assert equal(engine.step(request()), want)


def test_a_nan_that_the_clamp_of_the_pixels_would_hide_is_found():
    with Engine(engine_args(decode_video=True)) as engine:
        with torch.no_grad():
            next(engine.vae.decoder.parameters()).fill_(NAN)
        with pytest.raises(FloatingPointError, match="nothing is returned: pixels"):
            engine.step(request())


def test_an_overflow_in_float16_is_found():
    device = DeviceConfig("cpu", torch.float16)
    with Engine(engine_args(device=device)) as engine:
        engine.model.proj_out.weight.mul_(1e5)
        assert torch.isfinite(engine.model.proj_out.weight).all()
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.step(request())


def test_require_finite_names_what_is_not():
    good, bad = torch.zeros(3), torch.tensor([0.0, -float("inf")])
    denoise.require_finite(denoise.finite({"a": good}))
    with pytest.raises(FloatingPointError, match="nothing is returned: b, c"):
        denoise.require_finite(denoise.finite({"a": good, "b": bad, "c": bad}))


def test_after_close_requests_are_refused():
    engine = Engine(engine_args())
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="must be rebuilt: closed"):
        engine.step(request())


def test_with_closes_also_after_an_error():
    with pytest.raises(KeyError), Engine(engine_args()) as engine:
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        engine.step(request())


def test_a_checkpoint_that_cannot_be_read_leaves_nothing_open(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint folder .* does not exist"):
        Engine(engine_args(tmp_path / "gone"))
    with pytest.raises(ValueError, match="checkpoint_dir is not set"):
        Engine(engine_args(checkpoint_dir=None))
