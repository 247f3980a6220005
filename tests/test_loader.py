"""loader: exact values through slices, casts and strides; strict names, shapes, dtypes; finite."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from cosmos3_fast import loader
from cosmos3_fast.checkpoint import STEM, LazyTensor, Slot, open_checkpoint
from cosmos3_fast.loader import PinnedStaging, load, progress_bar, row_pieces, unfilled
from cosmos3_fast.testing.fill import fill_random, random_tensor, write_sharded

SHAPES = {"q.weight": (6, 5), "k.weight": (2, 5), "out.weight": (5, 6), "norm.weight": (5,)}


def make(folder, tensors=None, shard_bytes=1 << 20):
    """A folder with the given tensors, or the seeded ones of SHAPES; opened."""
    if tensors is None:
        write_sharded(folder, SHAPES, dtype=torch.float32, shard_bytes=shard_bytes)
    else:
        save_file(tensors, folder / f"{STEM}.safetensors")
    return open_checkpoint(folder)


def full_slots(dtype=torch.float32, device="cpu", fill=float("nan")):
    """One slot per tensor, q and k fused into one parameter."""
    fused = torch.full((8, 5), fill, dtype=dtype, device=device)
    out = torch.full((5, 6), fill, dtype=dtype, device=device)
    norm = torch.full((5,), fill, dtype=dtype, device=device)
    slots = {
        "q.weight": Slot(fused[:6], (6, 5)),
        "k.weight": Slot(fused[6:], (2, 5)),
        "out.weight": Slot(out, (5, 6)),
        "norm.weight": Slot(norm, (5,)),
    }
    return slots, {"fused": fused, "out": out, "norm": norm}


def truth(name, dtype=torch.float32):
    return random_tensor(name, SHAPES[name], 0).to(dtype)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20], ids=["sharded", "single"])
def test_every_slot_gets_its_tensor(tmp_path, shard_bytes):
    slots, parameters = full_slots()
    report = load(slots, make(tmp_path, shard_bytes=shard_bytes))
    for name, slot in slots.items():
        assert torch.equal(slot.target, truth(name))
    assert unfilled(parameters, slots) == []
    assert (report.tensors, report.bytes, report.casts, report.skipped) == (4, 4 * 75, (), ())
    assert report.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.bytes = 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_declared_casts_are_exact_and_reported(tmp_path, dtype):
    slots, _ = full_slots(dtype)
    report = load(slots, make(tmp_path))
    assert all(torch.equal(slot.target, truth(name, dtype)) for name, slot in slots.items())
    assert report.casts == (f"float32 to {dtype}: 4".replace("torch.", ""),)
    assert report.casts[0] in str(report) and "4 tensors" in str(report)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_slices_of_all_ranks_make_the_whole(tmp_path, ranks):
    tensors = make(tmp_path)
    rows, columns, read = [], [], 0
    for rank in range(ranks):
        part = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
        size = 6 // ranks
        slots = {
            "q.weight": Slot(torch.empty(size, 5), (6, 5), (part,)),
            "out.weight": Slot(torch.empty(5, size), (5, 6), (slice(None), part)),
        }
        read += load(slots, tensors, unused=("k", "norm")).bytes
        rows.append(slots["q.weight"].target)
        columns.append(slots["out.weight"].target)
    assert torch.equal(torch.cat(rows), truth("q.weight"))
    assert torch.equal(torch.cat(columns, 1), truth("out.weight"))
    assert read == 4 * 60


def test_strided_targets(tmp_path):
    target = torch.zeros(6, 5).t()
    slots = {"out.weight": Slot(target, (5, 6))}
    load(slots, make(tmp_path), unused=("q", "k", "norm"))
    assert torch.equal(target, truth("out.weight"))


def test_parameters_that_need_gradients(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(5))
    load(
        {"norm.weight": Slot(parameter, (5,))},
        make(tmp_path),
        unused=("q", "k", "out"),
    )
    assert torch.equal(parameter.detach(), truth("norm.weight"))


@pytest.mark.parametrize(
    ("unused", "name", "known"),
    [
        (("norm",), "norm.weight", True),
        (("norm.weight",), "norm.weight", True),
        (("norm",), "norm_moe_gen.weight", False),
        (("audio_",), "audio_proj_in.weight", True),
        (("decoder.",), "decoder.conv_in.weight", True),
        (("nor",), "norm.weight", False),
        ((), "norm.weight", False),
    ],
)
def test_unused_names_are_skipped_and_no_others(tmp_path, unused, name, known):
    tensors = make(tmp_path, {"a": torch.ones(2), name: torch.ones(3)})
    slots = {"a": Slot(torch.zeros(2), (2,))}
    if known:
        report = load(slots, tensors, unused=unused)
        assert report.skipped == (name,) and name in str(report)
    else:
        with pytest.raises(ValueError, match=f"no place here: {name}$"):
            load(slots, tensors, unused=unused)


def test_leftovers_warn_when_not_strict(tmp_path, caplog):
    tensors = make(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)})
    slots = {"a": Slot(torch.zeros(2), (2,))}
    with caplog.at_level(logging.WARNING):
        assert load(slots, tensors, strict=False).skipped == ("b",)
    assert "not loaded: b" in caplog.text and torch.equal(slots["a"].target, torch.ones(2))


def never(*_):
    raise AssertionError("a byte was read before everything was checked")


def slot(*shape, dtype=torch.float32):
    return Slot(torch.zeros(shape, dtype=dtype), shape)


BAD = {
    "missing": (
        {f"w{i}": slot(2) for i in range(7)},
        {"a": torch.ones(2)},
        r"lacks tensors: w0, w1, w2, w3, w4, … \(7 in all\)$",
    ),
    "five missing": (
        {f"w{i}": slot(2) for i in range(5)},
        {"a": torch.ones(2)},
        "lacks tensors: w0, w1, w2, w3, w4$",
    ),
    "extra": (
        {"a": slot(2)},
        {"a": torch.ones(2)} | {f"x{i}": torch.ones(1) for i in range(6)},
        r"no place here: x0, x1, x2, x3, x4, … \(6 in all\)$",
    ),
    "shape": (
        {"a": slot(2, 3)},
        {"a": torch.ones(3, 2)},
        r"a has shape \(3, 2\), expected \(2, 3\)",
    ),
    "same-count-other-rank": (
        {"a": slot(6)},
        {"a": torch.ones(1, 6)},
        r"a has shape \(1, 6\), expected \(6,\)",
    ),
    "broadcastable-columns": ({"a": slot(2, 3)}, {"a": torch.ones(2, 1)}, r"expected \(2, 3\)"),
    "broadcastable": ({"a": slot(2, 3)}, {"a": torch.ones(1, 3)}, r"expected \(2, 3\)"),
    "integer": (
        {"a": slot(2)},
        {"a": torch.ones(2, dtype=torch.int32)},
        "a has dtype torch.int32, which cannot be loaded as torch.float32",
    ),
    "float8": (
        {"a": slot(2, dtype=torch.bfloat16)},
        {"a": torch.ones(2).to(torch.float8_e4m3fn)},
        "a has dtype torch.float8_e4m3fn, which cannot be loaded as torch.bfloat16",
    ),
}


@pytest.mark.parametrize(
    ("case", "strict"),
    [(case, True) for case in BAD] + [(case, False) for case in BAD if case != "extra"],
)
def test_disagreement_is_refused_before_a_byte_is_read(tmp_path, monkeypatch, case, strict):
    slots, tensors, message = BAD[case]
    opened = make(tmp_path, tensors)
    monkeypatch.setattr(LazyTensor, "read", never)
    with pytest.raises(ValueError, match=message):
        load(slots, opened, strict=strict)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    bad = torch.ones(3, 63)
    bad[2, 62] = value
    slots = {"a": slot(3, 63), "b": slot(2)}
    with pytest.raises(ValueError, match=r"not finite: a$"):
        load(slots, make(tmp_path, {"a": bad, "b": torch.ones(2)}))


def test_a_cast_that_overflows_is_not_finite(tmp_path):
    slots = {"a": slot(1, dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"not finite: a$"):
        load(slots, make(tmp_path, {"a": torch.tensor([1e5])}))


def test_progress_counts_the_bytes_of_the_slices(tmp_path):
    calls = []
    slots, _ = full_slots()
    slots["q.weight"] = Slot(torch.empty(2, 5), (6, 5), (slice(0, 2),))
    load(slots, make(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4 * 55, 4 * 55) and len(calls) == 4
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_progress_bar_ends_with_the_work(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **settings):
            self.n, self.settings, self.closed = 0, settings, False
            bars.append(self)

        def update(self, more):
            self.n += more

        def close(self):
            self.closed = True

    monkeypatch.setattr(loader, "tqdm", Bar)
    slots, _ = full_slots()
    load(slots, make(tmp_path), progress=progress_bar("weights"))
    (bar,) = bars
    assert (bar.n, bar.settings["total"], bar.closed) == (300, 300, True)
    assert bar.settings["desc"] == "weights"


def test_shards_are_closed_on_the_way(tmp_path, monkeypatch):
    tensors = make(tmp_path, shard_bytes=1)
    opened = []
    read = LazyTensor.read

    def spy(self, index=()):
        result = read(self, index)
        opened.append(sum(bool(shard._handle) for shard in tensors.shards))
        return result

    monkeypatch.setattr(LazyTensor, "read", spy)
    load(full_slots()[0], tensors)
    assert opened == [1, 1, 1, 1] and not any(shard._handle for shard in tensors.shards)


def test_unfilled_names_gaps_and_doubles():
    slots, parameters = full_slots()
    assert unfilled(parameters | {"more": torch.zeros(3)}, slots) == ["more"]
    del slots["k.weight"]
    assert unfilled(parameters, slots) == ["fused"]
    twice = slots | {"again": Slot(parameters["norm"], (5,))}
    assert unfilled(parameters, twice) == ["fused", "norm"]


@pytest.mark.parametrize("nbytes", [4, 20, 24, 100, 10_000])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (7, 5), (3, 4, 5), (0, 4)], ids=str)
def test_pieces_cover_once_and_fit(shape, nbytes):
    source = torch.arange(torch.Size(shape).numel()).float().view(shape)
    target, counts = torch.full(shape, -1.0), torch.zeros(shape)
    for (part, into), (_, count) in zip(
        row_pieces(source, target, nbytes), row_pieces(source, counts, nbytes), strict=True
    ):
        assert part.numel() * 4 <= nbytes
        into.copy_(part)
        count += 1
    assert torch.equal(source, target) and torch.equal(counts, torch.ones(shape))


@pytest.mark.parametrize("seed", [0, 7])
def test_loading_what_was_written_equals_filling(tmp_path, seed):
    write_sharded(tmp_path, SHAPES, seed=seed, dtype=torch.bfloat16, shard_bytes=40)
    loaded, filled = full_slots(torch.bfloat16)[0], full_slots(torch.bfloat16)[0]
    load(loaded, open_checkpoint(tmp_path))
    fill_random(filled, seed)
    assert all(torch.equal(loaded[n].target, filled[n].target) for n in SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer", [64, 1 << 20], ids=["many-pieces", "one-piece"])
def test_cuda_load_equals_cpu(tmp_path, monkeypatch, dtype, buffer):
    shapes = {"a.weight": (63, 1000), "b.weight": (1000, 63), "c.weight": (5, 3, 7), "d": (1,)}
    write_sharded(tmp_path, shapes, dtype=torch.float32, shard_bytes=300_000)
    monkeypatch.setattr(PinnedStaging.__init__, "__defaults__", (buffer,))
    indices = {"a.weight": (slice(None), slice(500, 1000)), "b.weight": (slice(7, 507),)}
    both = []
    for device in ("cpu", "cuda"):
        slots = {}
        for name, shape in shapes.items():
            index = indices.get(name, ())
            size = torch.empty(shape, device="meta")[index or ...].shape
            target = torch.full(size, float("nan"), dtype=dtype, device=device)
            slots[name] = Slot(target, shape, index)
        both.append((slots, load(slots, open_checkpoint(tmp_path))))
    (cpu, report), (cuda, cuda_report) = both
    assert (report.bytes, report.casts) == (cuda_report.bytes, cuda_report.casts)
    assert all(torch.equal(cpu[n].target, cuda[n].target.cpu()) for n in shapes)


def memory(field):
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


@pytest.mark.gpu
def test_full_size_shards_load_back(tmp_path, capsys):
    """Four of Nano's layers at their real size in shards; GB/s and host memory printed."""
    from cosmos3_fast.testing.shapes import NANO_TRANSFORMER, transformer_shapes

    shapes = transformer_shapes(NANO_TRANSFORMER | {"num_hidden_layers": 4})
    write_sharded(tmp_path, shapes, device="cuda", shard_bytes=1 << 30)
    before, most = memory("RssAnon"), SimpleNamespace(anon=0)
    slots = {
        name: Slot(torch.empty(shape, dtype=torch.bfloat16, device="cuda"), shape)
        for name, shape in shapes.items()
    }

    def progress(done, total):
        most.anon = max(most.anon, memory("RssAnon") - before)

    report = load(slots, open_checkpoint(tmp_path), progress=progress)
    with capsys.disabled():
        print(f"\n{report}; host memory {most.anon / 1e9:.2f} GB beside mapped pages")
    for name in ("embed_tokens.weight", "layers.3.mlp_moe_gen.down_proj.weight", "norm.weight"):
        expected = random_tensor(name, shapes[name], 0, "cuda").bfloat16()
        assert torch.equal(slots[name].target, expected)
    assert most.anon < 1 << 30
