"""Domains, action rows, JSON forms, denormalisation and the DROID conversions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as oracle

from cosmos3_fast.processor import (
    DOMAINS,
    DROID,
    parse_actions,
    read_actions,
    resolve_domain_id,
    resolve_raw_action_dim,
    write_actions,
)
from cosmos3_fast.processor.actions import ActionPad, action_rows
from cosmos3_fast.processor.stats import load_denormalize

NAN, INF = float("nan"), float("inf")


def test_domain_table_equals_diffusers():
    assert {name: row[0] for name, row in DOMAINS.items()} == oracle._EMBODIMENT_TO_DOMAIN_ID
    widths = {name: row[1][0] for name, row in DOMAINS.items() if row[1]}
    assert widths == oracle._EMBODIMENT_TO_RAW_ACTION_DIM


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("umi",), 10),
        (("droid_lerobot",), 10),
        (("droid_lerobot", 8), 8),
        (("droid_lerobot", 10), 10),
        (("libero", 7), 7),
        ((31, 12), 12),
    ],
    ids=lambda value: str(value),
)
def test_raw_action_dim(arguments, expected):
    assert resolve_raw_action_dim(*arguments) == expected


def test_an_unlisted_width_can_be_asked_for():
    assert resolve_raw_action_dim("umi", 20, allow_width=True) == 20


BAD_DOMAINS = {
    "unknown": (lambda: resolve_domain_id("umbrella"), "unknown domain 'umbrella'.*'umi'"),
    "none": (lambda: resolve_domain_id(None), "unknown domain None"),
    "bool": (lambda: resolve_domain_id(True), "unknown domain True"),
    "negative": (lambda: resolve_domain_id(-1), "must be >= 0, got -1"),
    "id without width": (lambda: resolve_raw_action_dim(8), "domain 8 has no fixed action width"),
    "no width": (lambda: resolve_raw_action_dim("libero"), "'libero' has no fixed action width"),
    "other width": (lambda: resolve_raw_action_dim("umi", 8), r"8 differs from \[10\].*'umi'"),
    "franka joints": (lambda: resolve_raw_action_dim("robomind-franka", 8), "8 differs from"),
    "zero": (lambda: resolve_raw_action_dim("umi", 0), "positive integer, got 0"),
    "float": (lambda: resolve_raw_action_dim("umi", 10.0), "positive integer, got 10.0"),
}


@pytest.mark.parametrize(("call", "message"), BAD_DOMAINS.values(), ids=BAD_DOMAINS)
def test_bad_domains_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def rows(count, width):
    return torch.arange(count * width, dtype=torch.float32).reshape(count, width) / 7 - 1


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, lambda x: x[None]])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_actions_repeat_the_last_row_or_are_cut_and_padded_with_zeros(convert, count):
    padded = ActionPad(4, 8)(convert(rows(count, 3)), 3)
    assert padded.shape == (1, 4, 8) and padded.dtype == torch.float32
    for k in range(4):
        assert torch.equal(padded[0, k, :3], rows(count, 3)[min(k, count - 1)])
    assert not padded[..., 3:].any()


def test_fewer_columns_are_padded_with_a_warning(caplog):
    padded = ActionPad(4, 8)(rows(4, 2), 3)
    assert torch.equal(padded[0, :, :2], rows(4, 2)) and not padded[..., 2:].any()
    assert "2 of 3 columns" in caplog.text


def test_double_precision_is_rounded_once():
    assert action_rows(np.full((1, 1), 0.1))[0, 0].item() == np.float32(0.1)


BAD_ROWS = {
    "nan": (
        [[0, 1], [NAN, 2]],
        "1 values that are not finite, the first is nan in row 1, column 0",
    ),
    "infinite": (torch.tensor([[0.0, INF]]), "inf in row 0, column 1"),
    "null": ([[0, None]], "not finite"),
    "overflow": ([[1e39]], "inf in row 0, column 0"),
    "ragged": ([[0, 1], [2, 3], [4]], "ragged: row 0 has 2 values, row 2 has 1"),
    "ragged scalars": ([[0, 1], 2], "ragged: row 0 has 2 values, row 1 has None"),
    "text": ([["left", "right"]], "not numeric"),
    "object": ({"a": 1}, "not numeric"),
    "too many columns": (rows(4, 4), "4 columns, more than raw_action_dim 3"),
    "no row": ([], r"must have shape \[T, D\].*got \[0\]"),
    "no column": (torch.zeros(4, 0), r"got \[4, 0\]"),
    "one dimension": ([1, 2, 3], r"got \[3\]"),
    "batch of two": (torch.zeros(2, 4, 3), r"got \[2, 4, 3\]"),
}


@pytest.mark.parametrize(("actions", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_actions_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        ActionPad(4, 8)(actions, 3)


DATA = [[0.5, -1.25], [2.0, 3.0]]
FORMS = {
    "data": {"shape": [1, 2, 2], "dtype": "float32", "data": DATA},
    "data without batch": {"shape": [2, 2], "data": DATA},
    "data with batch": {"shape": [1, 2, 2], "data": [DATA]},
    "data alone": {"data": DATA},
    "chunks": {"action_chunks": [DATA, [[9, 9]]]},
    "chunk objects": {"action_chunks": [{"data": DATA}]},
    "bare": DATA,
}


@pytest.mark.parametrize("document", FORMS.values(), ids=FORMS)
def test_action_documents(document, tmp_path):
    path = tmp_path / "actions.json"
    path.write_text(json.dumps(document))
    assert read_actions(path).tolist() == DATA


def test_action_chunk_by_index():
    assert parse_actions(FORMS["chunks"], 1).tolist() == [[9, 9]]


def test_written_actions_read_back_bit_for_bit(tmp_path):
    actions = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(1))
    write_actions(tmp_path / "a.json", actions)
    document = json.loads((tmp_path / "a.json").read_text())
    assert list(document) == ["shape", "dtype", "data"]
    assert (document["shape"], document["dtype"]) == ([1, 5, 3], "float32")
    assert torch.equal(read_actions(tmp_path / "a.json"), actions[0])


def test_actions_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="action has 1 values that are not finite"):
        write_actions(tmp_path / "a.json", torch.tensor([[NAN]]))
    assert not (tmp_path / "a.json").exists()


BAD_DOCUMENTS = {
    "not json": ("{", "cannot read actions from '.*actions.json'"),
    "nan": ("[[NaN]]", "actions.json' has 1 values that are not finite"),
    "infinity": ('{"data": [[1, -Infinity]]}', "-inf in row 0, column 1"),
    "ragged": ("[[1, 2], [3]]", "actions.json' is ragged: row 0 has 2 values, row 1 has 1"),
    "wrong shape": ('{"shape": [1, 3, 2], "data": [[1, 2]]}', r"shape says \[1, 3, 2\].*\[1, 2\]"),
    "batch of two": ('{"shape": [2, 1, 2], "data": [[1, 2]]}', r"shape says \[2, 1, 2\]"),
    "shape no list": ('{"shape": 2, "data": [[1, 2]]}', "shape says 2"),
    "no chunks": ('{"action_chunks": []}', "chunk 0 asked for, action_chunks holds 0"),
    "chunks no list": ('{"action_chunks": 3}', "action_chunks holds int"),
    "other object": ('{"rows": []}', r"expected an object with data .* got \['rows'\]"),
    "number": ("3", "got int"),
}


@pytest.mark.parametrize(("text", "message"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_bad_action_documents_are_refused(text, message, tmp_path):
    path = tmp_path / "actions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_actions(path)


def test_a_missing_action_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read actions from '.*gone\.json'"):
        read_actions(tmp_path / "gone.json")


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
    undo = load_denormalize(stats_file(tmp_path, document), normalization)
    action = torch.tensor([[[0.5, -1.0, 7.0]]], dtype=torch.bfloat16)
    result = undo(action)
    assert result.shape == (1, 1, 2) and result.dtype == torch.float32
    assert result[0, 0].tolist() == pytest.approx(TRUTH[normalization], rel=1e-7)


def test_a_constant_channel_keeps_a_small_range(tmp_path):
    undo = load_denormalize(stats_file(tmp_path, STATS), "minmax")
    low, high = undo(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))[:, 1].double()
    assert low == 3.0 and 0 <= high - low < 2e-6


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
    "list": ([1, 2], "minmax", "must hold an object, got list"),
    "block is a list": ({"global": [1]}, "minmax", "must hold an object"),
}


@pytest.mark.parametrize(("document", "kind", "message"), BAD_STATS.values(), ids=BAD_STATS)
def test_bad_stats_are_refused(tmp_path, document, kind, message):
    with pytest.raises(ValueError, match=message):
        load_denormalize(stats_file(tmp_path, document), kind)


def test_unreadable_stats_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read action stats from '.*gone\.json'"):
        load_denormalize(tmp_path / "gone.json", "minmax")


def test_actions_narrower_than_the_stats_are_refused(tmp_path):
    undo = load_denormalize(stats_file(tmp_path, STATS), "minmax")
    with pytest.raises(ValueError, match="stats have 2 channels, actions 1"):
        undo(torch.zeros(1, 4, 1))


def test_droid_state_row_and_reply():
    droid, joints = DROID(), [0.1 * k for k in range(7)]
    state = droid.encode_state(joints, 0.75)
    assert state.shape == (1, 1, 8) and state.dtype == torch.float32
    assert state[0, 0].tolist() == pytest.approx([*joints, 0.25])
    action = rows(32, 8)[None]
    reply = droid.decode_action(action)
    assert torch.equal(reply[..., :7], action[..., :7])
    assert torch.equal(reply[..., 7], 1 - action[..., 7])
    assert torch.equal(action, rows(32, 8)[None]), "the model's rows stay as they were"


def test_droid_arguments_are_the_recipe():
    droid = DROID()
    assert droid.processor_arguments() == {
        "domain_name": "droid_lerobot",
        "raw_action_dim": 8,
        "action_chunk_size": 32,
        "fps": 15.0,
        "image_size": 480,
        "view_point": "concat_view",
        "view_description": droid.view_description,
    }
    assert droid.request_arguments() == {
        "fps": 15.0,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    assert droid.engine_arguments() == {"schedule": "native", "flow_shift": 5.0}


BAD_DROID = {
    "six joints": (lambda d: d.encode_state([0.0] * 6, 0.5), "7 joints and the gripper, got 6"),
    "nan joint": (lambda d: d.encode_state([math.nan] * 7, 0.5), "state has 7 values"),
    "nan gripper": (lambda d: d.encode_state([0.0] * 7, math.nan), "row 0, column 7"),
    "ten columns": (lambda d: d.decode_action(torch.zeros(1, 32, 10)), "8 columns, got 10"),
}


@pytest.mark.parametrize(("call", "message"), BAD_DROID.values(), ids=BAD_DROID)
def test_bad_droid_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(DROID())
