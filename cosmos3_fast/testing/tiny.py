"""A complete tiny checkpoint: every file a real one has, 14 MB, written in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast.testing.fill import write_sharded
from cosmos3_fast.testing.shapes import (
    MODEL_INDEX,
    NANO_SCHEDULER,
    NANO_TRANSFORMER,
    NANO_VAE,
    transformer_shapes,
    vae_shapes,
)
from cosmos3_fast.testing.tokenizer import make_tokenizer

MADE_BY = {"_made_by": "cosmos3_fast.testing.make_tiny_checkpoint"}  # in model_index.json


def make_tiny_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 8,
    kv_heads: int = 8,
    vae_dims: tuple[int, int] = (8, 16),
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 << 30,
) -> Path:
    """Write a checkpoint in the diffusers layout into `folder` and return it.

    `heads` x 16 channels, `kv_heads` (fewer is grouped-query attention), `vae_dims`: widths of
    encoder and decoder. diffusers' `Cosmos3OmniPipeline.from_pretrained` loads it too. Equal
    arguments give equal files. ValueError for a folder that holds anything but an earlier tiny
    checkpoint, which is written over.
    """
    if heads % kv_heads:
        raise ValueError(f"heads {heads} must be a multiple of kv_heads {kv_heads}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _require_free(folder)
    _write_json(folder / "model_index.json", MODEL_INDEX | MADE_BY)  # first: half of one is known
    make_tokenizer(folder / "text_tokenizer")
    transformer = NANO_TRANSFORMER | {
        "head_dim": 16,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_axes_dim": [4, 2, 2],
        "vocab_size": _vocab_size(folder / "text_tokenizer"),
    }
    vae = NANO_VAE | {"base_dim": vae_dims[0], "decoder_base_dim": vae_dims[1]}
    parts = (("transformer", transformer, transformer_shapes), ("vae", vae, vae_shapes))
    for name, config, shapes in parts:
        files = write_sharded(
            folder / name, shapes(config), seed=seed, dtype=dtype, shard_bytes=shard_bytes
        )
        for file in files:  # safetensors' are their owner's alone
            shutil.copymode(folder / "model_index.json", file)
        _write_json(folder / name / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", NANO_SCHEDULER)
    return folder


def make_nano_folder(folder: str | Path) -> Path:
    """Write everything of a Nano-size checkpoint but its weights into `folder` and return it.

    `Engine(args, weights=fill_random)` runs it; the tokenizer is the tiny one, whose ids Nano's
    vocabulary covers.
    """
    folder = Path(folder)
    make_tokenizer(folder / "text_tokenizer")
    _write_json(folder / "transformer" / "config.json", NANO_TRANSFORMER)
    _write_json(folder / "vae" / "config.json", NANO_VAE)
    _write_json(folder / "scheduler" / "scheduler_config.json", NANO_SCHEDULER)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    return folder


def _require_free(folder: Path) -> None:
    """ValueError unless the folder is empty or its model_index.json is one of ours."""
    index = folder / "model_index.json"
    if not any(folder.iterdir()) or (index.is_file() and _made_here(index)):
        return
    raise ValueError(
        f"{folder} must be empty or hold a tiny checkpoint, which is written over; "
        "it holds other files"
    )


def _made_here(index: Path) -> bool:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        return False  # no JSON: somebody else's
    return isinstance(document, dict) and MADE_BY.items() <= document.items()


def _vocab_size(folder: Path) -> int:
    """One more than the largest token id of a tokenizer.json, rounded up to a multiple of 8."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]
    return -(-(max(ids) + 1) // 8) * 8


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
