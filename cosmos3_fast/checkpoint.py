"""A checkpoint folder as a mapping from names to lazy tensors, safetensors alone.

The files come from others, so everything they say is checked before use: shard names are plain file
names inside the folder, the index and the shards must agree both ways, a name lives in one shard
only, and a header that safetensors refuses (missing, truncated, corrupt) becomes a ValueError that
names the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cosmos3_fast.config import read_json

STEM = "diffusion_pytorch_model"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: `target` receives `tensor[index]`.

    `target`: destination, a view into a parameter of this rank (any device, any strides).
    `shape`: the full shape that the checkpoint must hold.
    `index`: the part this rank reads, one simple slice (start, stop; no step) a dimension from the
    first; () is all.
    """

    target: torch.Tensor
    shape: tuple[int, ...]
    index: tuple[slice, ...] = ()

    def __post_init__(self) -> None:
        wanted = sliced_shape(self.shape, self.index)
        assert tuple(self.target.shape) == wanted, (
            f"slot target has shape {tuple(self.target.shape)}, its index reads {wanted}"
        )


def sliced_shape(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of `tensor[index]`; ValueError unless every slice is simple and inside `shape`."""
    if len(index) > len(shape):
        raise ValueError(f"index {index} has more dimensions than shape {shape}")
    sizes = list(shape)
    for dim, part in enumerate(index):
        start, stop = part.start or 0, shape[dim] if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= shape[dim]:
            raise ValueError(f"{part} does not fit dimension {dim} of shape {shape}")
        sizes[dim] = stop - start
    return tuple(sizes)


@dataclass(frozen=True)
class Shard:
    """One safetensors file. Its handle maps the file; `close` gives the mapped pages back."""

    path: Path
    _handle: list[Any] = field(default_factory=list, repr=False, compare=False)

    def handle(self) -> Any:
        """The open file; ValueError naming it if it is missing, truncated or corrupt."""
        if not self._handle:
            try:
                self._handle.append(safe_open(self.path, framework="pt", device="cpu"))
            except FileNotFoundError as error:
                raise ValueError(f"checkpoint file {self.path} is missing") from error
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"checkpoint file {self.path} is truncated or corrupt: {error}"
                ) from error
        return self._handle[0]

    def close(self) -> None:
        self._handle.clear()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still on disk: its name, full shape, dtype, and the shard that holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Shard

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """`tensor[index]` on the cpu, backed by the mapped file: only its own bytes are ever read.

        The result is a view, not to be written to, with the strides of the full tensor.
        """
        sliced_shape(self.shape, index)
        return self.shard.handle().get_slice(self.name)[index or ...]


class Checkpoint(Mapping[str, LazyTensor]):
    """All tensors of one folder, in the order of the shards: `with`, or `close` at the end."""

    def __init__(self, tensors: Mapping[str, LazyTensor], shards: tuple[Shard, ...]) -> None:
        self._tensors = dict(tensors)
        self.shards = shards

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def open_checkpoint(folder: str | Path, stem: str = STEM) -> Checkpoint:
    """Open the shards that `stem`.safetensors.index.json lists, or the single `stem`.safetensors.

    Reads headers only. ValueError, naming the file, for: no such folder or file, an index that is
    not valid or whose shard names leave the folder, a missing, truncated or corrupt shard, a tensor
    that the index and the shards place differently, a tensor found twice, a dtype that torch does
    not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder {folder} does not exist")
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        weight_map = _read_index(index)
        shards = tuple(Shard(folder / name) for name in sorted(set(weight_map.values())))
        tensors = _collect(shards)
        _check_index(index, weight_map, tensors)
    elif single.is_file():
        shards = (Shard(single),)
        tensors = _collect(shards)
    else:
        raise ValueError(f"{folder} has neither {index.name} nor {single.name}")
    return Checkpoint(tensors, shards)


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index file, every shard name checked to be a plain file name."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to shard names")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or shard != PurePosixPath(shard).name or shard != PureWindowsPath(shard).name:
            raise ValueError(
                f"{path}: the shard of {name!r} must be a plain .safetensors file name,"
                f" got {shard!r}"
            )
    return weight_map


def _collect(shards: tuple[Shard, ...]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        handle = shard.handle()
        for name in handle.offset_keys():
            if name in tensors:
                raise ValueError(
                    f"{name!r} is in two shards: {tensors[name].shard.path} and {shard.path}"
                )
            header = handle.get_slice(name)
            dtype = DTYPES.get(header.get_dtype())
            if dtype is None:
                raise ValueError(f"{shard.path}: {name!r} has dtype {header.get_dtype()}, unknown")
            tensors[name] = LazyTensor(name, tuple(header.get_shape()), dtype, shard)
        shard.close()
    return tensors


def _check_index(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, LazyTensor]
) -> None:
    """The index and the shards must name the same tensors in the same files."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard.path.name != shard:
            raise ValueError(f"{path} places {name!r} in {shard}, which does not hold it")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        held = tensors[unlisted[0]].shard.path
        raise ValueError(f"{held} holds {unlisted[:5]}, which {path.name} does not list")
