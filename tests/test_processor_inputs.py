"""What the processor refuses by type, and what it says of frames and rows that do not fit."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.processor import Cosmos3PolicyProcessor
from cosmos3_fast.processor.arguments import ARGUMENTS

av = pytest.importorskip("av")


def clip(count, height=64, width=80):
    draw = np.random.RandomState(0)
    return [draw.randint(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(count)]


def observe(**changes):
    return {"images": clip(1)[0], "task": "Pick up the cup", **changes}


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# argument -> what it is not, the whole message
BAD_TYPES = {
    "tokenizer_name_or_path": (None, "a path, got None (NoneType)"),
    "height": ("480", "an integer, got '480' (str)"),
    "width": (832.0, "an integer, got 832.0 (float)"),
    "num_frames": ("17", "an integer or None, got '17' (str)"),
    "action_chunk_size": ("16", "an integer, got '16' (str)"),
    "action_dim": (64.7, "a positive integer, got 64.7 (float)"),
    "negative_prompt": (None, "text, got None (NoneType)"),
    "fps": (None, "a finite number, got None (NoneType)"),
    "image_size": (480.0, "an integer or None, got 480.0 (float)"),
    "append_metadata": ("no", "True or False, got 'no' (str)"),
    "view_point": (["ego_view"], "text or None, got ['ego_view'] (list)"),
    "view_description": (3, "text or None, got 3 (int)"),
    "action_stats_path": (3, "a path or None, got 3 (int)"),
    "device": ("foo", "cpu, cuda or cuda:N, got 'foo' (str)"),
    "params_dtype": (
        "bfloat16",
        "torch.bfloat16, torch.float16 or torch.float32, got 'bfloat16' (str)",
    ),
    "allow_width": (1, "True or False, got 1 (int)"),
}


@pytest.mark.parametrize("name", BAD_TYPES)
def test_an_argument_of_another_type_is_named_with_its_type(processor_of, name):
    value, message = BAD_TYPES[name]
    with pytest.raises(ValueError) as caught:
        processor_of(**{name: value})
    assert str(caught.value) == f"{name} must be {message}"


MORE = {
    "boolean height": ({"height": True}, r"height must be an integer, got True \(bool\)"),
    "half a chunk": ({"action_chunk_size": 16.5}, r"must be an integer, got 16.5 \(float\)"),
    "no action_dim": ({"action_dim": 0}, r"action_dim must be a positive integer, got 0 \(int\)"),
    "fps as text": ({"fps": "24"}, r"fps must be a finite number, got '24' \(str\)"),
    "nan fps": ({"fps": float("nan")}, "fps must be a finite number, got nan"),
    "fps that no float holds": ({"fps": 10**400}, "fps must be a finite number"),
    "a list of tiers": ({"image_size": [480]}, r"image_size must be .* \[480\] \(list\)"),
    "int8": ({"params_dtype": torch.int8}, r"params_dtype must be .* got torch.int8 \(dtype\)"),
    "float64": ({"params_dtype": torch.float64}, "params_dtype must be .* got torch.float64"),
    "device number": ({"device": 0}, r"device must be .* got 0 \(int\)"),
    "device none": ({"device": None}, r"device must be .* got None \(NoneType\)"),
    "other device": ({"device": torch.device("meta")}, "device must be cpu, cuda or cuda:N"),
    "normalization": (
        {"action_normalization": "zzz"},
        r"action_normalization 'zzz'; expected one of \['meanstd', 'minmax', ",
    ),
    "normalizations": ({"action_normalization": ["minmax"]}, "action_normalization .*; expected"),
    "frame index": ({"cond_frame_indexes": 3}, "cond_frame_indexes must be integers, got 3"),
    "frame index as text": ({"cond_frame_indexes": "01"}, "must be integers, got '01'"),
    "width as text": ({"raw_action_dim": "10"}, r"positive integer, got '10' \(str\)"),
    "mode": ({"mode": None}, "unknown mode None"),
    "no tokenizer": ({"tokenizer_name_or_path": ""}, r"must be a path, got '' \(str\)"),
    "no statistics": ({"action_stats_path": ""}, r"must be a path or None, got '' \(str\)"),
    "half a character": (
        {"negative_prompt": "blurry \ud83d"},
        r"negative_prompt must be Unicode text .*, got '\\ud83d' at character 7",
    ),
    "a byte of another encoding": (
        {"view_description": "\udcff", "prompt_format": "plain"},
        r"view_description must be Unicode text .*, got '\\udcff' at character 0",
    ),
    "format": ({"prompt_format": None}, "prompt_format None; expected"),
    "domain": ({"domain_name": None}, "unknown domain None"),
}


@pytest.mark.parametrize(("changes", "message"), MORE.values(), ids=MORE)
def test_bad_types_are_refused(processor_of, changes, message):
    with pytest.raises(ValueError, match=message):
        processor_of(**changes)


def test_no_argument_is_left_unchecked():
    elsewhere = {"mode", "domain_name", "raw_action_dim", "prompt_format", "cond_frame_indexes"}
    elsewhere |= {"action_normalization"}
    names = set(inspect.signature(Cosmos3PolicyProcessor).parameters)
    assert names == set(ARGUMENTS) | elsewhere
    assert set(BAD_TYPES) == set(ARGUMENTS)


def test_numpys_numbers_and_every_form_of_a_path_are_taken(processor_of, tokenizer_folder):
    processor_of(
        tokenizer_name_or_path=str(tokenizer_folder), height=np.int64(64), width=np.int32(96),
        image_size=None, action_chunk_size=np.int64(4), num_frames=np.int64(5),
        fps=np.float32(15), action_dim=np.int16(64), append_metadata=np.True_,
        device=torch.device("cpu"), params_dtype=torch.float16, allow_width=False,
    )  # fmt: skip
    assert processor_of(image_size=np.int64(256), fps=15).fps == 15.0
    assert isinstance(processor_of().tokenizer.path, str)


def write_video(path, count):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(count):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# mode, cond_frame_indexes, frames given, frames read (chunk 8: a clip has 9)
SURPLUS = {
    "policy": ("policy", None, 3, 1),
    "policy, two latents": ("policy", (0, 1), 9, 5),
    "forward dynamics": ("forward_dynamics", None, 2, 1),
    "inverse dynamics": ("inverse_dynamics", None, 10, 9),
}


@pytest.mark.parametrize(("mode", "indexes", "given", "read"), SURPLUS.values(), ids=SURPLUS)
@pytest.mark.parametrize("form", ["list", "array", "tensor", "video"])
def test_frames_that_are_left_over_are_said(
    processor_of, caplog, tmp_path, form, mode, indexes, given, read
):
    processor = processor_of(mode=mode, cond_frame_indexes=indexes, action_chunk_size=8)
    frames = clip(given)
    images = {
        "list": lambda: frames,
        "array": lambda: np.stack(frames),
        "tensor": lambda: torch.from_numpy(np.stack(frames)),
        "video": lambda: write_video(tmp_path / "clip.mp4", given),
    }[form]()
    processed = processor.preprocess(observe(images=images, cond_action=[[0.5] * 10] * 8))
    assert processed.pixel_values.shape[2] == read
    hint = " (a clip; three cameras' views go through compose_droid_views)" if given == 3 else ""
    what = f"{given} frames{hint}"
    what = f"{given} frames of '{images}'" if form == "video" else what
    warning = f"mode {mode} reads {read} of {what}; the others are dropped"
    assert [text for text in said(caplog) if "frames" in text] == [warning]


def test_a_clip_whose_header_counts_no_frame_is_said_to_hold_more(processor_of, caplog, tmp_path):
    """MPEG's program streams do not say how many frames follow."""
    clip = write_video(tmp_path / "clip.mpg", 3)
    clip.rename(tmp_path / "clip.avi")
    processor_of().preprocess(observe(images=tmp_path / "clip.avi"))
    (text,) = said(caplog)
    want = f"mode policy reads 1 of more than 1 frames of '{tmp_path}/clip.avi'; the others are"
    assert text.startswith(want)


