"""Domains, action rows, JSON forms and the DROID conversions."""

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
        (("6", 12), 12),
    ],
    ids=lambda value: str(value),
)
def test_raw_action_dim(arguments, expected):
    assert resolve_raw_action_dim(*arguments) == expected


def test_an_unlisted_width_can_be_asked_for():
    assert resolve_raw_action_dim("umi", 20, allow_width=True) == 20


@pytest.mark.parametrize(("text", "number"), [("6", 6), ("0", 0), ("31", 31)])
def test_an_id_may_be_text(text, number):
    """The command line has no integers."""
    assert resolve_domain_id(text) == resolve_domain_id(number) == number


def test_the_refusal_of_another_width_says_what_both_interfaces_take():
    with pytest.raises(ValueError, match="if it is meant, give the domain as its id, 7") as caught:
        resolve_raw_action_dim("bridge_orig_lerobot", 12)
    assert "allow_width" not in str(caught.value)
    assert resolve_raw_action_dim("7", 12) == resolve_raw_action_dim(7, 12) == 12


BAD_DOMAINS = {
    "unknown": (lambda: resolve_domain_id("umbrella"), "unknown domain 'umbrella'.*'umi'"),
    "none": (lambda: resolve_domain_id(None), "unknown domain None"),
    "wide digit": (lambda: resolve_domain_id("\uff18"), "unknown domain '\uff18'"),
    "bool": (lambda: resolve_domain_id(True), "unknown domain True"),
    "negative": (lambda: resolve_domain_id(-1), "must be >= 0, got -1"),
    "negative text": (lambda: resolve_domain_id("-1"), "unknown domain '-1'.* or an id >= 0"),
    "fraction as text": (lambda: resolve_domain_id("6.0"), "unknown domain '6.0'"),
    "other digits": (lambda: resolve_domain_id("\u0666"), "unknown domain"),
    "float id": (lambda: resolve_domain_id(6.0), "unknown domain 6.0"),
    "text id without width": (
        lambda: resolve_raw_action_dim("8"),
        "domain '8' has no fixed action width",
    ),
    "width as text": (lambda: resolve_raw_action_dim("umi", "10"), r"integer, got '10' \(str\)"),
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


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "cond_action has 1 of 4 rows; the last is repeated"),
        (4, ""),
        (9, "cond_action has 9 rows; the first 4 are used"),
    ],
)
def test_other_numbers_of_rows_are_said(caplog, count, said):
    ActionPad(4, 8)(rows(count, 3), 3)
    assert [record.getMessage() for record in caplog.records] == [said] * bool(said)


def test_integers_and_numpys_numbers_are_numbers():
    for given in (
        [[1, 2]],
        [[np.float32(1), np.int64(2)]],
        [np.array([1, 2], np.uint8)],
        [torch.tensor([1, 2])],
        torch.tensor([[1, 2]], dtype=torch.bfloat16),
        np.array([[1, 2]], np.float16),
    ):
        assert action_rows(given).tolist() == [[1.0, 2.0]]


def test_double_precision_is_rounded_once():
    assert action_rows(np.full((1, 1), 0.1))[0, 0].item() == np.float32(0.1)


