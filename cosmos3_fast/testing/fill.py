"""Random weights of any size from a seed: straight into slots, or into a sharded checkpoint.

Each tensor's values depend on (key, seed, full shape, device type) alone, never on the order or on
the part a rank reads, so that every rank of every mesh holds a slice of the same model. Scales keep
activations of order one: matrices and convolutions 1/sqrt(fan in), norms around 1, biases small,
embeddings 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cosmos3_fast.checkpoint import STEM, Slot


def random_tensor(
    key: str, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The full float32 tensor of this key; equal on every cpu, and on all GPUs of one kind."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    mean, std = _moments(key, shape)
    return torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)


def _moments(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the values of a tensor, by its name and shape."""
    parts = key.split(".")
    if parts[-1] == "gamma" or "norm" in (parts[-2] if len(parts) > 1 else ""):
        return 1.0, 0.1
    if "bias" in parts or key == "action_modality_embed":
        return 0.0, 0.1
    if parts[0] == "embed_tokens":
        return 0.0, 1.0
    if parts[0].startswith("action_proj_"):
        # [domains, in * out]: the geometric mean of the two sizes stands for the fan in
        return 0.0, shape[1] ** -0.25
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


@torch.no_grad()
def fill_random(slots: Mapping[str, Slot], seed: int = 0) -> None:
    """Fill every slot with its part of the seeded tensor of its key, made on the slot's device."""
    for key, slot in slots.items():
        full = random_tensor(key, slot.shape, seed, slot.target.device)
        slot.target.copy_(full[slot.index or ...])


def write_sharded(
    folder: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 << 30,
    device: torch.device | str = "cpu",
    stem: str = STEM,
) -> list[Path]:
    """Write seeded tensors of these names and shapes as a checkpoint; its files, shards first.

    One `stem`.safetensors if all fits in `shard_bytes`, else numbered shards and an index, as
    diffusers writes them. Tensors are generated on `device`, one shard in host memory at a time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and plan[-1]:
            plan.append([])
            room = shard_bytes
        plan[-1].append(name)
        room -= size
    width = len(plan)
    files = [
        folder
        / (f"{stem}-{i:05}-of-{width:05}.safetensors" if width > 1 else f"{stem}.safetensors")
        for i in range(1, width + 1)
    ]
    for file, names in zip(files, plan, strict=True):
        shard = {n: random_tensor(n, shapes[n], seed, device).to(dtype).cpu() for n in names}
        save_file(shard, file, metadata={"format": "pt"})
    if width > 1:
        weight_map = {n: f.name for f, names in zip(files, plan, strict=True) for n in names}
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        )
        files.append(index)
    return files
