"""The caller's modes of torch change no bit: not of a request, nor of those that come after it."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from engine_fixtures import checkpoint, engine_args, equal, picture, request
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos3_fast import Cosmos3ActionRequest, Cosmos3PolicyProcessor, DeviceConfig, Engine
from cosmos3_fast.modes import own_modes


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def precision(how: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == how, "it was not put back"
        torch.set_float32_matmul_precision(before)


@contextmanager
def setting(read: Callable[[], object], write: Callable[[object], object], value: object):
    """One of the process's settings; the engine must leave it as it was found."""
    before = read()
    write(value)
    held = read()
    assert held != before, "the caller's value is torch's default"
    try:
        yield
    finally:
        assert read() == held, "it was not put back"
        write(before)


def product(name: str, value: bool) -> AbstractContextManager:
    owner = torch.backends.cuda.matmul
    return setting(lambda: getattr(owner, name), lambda x: setattr(owner, name, x), value)


# By name, of the type of a device.
MODES: dict[str, Callable[[str], AbstractContextManager]] = {
    "inference": lambda _: torch.inference_mode(),
    "gradients": lambda _: torch.enable_grad(),
    "autocast": lambda kind: torch.autocast(kind, torch.bfloat16),
    "float64": lambda _: default_dtype(torch.float64),
    "bfloat16": lambda _: default_dtype(torch.bfloat16),
    "meta": lambda _: torch.device("meta"),
    "medium": lambda _: precision("medium"),
    "one kind of attention": lambda _: sdpa_kernel(SDPBackend.MATH),
    "no kind that serves": lambda _: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "whole reductions": lambda _: product("allow_bf16_reduced_precision_reduction", False),
    "fp16 sums": lambda _: product("allow_fp16_accumulation", True),
    "deterministic": lambda _: setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2
    ),
}
GPU = pytest.param("cuda:0", marks=pytest.mark.gpu)
PIXELS = {"cond_video_latents": None, "cond_video_pixels": picture(1, 3, 1, 80, 96)}


def make(device: str) -> Engine:
    return Engine(engine_args(decode_video=True, device=DeviceConfig(device, torch.float32)))


def asked() -> list[Cosmos3ActionRequest]:
    return [request(**PIXELS), request(**PIXELS, seed=3), request(text=torch.arange(1, 9)[None])]


@functools.cache
def wanted(device: str) -> list[dict[str, torch.Tensor]]:
    """The answers of an engine in torch's own modes."""
    with make(device) as engine:
        return [engine.step(one) for one in asked()]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", MODES)
def test_an_engine_answers_alike_inside_and_after(name, device):
    """Made, warmed and asked inside; asked again outside, for what it has kept and for more."""
    requests, want = asked(), wanted(device)
    with MODES[name](torch.device(device).type):
        engine = make(device)
        got = [engine.step(one) for one in requests[:2]]
    with engine:
        got += [engine.step(one) for one in requests[1:]]
    for answer, expected in zip(got, want[:2] + want[1:], strict=True):
        assert equal(answer, expected)
        assert {x.dtype for x in answer.values()} == {torch.float32}
        assert not any(x.requires_grad or x.is_inference() for x in answer.values())


@pytest.mark.parametrize("name", MODES)
def test_a_processor_prepares_alike(name):
    picture = np.random.RandomState(0).randint(0, 256, (48, 80, 3)).astype(np.uint8)
    actions = np.random.RandomState(1).standard_normal((3, 10)).astype(np.float32)
    observation = {"images": picture, "task": "Pick up", "cond_action": actions}

    def prepare() -> dict[str, object]:
        processor = Cosmos3PolicyProcessor(
            tokenizer_name_or_path=checkpoint() / "text_tokenizer",
            image_size=256,
            mode="forward_dynamics",
            domain_name="umi",
            action_chunk_size=4,
            params_dtype=torch.float32,
        )
        return vars(processor.preprocess(observation))

    want = prepare()
    with MODES[name]("cpu"):
        got = prepare()
    for field, value in want.items():
        same = torch.equal(got[field], value) if torch.is_tensor(value) else got[field] == value
        assert same, field
        assert not torch.is_tensor(value) or got[field].dtype == value.dtype, field


KINDS = ("flash", "mem_efficient", "math", "cudnn")
# Settings that the engine needs otherwise: only a GPU's results would show some of them.
OTHERWISE = {
    f"no {kind} attention": lambda kind=kind: setting(
        getattr(torch.backends.cuda, f"{kind}_sdp_enabled"),
        getattr(torch.backends.cuda, f"enable_{kind}_sdp"),
        False,
    )
    for kind in KINDS
} | {
    name: lambda name=name, value=value: product(name, value)
    for name, value in (
        ("allow_fp16_accumulation", True),
        ("allow_fp16_reduced_precision_reduction", False),
        ("allow_bf16_reduced_precision_reduction", False),
    )
}


def settings() -> dict[str, bool]:
    cuda = torch.backends.cuda
    kinds = {f"no {kind} attention": not getattr(cuda, f"{kind}_sdp_enabled")() for kind in KINDS}
    return kinds | {name: getattr(cuda.matmul, name) for name in OTHERWISE if name not in kinds}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_setting_is_torchs_default_inside(name):
    """And the caller's again afterwards, as `setting` demands."""
    default = settings()
    with OTHERWISE[name]():
        assert {other for other, value in settings().items() if value != default[other]} == {name}
        with own_modes(torch.device("cpu")):
            assert settings() == default


def test_precision_is_put_back_after_an_error():
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.conv
    with precision("medium"):
        before = [one.fp32_precision for one in products]
        with pytest.raises(KeyError), own_modes(torch.device("cpu")):
            assert [one.fp32_precision for one in products] == ["ieee", "ieee"]
            raise KeyError
        assert [one.fp32_precision for one in products] == before


def test_precision_is_put_back_by_the_last_of_calls_that_overlap():
    cpu, setting = torch.device("cpu"), torch.backends.cuda.matmul
    with precision("high"):
        first, second = own_modes(cpu), own_modes(cpu)
        first.__enter__()
        thread = threading.Thread(target=second.__enter__)
        thread.start()
        thread.join()
        first.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        thread = threading.Thread(target=second.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert setting.fp32_precision == "tf32"


def test_the_newer_setting_of_precision_does_not_matter_either():
    """In a process of its own: it stays."""
    code = """
import torch
from cosmos3_fast.modes import own_modes
torch.backends.fp32_precision = "tf32"
b = torch.backends
def now():
    return {x.fp32_precision for x in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)}
assert now() == {"tf32"}, now()
with own_modes(torch.device("cpu")):
    assert now() == {"ieee"}, now()
assert now() == {"tf32"}, now()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
