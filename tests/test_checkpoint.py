"""checkpoint: round trips, slices that read only their bytes, and every bad folder refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos3_fast.checkpoint import DTYPES, STEM, Slot, open_checkpoint, sliced_shape
from cosmos3_fast.testing.fill import random_tensor, write_sharded

SHAPES = {"a.weight": (7, 5), "b.weight": (1, 63), "c.bias": (9,), "d.weight": (4, 3, 2)}
INDEX = f"{STEM}.safetensors.index.json"
SINGLE = f"{STEM}.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Four shards and an index, float32."""
    write_sharded(tmp_path, SHAPES, dtype=torch.float32, shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 20], ids=["one-each", "mixed", "single-file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, shard_bytes, dtype):
    write_sharded(tmp_path, SHAPES, seed=3, dtype=dtype, shard_bytes=shard_bytes)
    with open_checkpoint(tmp_path) as tensors:
        assert list(tensors) and set(tensors) == set(SHAPES) and len(tensors) == 4
        for name, shape in SHAPES.items():
            lazy = tensors[name]
            assert (lazy.name, lazy.shape, lazy.dtype) == (name, shape, dtype)
            assert lazy.nbytes == torch.Size(shape).numel() * dtype.itemsize
            assert torch.equal(lazy.read(), random_tensor(name, shape, 3).to(dtype))


def test_stem_and_scalars_and_empty_tensors(tmp_path):
    saved = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "bool": torch.tensor([True])}
    save_file(saved, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path, "model")
    assert all(torch.equal(tensors[name].read(), value) for name, value in saved.items())


def test_order_is_that_of_the_bytes(tmp_path):
    write_sharded(tmp_path, {f"t{i}.weight": (1000 - i, 2) for i in range(30)}, shard_bytes=20000)
    seen = [lazy.shard.path.name for lazy in open_checkpoint(tmp_path).values()]
    assert seen == sorted(seen) and len(set(seen)) > 2


class CountingHandle:
    """Stands in for an open safetensors file and counts the bytes its slices hold."""

    def __init__(self, handle):
        self.handle, self.bytes = handle, 0

    def get_slice(self, name):
        part = self.handle.get_slice(name)
        outer = self

        class Counting:
            def __getitem__(self, index):
                result = part[index]
                outer.bytes += result.numel() * result.element_size()
                return result

        return Counting()


@pytest.mark.parametrize(
    ("index", "read"),
    [
        ((), 7 * 5),
        ((slice(2, 4),), 2 * 5),
        ((slice(None), slice(1, 4)), 7 * 3),
        ((slice(0, 1), slice(4, 5)), 1),
        ((slice(3, 3),), 0),
    ],
    ids=["all", "rows", "columns", "corner", "nothing"],
)
def test_a_slice_reads_only_its_own_bytes(sharded, index, read):
    tensors = open_checkpoint(sharded)
    lazy = tensors["a.weight"]
    counting = CountingHandle(lazy.shard.handle())
    lazy.shard._handle[:] = [counting]
    part = lazy.read(index)
    assert torch.equal(part, random_tensor("a.weight", (7, 5), 0)[index or ...])
    assert counting.bytes == 4 * read


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 7, 2),),
        (slice(0, 8),),
        (slice(-1, None),),
        (slice(4, 2),),
        (slice(None),) * 3,
    ],
    ids=["step", "past-end", "negative", "backwards", "too-many"],
)
def test_only_simple_slices(sharded, index):
    with pytest.raises(ValueError, match=r"shape \(7, 5\)"):
        open_checkpoint(sharded)["a.weight"].read(index)


def test_slot_target_must_have_the_shape_it_reads():
    Slot(torch.zeros(2, 5), (7, 5), (slice(0, 2),))
    with pytest.raises(AssertionError, match=r"\(2, 5\).*\(3, 5\)"):
        Slot(torch.zeros(2, 5), (7, 5), (slice(0, 3),))
    assert sliced_shape((7, 5), (slice(None, 3),)) == (3, 5)


def test_every_dtype_name_is_what_safetensors_writes(tmp_path):
    save_file(
        {name: torch.zeros(2, dtype=torch.uint8).to(dtype) for name, dtype in DTYPES.items()},
        tmp_path / SINGLE,
    )
    assert {n: t.dtype for n, t in open_checkpoint(tmp_path).items()} == DTYPES


