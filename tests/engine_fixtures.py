"""One tiny checkpoint, one engine and small requests, shared by the engine's tests.

Functions instead of fixtures, so that every module shares them: the first call makes, later ones
return the same object.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos3_fast import (
    Cosmos3ActionRequest,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    Engine,
    EngineArgs,
    EngineConfig,
    RuntimeConfig,
)
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.testing import make_tiny_checkpoint


@functools.cache
def checkpoint() -> Path:
    """A tiny fp32 checkpoint with grouped-query attention; tests must not write to it."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-")
    atexit.register(folder.cleanup)
    return make_tiny_checkpoint(folder.name, kv_heads=2)


def engine_args(folder: Path | None = None, **plugin: Any) -> EngineArgs:
    """An engine on the CPU in fp32, 5 native steps' shift; `runtime` and `device` pass through."""
    runtime = plugin.pop("runtime", RuntimeConfig())
    device = plugin.pop("device", DeviceConfig("cpu", torch.float32))
    chosen = {"checkpoint_dir": folder or checkpoint(), "schedule": "native"} | plugin
    return EngineArgs(
        plugin_args=Cosmos3PolicyWNArgs(**chosen),
        config=EngineConfig(device=device, runtime=runtime),
    )


@functools.cache
def shared_engine(decode: bool = True) -> Engine:
    engine = Engine(engine_args(decode_video=decode))
    atexit.register(engine.close)
    return engine


def ids(count: int, seed: int = 0) -> torch.Tensor:
    """[1, count] token ids inside the tiny vocabulary."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 300, (1, count)))


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def picture(*shape: int, seed: int = 1) -> torch.Tensor:
    """Pictures in [-1, 1]."""
    return noise(*shape, seed=seed).clamp(-1, 1)


def request(**changes: Any) -> Cosmos3ActionRequest:
    """Policy, chunk 4, 2x5x6 latents, 2 steps, guidance 3; `changes` replace fields.

    `text` and `negative` are [1, n] ids.
    """
    text, negative = changes.pop("text", ids(19)), changes.pop("negative", ids(7, seed=1))
    fields = {
        "text_ids": text,
        "text_mask": torch.ones_like(text),
        "neg_text_ids": negative,
        "neg_text_mask": torch.ones_like(negative),
        "video_shape": (2, 5, 6),
        "mode": "policy",
        "domain_id": 8,
        "action_chunk": 4,
        "raw_action_dim": 10,
        "cond_video_latents": noise(1, 48, 2, 5, 6),
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    }
    return Cosmos3ActionRequest(**fields | changes)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, keys and all."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    """Names of the networks' calls while this lasts."""
    calls: list[str] = []
    names = [(engine.model, "velocity"), (engine.model, "encode_prompt")]
    names += [(engine.vae, "encode"), (engine.vae, "decode")] if engine.vae is not None else []
    for part, name in names:
        setattr(part, name, _counting(getattr(part, name), name, calls))
    try:
        yield calls
    finally:
        for part, name in names:
            delattr(part, name)


def _counting(call: Any, name: str, calls: list[str]) -> Any:
    def run(*args: Any, **keywords: Any) -> Any:
        calls.append(name)
        return call(*args, **keywords)

    return run


def fill(model: Cosmos3Transformer, folder: Path | None = None) -> Cosmos3Transformer:
    """Its slots filled from the tiny checkpoint."""
    from cosmos3_fast.checkpoint import open_checkpoint
    from cosmos3_fast.loader import load

    tensors = open_checkpoint((folder or checkpoint()) / "transformer")
    load(model.slots(), tensors, unused=model.unused)
    return model