BAD_ROWS = {
    "nan": (
        [[0, 1], [NAN, 2]],
        "1 values that are not finite, the first is nan in row 1, column 0",
    ),
    "infinite": (torch.tensor([[0.0, INF]]), "inf in row 0, column 1"),
    "null": ([[0, None]], r"expected numbers, got None \(NoneType\) at \[0\]\[1\]"),
    "overflow": ([[1e39]], "inf in row 0, column 0"),
    "ragged": ([[0, 1], [2, 3], [4]], "ragged: row 0 has 2 values, row 2 has 1"),
    "ragged scalars": ([[0, 1], 2], "ragged: row 0 has 2 values, row 1 has None"),
    "text": ([["left", "right"]], "not numeric"),
    "object": ({"a": 1}, r"not numeric.* got \{'a': 1\} \(dict\)"),
    "digits": ([[1, 2], [3, "4.5"]], r"expected numbers, got '4.5' \(str\) at \[1\]\[1\]"),
    "a line of digits": ("1.5", r"expected numbers, got '1.5' \(str\)$"),
    "boolean": ([[0.5, True]], r"expected numbers, got True \(bool\) at \[0\]\[1\]"),
    "numpy boolean": ([[0.5, np.True_]], r"got dtype bool at \[0\]\[1\]"),
    "booleans": (np.ones((4, 3), bool), "expected numbers, got dtype bool$"),
    "boolean tensor": (torch.ones(4, 3, dtype=torch.bool), "got dtype torch.bool$"),
    "row of booleans": ([[1.0], torch.tensor([True])], r"got dtype torch.bool at \[1\]"),
    "complex": (np.ones((4, 3), complex), "got dtype complex128"),
    "complex tensor": (torch.ones(4, 3, dtype=torch.complex64), "got dtype torch.complex64"),
    "texts": (np.array([["1", "2"]]), "got dtype <U1"),
    "an integer that no float holds": ([[10**400]], "too large"),
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
    with pytest.raises(ValueError, match="action chunk -1 asked for"):
        parse_actions(FORMS["chunks"], -1)


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
    "booleans": ("[[true, false]]", r"got True \(bool\) at \[0\]\[0\]"),
    "text": ('{"data": [[1, "2"]]}', r"actions.json' is not numeric.* got '2' \(str\)"),
    "text in a chunk": (
        '{"action_chunks": [[["1"]]]}',
        r"action_chunks\[0\] is not numeric.* got '1' \(str\) at \[0\]\[0\]",
    ),
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


def test_droid_state_row_and_reply():
    droid, joints = DROID(), [0.1 * k for k in range(7)]
    state = droid.encode_state(joints, 0.75)
    assert state.shape == (1, 1, 8) and state.dtype == torch.float32
    assert state[0, 0].tolist() == pytest.approx([*joints, 0.25])
    assert [droid.encode_state(joints, end)[0, 0, 7].item() for end in (0.0, 1.0)] == [1.0, 0.0]
    action = rows(32, 8)[None]
    reply = droid.decode_action(action)
    assert torch.equal(reply[..., :7], action[..., :7])
    assert torch.equal(reply[..., 7], 1 - action[..., 7])
    assert torch.equal(action, rows(32, 8)[None]), "the model's rows stay as they were"


def test_droid_actions_go_back_to_the_models_rows():
    """Commands that a policy gave come back bit for bit, through a request and its reply."""
    droid = DROID()
    for scale in (1e-9, 1e-3, 1.0, 10.0):
        model = torch.from_numpy(np.random.RandomState(0).normal(size=(1, 999, 8)) * scale).float()
        commands = droid.decode_action(model)
        assert torch.equal(droid.decode_action(droid.encode_action(commands)), commands)
        torch.testing.assert_close(droid.encode_action(commands), model, rtol=0, atol=1e-6)
        assert torch.equal(droid.encode_action(commands)[..., :7], model[..., :7])
    assert droid.encode_action(torch.tensor([[0.0] * 7 + [0.75]])).tolist() == [[0.0] * 7 + [0.25]]


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
    "gripper above 1": (
        lambda d: d.encode_state([0.0] * 7, 1.25),
        r"gripper of a state must lie in \[0, 1\], got 1.25",
    ),
    "gripper below 0": (lambda d: d.encode_state([0.0] * 7, -0.1), r"\[0, 1\], got -0.1"),
    "nine columns": (lambda d: d.encode_action(torch.zeros(32, 9)), "8 columns, got 9"),
    "ten columns": (lambda d: d.decode_action(torch.zeros(1, 32, 10)), "8 columns, got 10"),
}


@pytest.mark.parametrize(("call", "message"), BAD_DROID.values(), ids=BAD_DROID)
def test_bad_droid_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(DROID())