def edit_index(folder: Path, change) -> None:
    path = folder / INDEX
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def folder_for_shard(folder: Path) -> None:
    shard = shard_of(folder, "b.weight")
    shard.unlink(), shard.mkdir()


def escape(shard):
    """A change that points one tensor at another file, which exists."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        outside.write_bytes(shard_of(folder, "a.weight").read_bytes())
        name = shard(outside) if callable(shard) else shard
        edit_index(folder, lambda weight_map: weight_map.update({"a.weight": name}))

    return change


def truncate(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    path.write_bytes(path.read_bytes()[:-8])


def corrupt_header(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    data = bytearray(path.read_bytes())
    data[8:16] = b"\xff" * 8
    path.write_bytes(bytes(data))


def corrupt_length(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def missing_tensor(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    save_file({"other": torch.zeros(3)}, path)


def duplicate(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    save_file(load_file(path) | {"a.weight": torch.zeros(7, 5)}, path)


def unlisted(folder: Path) -> None:
    path = shard_of(folder, "b.weight")
    save_file(load_file(path) | {"extra": torch.zeros(3)}, path)


def unknown_dtype(folder: Path) -> None:
    save_file({"b.weight": torch.zeros(3, dtype=torch.complex64)}, shard_of(folder, "b.weight"))


PLAIN = r"index\.json: the shard of 'a.weight' must be a plain .safetensors file name"
SHARD_B = rf"{STEM}-00002-of-00004\.safetensors"
BAD_FOLDERS = {
    "parent-folder": (escape("../outside.safetensors"), PLAIN),
    "absolute-path": (escape(str), PLAIN),
    "sub-folder": (escape("sub/x.safetensors"), PLAIN),
    "windows-path": (escape("..\\outside.safetensors"), PLAIN),
    "dots": (escape(".."), PLAIN),
    "not-safetensors": (escape("pytorch_model.bin"), PLAIN),
    "not-a-string": (escape(7), PLAIN),
    "missing-shard": (lambda f: shard_of(f, "b.weight").unlink(), rf"{SHARD_B} is missing"),
    "truncated-shard": (truncate, rf"{SHARD_B} is truncated or corrupt"),
    "empty-shard": (lambda f: shard_of(f, "b.weight").write_bytes(b""), rf"{SHARD_B} is truncated"),
    "corrupt-header": (corrupt_header, rf"{SHARD_B} is truncated or corrupt"),
    "corrupt-length": (corrupt_length, rf"{SHARD_B} is truncated or corrupt"),
    "tensor-missing-in-shard": (missing_tensor, rf"places 'b.weight' in {SHARD_B}"),
    "tensor-in-other-shard": (
        lambda f: edit_index(f, lambda m: m.update({"a.weight": m["b.weight"]})),
        rf"places 'a.weight' in {SHARD_B}, which does not hold it",
    ),
    "tensors-of-two-shards-swapped": (
        lambda f: edit_index(
            f, lambda m: m.update({"a.weight": m["b.weight"], "b.weight": m["a.weight"]})
        ),
        rf"places 'a.weight' in {SHARD_B}, which does not hold it",
    ),
    "folder-for-a-shard": (folder_for_shard, rf"{SHARD_B} is truncated or corrupt"),
    "duplicate": (duplicate, r"'a.weight' is in two shards: .*00001.* and .*00002"),
    "not-in-index": (unlisted, rf"{SHARD_B} holds \['extra'\], which .*index\.json does not list"),
    "unknown-dtype": (unknown_dtype, rf"{SHARD_B}: 'b.weight' has dtype C64"),
    "index-not-json": (lambda f: (f / INDEX).write_text("{"), r"index\.json is not valid JSON"),
    "index-not-object": (lambda f: (f / INDEX).write_text("[1]"), r"index\.json must hold"),
    "index-without-map": (lambda f: (f / INDEX).write_text("{}"), r"index\.json has no weight_map"),
    "index-empty-map": (lambda f: edit_index(f, dict.clear), r"index\.json has no weight_map"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused_by_name(sharded, case):
    change, message = BAD_FOLDERS[case]
    change(sharded)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(sharded)


def test_no_folder_and_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"folder .*nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"neither {INDEX} nor {SINGLE}"):
        open_checkpoint(tmp_path)


def test_pickle_is_never_opened(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="neither"):
        open_checkpoint(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=rf"{SINGLE} is truncated or corrupt"):
        open_checkpoint(tmp_path)