@pytest.mark.parametrize("form", ["list", "video"])
def test_as_many_frames_as_are_read_are_not_worth_a_word(processor_of, caplog, tmp_path, form):
    processor = processor_of(mode="inverse_dynamics", action_chunk_size=8)
    images = clip(9) if form == "list" else write_video(tmp_path / "clip.mp4", 9)
    processor.preprocess(observe(images=images))
    assert said(caplog) == []


@pytest.mark.parametrize("mode", ["policy", "forward_dynamics", "inverse_dynamics"])
def test_frames_of_another_size_are_refused_also_where_they_would_not_be_read(processor_of, mode):
    images = [*clip(9), *clip(1, 32, 48)]
    processor = processor_of(mode=mode, action_chunk_size=8)
    with pytest.raises(ValueError, match=r"one size, got \(H, W\) \[\(32, 48\), \(64, 80\)\]"):
        processor.preprocess(observe(images=images, cond_action=[[0.5] * 10] * 8))


@pytest.mark.parametrize(
    ("count", "warning"),
    [
        (3, "cond_action has 3 of 8 rows; the last is repeated"),
        (8, None),
        (9, "cond_action has 9 rows; the first 8 are used"),
    ],
)
def test_rows_that_do_not_fit_the_chunk_are_said(processor_of, caplog, count, warning):
    processor = processor_of(mode="forward_dynamics", action_chunk_size=8)
    processor.preprocess(observe(cond_action=[[0.5] * 10] * count))
    assert said(caplog) == ([] if warning is None else [warning])


