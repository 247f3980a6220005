"""The sampler against diffusers' scheduler and the numbers of the published recipe."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos3_fast import ops, sampler

STEPS = (1, 2, 3, 4, 5, 30)
NAMES = ("karras", "flow", "native")
NANO = {"sigma_min": 0.147, "sigma_max": 200.0}


def diffusers_scheduler(name: str, steps: int, shift: float) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=name == "karras",
        flow_shift=shift,
        **NANO,
    )
    given_sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1] if name == "native" else None
    scheduler.set_timesteps(steps, sigmas=given_sigmas)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0, 2000.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_schedule_is_diffusers_bit_for_bit(name, steps, shift):
    if shift == 2000.0 and name != "karras" and steps > 1:
        with pytest.raises(ValueError, match="too many"):
            sampler.sigmas(name, steps, shift=shift)
        return
    theirs = diffusers_scheduler(name, steps, shift)
    ours = sampler.sigmas(name, steps, shift=shift, **NANO)
    assert ours.timesteps == tuple(theirs.timesteps.tolist())
    assert ours.sigmas.dtype == np.float32
    assert np.array_equal(ours.sigmas, theirs.sigmas.numpy())


@pytest.mark.parametrize(
    ("name", "timesteps", "values"),
    [
        ("native", (999, 937, 833, 624), (0.9998, 0.93727, 0.83306, 0.62469, 0)),
        ("flow", (999, 937, 833, 625), (0.999999, 0.937578, 0.833611, 0.625936, 0)),
        ("karras", (995, 973, 798, 128), (0.995, 0.974, 0.799, 0.128, 0)),
    ],
)
def test_published_recipe_of_four_steps_at_shift_5(name, timesteps, values):
    schedule = sampler.sigmas(name, 4, shift=5.0, **NANO)
    assert schedule.timesteps == timesteps
    assert schedule.steps == 4
    np.testing.assert_allclose(schedule.sigmas, values, atol=1e-3 if name == "karras" else 1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_solver_is_diffusers_in_float64(name, steps, shift):
    theirs = diffusers_scheduler(name, steps, shift)
    theirs.sigmas = theirs.sigmas.double()  # as shipped it works with float32 sigmas
    schedule = sampler.sigmas(name, steps, shift=shift, **NANO)
    coef = torch.from_numpy(sampler.coefficients(schedule.sigmas, guidance=3.0))
    generator = torch.Generator().manual_seed(steps)
    size = 97
    want = torch.randn(size, dtype=torch.float64, generator=generator)
    sample, model_in = want.clone(), torch.empty(size, dtype=torch.float64)
    noisy = torch.ones(size, dtype=torch.uint8)
    last, before, before2 = (torch.full_like(want, torch.nan) for _ in range(3))
    for i, timestep in enumerate(theirs.timesteps):
        velocity = torch.randn(2, size, dtype=torch.float64, generator=generator)
        guided = velocity[1] + 3.0 * (velocity[0] - velocity[1])
        want = theirs.step(guided[None, None], timestep, want[None, None])[0][0, 0]
        ops.unipc_step(
            velocity, sample, last, before, before2, sample.clone(), noisy,
            coef, torch.tensor([i], dtype=torch.int32), model_in,
        )  # fmt: skip
        assert ((sample - want).norm() / want.norm()).item() <= 1e-12
        assert torch.equal(model_in, sample)


def test_last_step_returns_the_prediction_of_the_clean_sample():
    row = sampler.coefficients(sampler.sigmas("flow", 4, shift=5.0).sigmas)[-1]
    assert row[list(map(sampler.COEF.index, ("p_sample", "p_x0", "p_m1")))].tolist() == [0, 1, 0]


def test_weights_of_every_step_sum_to_what_a_constant_velocity_needs():
    """With velocity v everywhere, x(sigma) = x0 + sigma v is met exactly, whatever the order."""
    schedule = sampler.sigmas("native", 7, shift=3.0)
    coef = dict(zip(sampler.COEF, sampler.coefficients(schedule.sigmas).T, strict=True))
    corrector = sum(coef[name] for name in ("c_sample", "c_last", "c_m1", "c_m2", "c_x0"))
    predictor = sum(coef[name] for name in ("p_sample", "p_x0", "p_m1"))
    np.testing.assert_allclose(corrector, 1, rtol=1e-12)
    np.testing.assert_allclose(predictor, 1, rtol=1e-12)
    values = schedule.sigmas.astype(np.float64)
    np.testing.assert_allclose(coef["p_sample"] * values[:-1], values[1:], rtol=1e-12)


def test_guidance_column_is_one_outside_the_interval():
    schedule = sampler.sigmas("native", 4, shift=5.0)
    guided = sampler.guided_steps(schedule.timesteps, (624, 937))
    assert guided == (False, False, True, False)  # both ends are outside
    coef = sampler.coefficients(schedule.sigmas, 3.0, guided=guided)
    assert coef[:, 0].tolist() == [1, 1, 3, 1]
    assert sampler.guided_steps(schedule.timesteps) == (True,) * 4


@pytest.mark.parametrize(
    ("schedule", "karras", "files", "index", "want"),
    [
        ("flow", True, {"use_karras_sigmas": True}, {"use_native_flow_schedule": True}, "flow"),
        (None, True, {}, {"use_native_flow_schedule": True}, "karras"),
        (None, False, {"use_karras_sigmas": True}, {}, "native"),
        (None, None, {"use_karras_sigmas": True}, {"use_native_flow_schedule": True}, "karras"),
        (None, None, {}, {"use_native_flow_schedule": True}, "native"),
        (None, None, {"use_karras_sigmas": False}, None, "flow"),
    ],
)
def test_schedule_is_named_by_argument_then_flag_then_files(schedule, karras, files, index, want):
    assert sampler.resolve_schedule(schedule, karras, files, index) == want


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler.sigmas("linear", 4), "must be one of"),
        (lambda: sampler.resolve_schedule("linear", None, {}), "must be one of"),
        (lambda: sampler.sigmas("flow", 0), "at least 1, got 0"),
        (lambda: sampler.sigmas("native", 300, shift=10.0), "300 steps are too many"),
        (lambda: sampler.sigmas("karras", 2000, **NANO), "too many"),
        (lambda: sampler.sigmas("karras", 4), "sigma_min"),
        (lambda: sampler.sigmas("karras", 4, sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: sampler.sigmas("karras", 1, sigma_min=0.0, sigma_max=2.0), "0 < sigma_min <"),
        (lambda: sampler.sigmas("karras", 1, sigma_min=2.0, sigma_max=2.0), "0 < sigma_min <"),
        (lambda: sampler.sigmas("karras", 3, sigma_min=1e-46, sigma_max=2.0), "must differ"),
        (lambda: sampler.sigmas("flow", 4, shift=float("inf")), "positive and finite"),
        (lambda: sampler.sigmas("flow", 4, shift=0.0), "shift"),
        (lambda: sampler.sigmas("flow", 3, shift=1e-17), "shift of 1e-17 is too small"),
        (lambda: sampler.sigmas("flow", 4, shift=float("nan")), "shift"),
    ],
)
def test_schedules_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 400),
    shift=st.floats(0.1, 50),
    low=st.floats(1e-3, 1.0),
    high=st.floats(2.0, 500.0),
)
def test_every_accepted_schedule_falls_and_has_finite_coefficients(name, steps, shift, low, high):
    try:
        schedule = sampler.sigmas(name, steps, shift=shift, sigma_min=low, sigma_max=high)
    except ValueError as error:
        assert "too many" in str(error)
        return
    assert schedule.sigmas[-1] == 0 and 0 < schedule.sigmas[0] < 1
    assert (np.diff(schedule.sigmas) < 0).all()
    assert len(schedule.timesteps) == steps and 0 <= schedule.timesteps[0] < 1000
    assert list(schedule.timesteps) == sorted(schedule.timesteps, reverse=True)
    assert np.isfinite(sampler.coefficients(schedule.sigmas)).all()


def test_noise_is_numpys_legacy_stream_whatever_the_shape():
    video = sampler.noise(42, (1, 3, 5, 7))
    assert video.dtype == np.float32 and video.shape == (1, 3, 5, 7)
    want = [0.4967141530112327, -0.13826430117118466, 0.6476885381006925]
    assert video.reshape(-1)[:3].tolist() == np.array(want, np.float32).tolist()
    assert np.array_equal(sampler.noise(42, (105,)), video.reshape(-1))
    assert not np.array_equal(sampler.noise(43, (105,)), video.reshape(-1))
