"""Statistics: the files, normalisation, denormalisation, and both around a request."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cosmos3_fast.processor import Cosmos3PolicyProcessor
from cosmos3_fast.processor.stats import load_stats

NAN = float("nan")

STATS = {
    "mean": [1.0, -2.0],
    "std": [0.5, 0.0],
    "min": [-4.0, 3.0],
    "max": [4.0, 3.0],
    "q01": [0.0, 10.0],
    "q99": [2.0, 30.0],
}
TRUTH = {  # of the row [0.5, -1.0] (and a third channel that the stats do not have)
    "meanstd": [1.25, -2.0 - 1e-8],
    "minmax": [2.0, 3.0],
    "quantile": [1.5, 10.0],
    "quantile_rot": [1.5, 10.0],
}


def stats_file(tmp_path, document):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("block", ["whole", "global"])
@pytest.mark.parametrize("normalization", TRUTH)
def test_denormalisation(tmp_path, normalization, block):
    key = "global_raw" if normalization == "quantile_rot" else "global"
    document = STATS if block == "whole" else {key: STATS, "other": {}}
    stats = load_stats(stats_file(tmp_path, document), normalization)
    action = torch.tensor([[[0.5, -1.0, 7.0]]], dtype=torch.bfloat16)
    result = stats.denormalize(action)
    assert result.shape == (1, 1, 2) and result.dtype == torch.float32
    assert result[0, 0].tolist() == pytest.approx(TRUTH[normalization], rel=1e-7)


def test_a_constant_channel_keeps_a_small_range(tmp_path):
    stats = load_stats(stats_file(tmp_path, STATS), "minmax")
    low, high = stats.denormalize(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))[:, 1].double()
    assert low == 3.0 and 0 <= high - low < 2e-6


# of the robot's row [2.0, 3.0]: (x - mean) / std, (x - low) / range * 2 - 1, by hand
NORMAL = {
    "meanstd": [2.0, 5.0 / 1e-8],
    "minmax": [0.5, -1.0],
    "quantile": [1.0, -1.7],
    "quantile_rot": [1.0, -1.7],
}


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("normalization", NORMAL)
def test_normalisation(tmp_path, normalization, width):
    stats = load_stats(stats_file(tmp_path, STATS), normalization)
    result = stats.normalize(torch.tensor([[2.0, 3.0]])[:, :width])
    assert result.dtype == torch.float32
    assert result[0].tolist() == pytest.approx(NORMAL[normalization][:width], rel=1e-6)


@pytest.mark.parametrize("normalization", NORMAL)
def test_normalisation_is_the_inverse(tmp_path, normalization):
    """Wide and narrow channels, far from zero too; a constant one keeps what it is given."""
    low = np.array([-4.0, 1e3, -1e-3, 3.0, 0.0])
    span = np.array([8.0, 1.0, 2e-3, 0.0, 1e5])
    document = {"min": low, "max": low + span, "mean": low + span / 2, "std": span / 2}
    document |= {"q01": low, "q99": low + span}
    document = {key: vector.tolist() for key, vector in document.items()}
    stats = load_stats(stats_file(tmp_path, document), normalization)
    x = torch.from_numpy(low + span * np.random.RandomState(3).uniform(-0.5, 1.5, (64, 5))).float()
    back = stats.denormalize(stats.normalize(x)).double()
    size = torch.from_numpy(abs(low) + 2 * span)  # the largest number on the way
    assert bool(((back - x.double()).abs() <= 4 * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.parametrize(
    ("kind", "shift"), [("minmax", 1), ("meanstd", 0)], ids=["minmax", "meanstd"]
)
def test_normalisation_rounds_once(tmp_path, kind, shift):
    """float64 with the statistics as they are kept, then float32."""
    draw = np.random.RandomState(5)
    low, span = draw.uniform(-3, 3, 63), draw.uniform(0.1, 2, 63)
    document = {"min": low, "max": low + span, "mean": low, "std": span}
    document = {key: vector.tolist() for key, vector in document.items()}
    stats = load_stats(stats_file(tmp_path, document), kind)
    x = torch.from_numpy(draw.uniform(-3, 5, (64, 63))).float()
    unit = (x.numpy().astype(np.float64) - stats.offset.numpy()) / stats.scale.numpy()
    want = unit * 2 - 1 if shift else unit
    assert np.array_equal(stats.normalize(x).numpy(), want.astype(np.float32))


def test_a_channel_without_a_range_gets_a_millionth(tmp_path):
    stats = load_stats(stats_file(tmp_path, {"min": [0.0], "max": [0.0]}), "minmax")
    assert stats.denormalize(torch.ones(1, 1)).item() == pytest.approx(1e-6)


BAD_STATS = {
    "normalization": (STATS, "l2", "action_normalization 'l2'.*minmax"),
    "missing key": ({"min": [0.0]}, "minmax", r"stats.json' lack 'max'; they hold \['min'\]"),
    "lengths": ({"min": [0.0], "max": [1.0, 2.0]}, "minmax", "min has 1 values, max 2"),
    "not finite": (
        {"mean": [NAN], "std": [1.0]},
        "meanstd",
        "'mean' must be a flat list of finite",
    ),
    "nested": ({"mean": [[0.0]], "std": [[1.0]]}, "meanstd", "'mean' must be a flat list"),
    "text": ({"mean": "zero", "std": [1.0]}, "meanstd", "'mean' is no list of numbers"),
    "digits": ({"mean": ["0"], "std": [1.0]}, "meanstd", r"'mean' is no list.* got '0' \(str\)"),
    "booleans": ({"min": [0.0], "max": [True]}, "minmax", r"'max' is no list.* True \(bool\)"),
    "upside down": (
        {"min": [0.0, 1.0, -1.0], "max": [0.0, 2.0, -1.5]},
        "minmax",
        r"stats.json': max must not be below min, got -1.5 < -1 in channel 2$",
    ),
    "quantiles upside down": (
        {"q01": [1.0], "q99": [0.5]},
        "quantile",
        r"stats.json': q99 must not be below q01, got 0.5 < 1 in channel 0$",
    ),
    "raw quantiles upside down": (
        {"global": {"q01": [0.0], "q99": [1.0]}, "global_raw": {"q01": [1.0], "q99": [0.5]}},
        "quantile_rot",
        "q99 must not be below q01, got 0.5 < 1 in channel 0",
    ),
    "negative std": (
        {"mean": [0.0, 0.0], "std": [0.0, -0.25]},
        "meanstd",
        r"stats.json': std must not be below 0, got -0.25 < 0 in channel 1$",
    ),
    "list": ([1, 2], "minmax", "must hold an object, got list"),
    "block is a list": ({"global": [1]}, "minmax", "must hold an object"),
}


@pytest.mark.parametrize(("document", "kind", "message"), BAD_STATS.values(), ids=BAD_STATS)
def test_bad_stats_are_refused(tmp_path, document, kind, message):
    with pytest.raises(ValueError, match=message):
        load_stats(stats_file(tmp_path, document), kind)


def test_stats_nested_without_end_are_named(tmp_path):
    (tmp_path / "stats.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"cannot read action stats from '.*stats\.json': max"):
        load_stats(tmp_path / "stats.json", "minmax")


def test_unreadable_stats_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read action stats from '.*gone\.json'"):
        load_stats(tmp_path / "gone.json", "minmax")


def test_actions_of_another_width_than_the_stats_are_refused(tmp_path):
    stats = load_stats(stats_file(tmp_path, STATS), "minmax")
    with pytest.raises(ValueError, match="stats have 2 channels, actions 1"):
        stats.denormalize(torch.zeros(1, 4, 1))
    with pytest.raises(ValueError, match="cond_action has 3 columns, the action stats 2"):
        stats.normalize(torch.zeros(4, 3))


@pytest.fixture
def build(tokenizer_folder, tmp_path):
    """A forward_dynamics processor of domain 7, 10 wide, with the statistics of `document`."""

    def make(document, **changes):
        arguments = {
            "tokenizer_name_or_path": tokenizer_folder,
            "image_size": 256,
            "mode": "forward_dynamics",
            "domain_name": 7,
            "raw_action_dim": 10,
            "action_chunk_size": 4,
            "action_stats_path": document and stats_file(tmp_path, document),
        }
        return Cosmos3PolicyProcessor(**{**arguments, **changes})

    return make


def statistics(width):
    """Every vector that a file may hold, in both blocks; `global_raw` differs from `global`."""
    draw = np.random.RandomState(width)
    names = ("mean", "std", "min", "max", "q01", "q99")
    blocks = {}
    for block in ("global", "global_raw"):
        low, span = draw.uniform(-3, 3, width), draw.uniform(0.1, 4, width)
        rows = (low, span, low, low + span, low, low + span)
        blocks[block] = {name: row.tolist() for name, row in zip(names, rows, strict=True)}
    return blocks


def observe(**changes):
    return {"images": np.zeros((64, 80, 3), np.uint8), "task": "Pick up the cup", **changes}


@pytest.mark.parametrize("width", [1, 7, 10])
@pytest.mark.parametrize("normalization", NORMAL)
def test_given_actions_come_back_from_the_models_units(build, normalization, width):
    """forward_dynamics echoes what it is given: the same rows, in the robot's units."""
    stats = statistics(width)
    processor = build(stats, action_normalization=normalization)
    given = torch.from_numpy(np.random.RandomState(1).uniform(-4, 4, (4, width))).float()
    cond_action = processor.preprocess(observe(cond_action=given)).cond_action
    block = stats["global_raw" if normalization == "quantile_rot" else "global"]
    if normalization == "meanstd":
        expected = (given - torch.tensor(block["mean"])) / torch.tensor(block["std"])
    else:
        names = ("min", "max") if normalization == "minmax" else ("q01", "q99")
        low, high = (torch.tensor(block[name]) for name in names)
        expected = (given - low) / (high - low) * 2 - 1
    torch.testing.assert_close(cond_action[0, :, :width], expected, rtol=1e-5, atol=1e-5)
    assert not cond_action[..., width:].any(), "padding is 0 for the model"
    echo = processor.postprocess({"action": cond_action[..., :10]})["action"]
    assert echo.shape == (1, 4, width)
    torch.testing.assert_close(echo[0], given, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMAL)