@pytest.mark.parametrize("key", ["task", "prompt"])
@pytest.mark.parametrize("prompt_format", ["plain", "json"])
def test_an_instruction_that_is_no_unicode_is_refused(processor_of, prompt_format, key):
    """JSON would escape it, and the model read the escape."""
    inputs = {"images": clip(1)[0], key: "caf\udce9"}
    said = r"'task' must be Unicode text .* '\\udce9' at character 3"
    with pytest.raises(ValueError, match=said):
        processor_of(prompt_format=prompt_format).preprocess(inputs)


def test_a_domain_may_be_an_id_in_text(processor_of):
    processor = processor_of(domain_name="7", raw_action_dim=12)
    processed = processor.preprocess(observe())
    assert (processed.domain_id, processed.raw_action_dim) == (7, 12)
    assert processor.preprocess(observe(domain_id="8")).domain_id == 8


def test_a_picture_file_of_16_bits_is_named(processor_of, tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.full((64, 80), 40000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"depth\.png': image mode 'I;16' has more than 8 bits"):
        processor_of().preprocess(observe(images=Path(path)))


BAD_RESULTS = {
    "array": (np.zeros((1, 16, 10)), "or an action tensor, got ndarray"),
    "list": ([[1.0]], "or an action tensor, got list"),
    "none": (None, "or an action tensor, got NoneType"),
    "nothing": ({}, r"must hold action, pixels or video; it holds \[\]"),
    "other names": ({"actions": torch.zeros(1)}, r"it holds \['actions'\]"),
    "array inside": ({"action": np.zeros((1, 16, 10))}, "action must be a tensor, got ndarray"),
    "no video": ({"action": torch.zeros(1, 1, 1), "video": None}, "video must be a .* NoneType"),
}


@pytest.mark.parametrize(("output", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_what_is_no_result_is_refused(processor_of, output, message):
    with pytest.raises(ValueError, match=message):
        processor_of().postprocess(output)


@pytest.mark.parametrize("width", ["10", 10.0, True])
def test_a_width_that_is_no_integer_is_refused(processor_of, width):
    with pytest.raises(ValueError, match=r"must be an integer in \[1, 64\], .* got "):
        processor_of().postprocess(torch.zeros(1, 4, 64), raw_action_dim=width)


@pytest.mark.parametrize("inputs", [None, np.zeros((64, 80, 3), np.uint8), "a.png"])
def test_inputs_that_are_no_mapping_are_refused(processor_of, inputs):
    with pytest.raises(ValueError, match="needs a mapping of inputs, got "):
        processor_of().preprocess(inputs)


@pytest.mark.parametrize(
    ("own", "asked", "frames"),
    [("policy", "inverse_dynamics", 9), ("inverse_dynamics", "policy", 1)],
)
def test_a_mode_given_with_the_inputs_decides_how_many_frames_are_read(
    processor_of, own, asked, frames
):
    got, want = (
        processor_of(mode=mode, action_chunk_size=8).preprocess(observe(images=clip(9), mode=asked))
        for mode in (own, asked)
    )
    assert (got.mode, got.pixel_values.shape[2]) == (asked, frames)
    assert torch.equal(got.pixel_values, want.pixel_values)


def test_an_input_that_is_none_is_not_given(processor_of):
    inputs = observe(task=None, prompt="Go", domain_name=None, domain_id=7, action=None)
    processed = processor_of(raw_action_dim=10).preprocess(inputs)
    assert processed.caption.startswith("Go. ") and processed.domain_id == 7
