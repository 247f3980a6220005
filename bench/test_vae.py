"""The VAE: encode of a policy request, decode of D and E; beside them diffusers' in the same run.

Correctness first, in bf16 on a GPU: on a small clip the error against float32 on the same weights
is at most twice that of the torch reference's path; with diffusers importable (extra `test`) the
full-size result is compared with its AutoencoderKLWan's as well, whose time, eager with
cudnn.benchmark on, gives the ratio. Without a GPU a tiny VAE keeps the suite alive.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
from typing import Any

import pytest
import torch

from cosmos3_fast import ops
from cosmos3_fast.config import VAEConfig
from cosmos3_fast.graph import Captured
from cosmos3_fast.testing import fill_random, random_tensor
from cosmos3_fast.testing.measure import timed
from cosmos3_fast.testing.requests import WORKLOADS
from cosmos3_fast.vae import WanVAE

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SMALL = (3, 9, 7) if GPU else (2, 3, 5)  # latent frames, height, width of the float32 check
FLOOR = 1e-5  # float32 beside float32
KINDS = ("D", "E") if GPU else ("tiny",)
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


@pytest.fixture(scope="module")
def config(folder) -> VAEConfig:
    return VAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text()))


@pytest.fixture(scope="module")
def vae(config) -> WanVAE:
    made = WanVAE(config, device=DEVICE, dtype=DTYPE)
    fill_random(made.slots())
    return made


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    """diffusers' VAE with the same weights, or None where diffusers is not installed."""
    if not HAS_DIFFUSERS:
        yield None
        return
    from diffusers import AutoencoderKLWan

    config = json.loads((folder / "vae" / "config.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(config)
    model = model.to(DTYPE).to_empty(device=DEVICE).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), 0, DEVICE))
    yield model


def pixels(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(frames)
    x = torch.rand(1, 3, frames, height, width, generator=generator, device=DEVICE)
    return (2 * x - 1).to(DTYPE)


def latents(config: VAEConfig, *shape: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(shape[0])
    return torch.randn(1, config.z_dim, *shape, generator=generator, device=DEVICE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 of the deviation from the truth's mean."""
    want = want.double()
    return float((got.double() - want).norm() / (want - want.mean()).norm())


@pytest.fixture(scope="module")
def gate(config, vae) -> dict[str, tuple[float, float]]:
    """Errors of encode and decode against float32 on the same weights, ours within its bound, and
    the reference's.
    """
    exact = WanVAE(config, device=DEVICE, dtype=torch.float32)
    source = vae.slots()
    for key, slot in exact.slots().items():
        slot.target.copy_(source[key].target)
    frames, height, width = SMALL
    clip = pixels(4 * frames - 3, 16 * height, 16 * width)
    given = {"encode": clip, "encode_one": clip[:, :, :1], "decode": latents(config, *SMALL)}
    found = {}
    for name, x in given.items():
        method = name.split("_")[0]
        got = getattr(vae, method)(x)
        with ops.reference():
            eager, truth = getattr(vae, method)(x), getattr(exact, method)(x)
        found[name] = error(got, truth), error(eager, truth)
        bound = max(2 * found[name][1], FLOOR)
        assert found[name][0] <= bound, f"{name}: error {found[name][0]:.2e} is over {bound:.2e}"
    return found


def compare(ours: torch.Tensor, theirs: torch.Tensor, errors: tuple[float, float]) -> float:
    """How far two results of one dtype are apart: at most twice what both err on the small clip."""
    difference = error(ours, theirs)
    assert difference <= max(2 * sum(errors), FLOOR), (difference, errors)
    return difference


def moments(config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = config.latents_mean, config.latents_std
    return tuple(torch.tensor(m, device=DEVICE).view(1, -1, 1, 1, 1) for m in (mean, std))


@torch.no_grad()
def their_encode(model: Any, config: VAEConfig, x: torch.Tensor) -> torch.Tensor:
    mean, std = moments(config)
    return (model.encode(x).latent_dist.mean.float() - mean) / std


@torch.no_grad()
def their_decode(model: Any, config: VAEConfig, x: torch.Tensor) -> torch.Tensor:
    mean, std = moments(config)
    return model.decode((x * std + mean).to(DTYPE)).sample.float() * 0.5 + 0.5


def their_ms(run: Any) -> float:
    """Median of three calls, cuDNN's search on and done before."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        run()
        return statistics.median(timed(run, DEVICE) for _ in range(3))


def latent_shape(kind: str) -> tuple[int, int, int]:
    return WORKLOADS[kind].latent if GPU else SMALL


def whole_clip(kind: str) -> torch.Tensor:
    """What diffusers' pipeline encodes for the request: its canvas, every frame."""
    height, width = WORKLOADS[kind].canvas if GPU else (16 * side for side in SMALL[1:])
    return pixels(4 * latent_shape(kind)[0] - 3, height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_policy(benchmark, config, vae, theirs, gate, kind):
    clip = whole_clip(kind)
    static = clip[:, :, :1].contiguous(memory_format=torch.channels_last_3d)
    encode = Captured(lambda: vae.encode(static), DEVICE, True)
    info: dict[str, float] = {"error": gate["encode_one"][0], "ms": 0.0}
    if theirs is not None:
        ours = encode().clone()
        difference = compare(ours, their_encode(theirs, config, static), gate["encode_one"])
        one = their_ms(functools.partial(their_encode, theirs, config, static))
        whole = their_ms(functools.partial(their_encode, theirs, config, clip))
        info |= {"diffusers_ms": whole, "diffusers_one_frame_ms": one, "difference": difference}
    run = functools.partial(timed, encode, DEVICE)
    finish(benchmark, run, info)
    encode.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_decode(benchmark, config, vae, theirs, gate, kind):
    x = latents(config, *latent_shape(kind))
    info: dict[str, float] = {"error": gate["decode"][0], "ms": 0.0}
    ours = vae.decode(x)
    if theirs is not None:
        difference = compare(ours, their_decode(theirs, config, x).clamp(0, 1), gate["decode"])
        info |= {
            "diffusers_ms": their_ms(functools.partial(their_decode, theirs, config, x)),
            "difference": difference,
        }
    del ours
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        vae.decode(x)
        info["activations_GiB"] = (torch.cuda.max_memory_allocated() - base) / 2**30
    finish(benchmark, functools.partial(timed, functools.partial(vae.decode, x), DEVICE), info)


def test_encode_clip(benchmark, config, vae, gate):
    """All frames of the example's clip, as inverse dynamics needs them."""
    clip = whole_clip(KINDS[-1])
    info = {"error": gate["encode"][0], "ms": 0.0}
    finish(benchmark, functools.partial(timed, functools.partial(vae.encode, clip), DEVICE), info)


def finish(benchmark, run: Any, info: dict[str, float]) -> None:
    """Benchmark a call that returns its own milliseconds; extra_info gets their median."""
    ms: list[float] = []
    run()
    benchmark.pedantic(lambda: ms.append(run()), rounds=10 if GPU else 2)
    info["ms"] = statistics.median(ms)
    if "diffusers_ms" in info:
        info["diffusers_over_ours"] = info["diffusers_ms"] / info["ms"]
    benchmark.extra_info.update({k: float(f"{v:.4g}") for k, v in info.items()})
    print({k: float(f"{v:.4g}") for k, v in info.items()})