def test_a_policys_result_is_forward_dynamics_input(build, normalization):
    """What the policy's model gave is what forward dynamics' model gets."""
    processor = build(statistics(7), action_normalization=normalization)
    result = torch.from_numpy(np.random.RandomState(2).uniform(-1, 1, (1, 4, 10))).float()
    commands = processor.postprocess({"action": result})["action"]
    again = processor.preprocess(observe(cond_action=commands)).cond_action
    torch.testing.assert_close(again[..., :7], result[..., :7], rtol=1e-5, atol=1e-5)


def test_without_statistics_given_actions_are_as_they_are(build):
    given = torch.from_numpy(np.random.RandomState(3).uniform(-4, 4, (4, 10))).float()
    processor = build(None)
    cond_action = processor.preprocess(observe(cond_action=given)).cond_action
    assert torch.equal(cond_action[0, :, :10], given)
    assert torch.equal(processor.postprocess(cond_action[..., :10])["action"][0], given)


def test_rows_are_repeated_in_the_models_units_too(build):
    processor = build(statistics(10))
    one = processor.preprocess(observe(cond_action=[[0.5] * 10])).cond_action
    assert torch.equal(one, one[:, :1].expand(1, 4, 64))


def test_widths_that_do_not_go_with_the_statistics_are_refused_before_any_compute(build):
    processor = build(statistics(7))
    with pytest.raises(ValueError, match="cond_action has 10 columns, the action stats 7"):
        processor.preprocess(observe(cond_action=[[0.5] * 10]))
    with pytest.raises(ValueError, match="action stats have 12 channels, more than raw_action_dim"):
        build(statistics(12)).preprocess(observe(mode="policy"))


@pytest.mark.parametrize("shape", [(), (7,), (4, 7), (1, 1, 4, 7), (1, 0, 7), (1, 4, 0)], ids=str)
@pytest.mark.parametrize("with_stats", [True, False], ids=["statistics", "none"])
def test_a_result_of_another_shape_is_refused(build, with_stats, shape):
    processor = build(statistics(7) if with_stats else None)
    with pytest.raises(ValueError, match=r"must have shape \[B, chunk, raw\], got \["):
        processor.postprocess(torch.zeros(shape))


def test_values_that_statistics_take_out_of_range_are_refused(build):
    stats = {"mean": [0.0] * 10, "std": [0.0] * 10}
    with pytest.raises(ValueError, match="cond_action has 40 values that are not finite"):
        build(stats, action_normalization="meanstd").preprocess(
            observe(cond_action=[[1e31] * 10] * 4)
        )


def test_a_result_that_statistics_take_out_of_range_is_refused(build):
    stats = {"mean": [0.0] * 10, "std": [1e30] * 10}
    processor = build(stats, action_normalization="meanstd")
    with pytest.raises(ValueError, match="the action holds values that are not finite"):
        processor.postprocess(torch.full((1, 4, 10), 1e30))
