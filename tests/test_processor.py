"""The drop-in processor as a whole: fields, shapes, modes, overrides and bad input."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.processor import (
    DROID,
    Cosmos3PolicyProcessedInputs,
    Cosmos3PolicyProcessor,
    compose_droid_views,
)
from cosmos3_fast.processor.canvas import Canvas
from cosmos3_fast.request import Cosmos3ActionRequest, pixel_to_latent_shape
from cosmos3_fast.tokenizer import PromptTokenizer


def picture(height=64, width=80, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def clip(count, height=64, width=80):
    return [picture(height, width, seed) for seed in range(count)]


def observe(**changes):
    return {"images": picture(), "task": "Pick up the cup", **changes}


def test_every_field_of_the_seed_examples_request(tokenizer_folder, tmp_path):
    """The example's own arguments, an image file, and its Cosmos3ActionRequest call."""
    image = picture(360, 640)
    Image.fromarray(image).save(tmp_path / "observation.png")
    processor = Cosmos3PolicyProcessor(
        tokenizer_name_or_path=str(tokenizer_folder),
        height=480,
        width=832,
        num_frames=17,
        mode="policy",
        domain_name="droid_lerobot",
        action_chunk_size=16,
        fps=24.0,
        image_size=480,
        prompt_format="json",
        view_point="ego_view",
        cond_frame_indexes=(0,),
        device="cpu",
        params_dtype=torch.bfloat16,
    )
    processed = processor.preprocess(
        {"images": str(tmp_path / "observation.png"), "task": "robot picks up the cup"}
    )
    caption = (
        '{"cinematography": {"framing": "This video is captured from a first-person perspective '
        'looking at the scene."}, "actions": [{"time": "0:00-0:01", "description": "robot picks '
        'up the cup."}], "duration": "0s", "fps": 24.0, "resolution": {"H": 480, "W": 832}, '
        '"aspect_ratio": "16,9"}'
    )
    encode = PromptTokenizer(tokenizer_folder).encode
    assert processed.caption == caption
    assert processed.text_ids.tolist() == [encode(caption)]
    assert processed.neg_text_ids.tolist() == [encode("")]
    for ids, mask in (
        (processed.text_ids, processed.text_mask),
        (processed.neg_text_ids, processed.neg_text_mask),
    ):
        assert ids.dtype == mask.dtype == torch.int64 and torch.equal(mask, torch.ones_like(ids))
    assert processed.pixel_values.dtype == torch.bfloat16
    expected = np.pad(image, ((0, 120), (0, 192), (0, 0)), mode="reflect")
    expected = torch.from_numpy(expected).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    assert torch.equal(processed.pixel_values, expected.bfloat16())
    assert processed.video_shape == (17, 360, 640)
    assert pixel_to_latent_shape(*processed.video_shape) == (5, 22, 40)
    assert (processed.mode, processed.domain_id, processed.raw_action_dim) == ("policy", 8, 10)
    assert (processed.action_chunk, processed.fps) == (16, 24.0)
    assert processed.cond_frame_indexes == (0,) and processed.cond_action is None
    names = {field.name for field in dataclasses.fields(Cosmos3ActionRequest)}
    assert {f.name for f in dataclasses.fields(processed)} - names == {"pixel_values", "caption"}


def test_defaults_are_phyais_except_the_frames(tokenizer_folder):
    processor = Cosmos3PolicyProcessor(tokenizer_name_or_path=tokenizer_folder)
    processed = processor.preprocess(observe())
    assert isinstance(processed, Cosmos3PolicyProcessedInputs)
    assert processed.pixel_values.shape == (1, 3, 1, 480, 832)
    assert processed.pixel_values.dtype == torch.bfloat16
    assert processed.video_shape == (17, 64, 80)
    assert (processed.domain_id, processed.raw_action_dim) == (15, 29)
    assert processed.cond_frame_indexes is None
    assert processed.caption == (
        "Pick up the cup. This video is captured from a first-person perspective looking at the "
        "scene. The video is 0.0 seconds long and is of 24 FPS. This video is of 480x832 "
        "resolution."
    )


def test_the_droid_recipe(tokenizer_folder):
    droid = DROID()
    processor = Cosmos3PolicyProcessor(
        tokenizer_name_or_path=tokenizer_folder, prompt_format="json", **droid.processor_arguments()
    )
    views = compose_droid_views(picture(360, 640), picture(360, 640, 1), picture(360, 640, 2))
    processed = processor.preprocess({"images": views, "task": "put the block in the bowl"})
    assert processed.pixel_values.shape == (1, 3, 1, 544, 736)
    assert pixel_to_latent_shape(*processed.video_shape) == (9, 33, 40)
    assert (processed.domain_id, processed.raw_action_dim, processed.action_chunk) == (8, 8, 32)
    caption = json.loads(processed.caption)
    assert caption["cinematography"]["framing"].endswith("sides, with the robot visible.")
    assert (caption["actions"][0]["time"], caption["duration"]) == ("0:00-0:02", "2s")


# mode, cond_frame_indexes, given frames -> source frame of each kept frame (chunk 8: 9 frames)
KEPT = {
    "policy image": ("policy", None, 1, [0]),
    "policy clip": ("policy", None, 9, [0]),
    "policy two latents": ("policy", (0, 1), 9, [0, 1, 2, 3, 4]),
    "policy two latents, short": ("policy", (1, 0), 3, [0, 1, 2, 2, 2]),
    "policy nothing clean": ("policy", (), 1, [0]),
    "forward image": ("forward_dynamics", None, 1, [0]),
    "inverse whole": ("inverse_dynamics", None, 9, [*range(9)]),
    "inverse long": ("inverse_dynamics", None, 12, [*range(9)]),
    "inverse short": ("inverse_dynamics", None, 6, [0, 1, 2, 3, 4, 5, 5, 5, 5]),
    "inverse two latents": ("inverse_dynamics", (0, 1), 9, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("mode", "indexes", "given", "kept"), KEPT.values(), ids=KEPT)
def test_only_the_frames_that_clean_latents_need_are_kept(processor_of, mode, indexes, given, kept):
    processor = processor_of(mode=mode, cond_frame_indexes=indexes, action_chunk_size=8)
    frames = clip(given)
    processed = processor.preprocess(observe(images=frames, cond_action=[[0.5] * 10]))
    whole, content = Canvas(0, 0, 256)(torch.from_numpy(np.stack([frames[k] for k in kept])))
    expected = whole.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(processed.pixel_values, expected)
    assert processed.video_shape == (9, *content)
    assert processed.cond_frame_indexes == indexes
    assert (processed.cond_action is None) == (mode != "forward_dynamics")


@pytest.mark.parametrize(
    ("num_frames", "frames", "logged"),
    [(None, 33, False), (33, 33, False), (17, 33, True), (1, 1, False)],
)
def test_the_video_spans_the_chunk_and_one(processor_of, caplog, num_frames, frames, logged):
    with caplog.at_level(logging.INFO):
        processor = processor_of(num_frames=num_frames, action_chunk_size=32, prompt_format="json")
    assert ("num_frames 17 is ignored" in caplog.text and "33 frames" in caplog.text) == logged
    processed = processor.preprocess(observe())
    assert processed.video_shape[0] == frames
    assert json.loads(processed.caption)["duration"] == "1s", "captions always speak of chunk + 1"


def test_one_frame_inverse_dynamics_keeps_one_frame(processor_of):
    processed = processor_of(num_frames=1, mode="inverse_dynamics").preprocess(
        observe(images=clip(5))
    )
    assert processed.pixel_values.shape[2] == 1
    assert pixel_to_latent_shape(*processed.video_shape)[0] == 1


@pytest.mark.parametrize("size", [(5, 300), (300, 5), (17, 33), (15, 15)], ids=str)
def test_the_cropped_latent_never_exceeds_the_canvas(processor_of, size):
    processed = processor_of().preprocess(observe(images=picture(*size)))
    _, h, w = pixel_to_latent_shape(*processed.video_shape)
    height, width = processed.pixel_values.shape[3:]
    assert 1 <= h <= height // 16 and 1 <= w <= width // 16


@pytest.mark.parametrize("key", ["cond_action", "action"])
def test_forward_dynamics_actions(processor_of, key):
    rows = torch.arange(30.0).reshape(3, 10)
    processed = processor_of(mode="forward_dynamics", action_chunk_size=4).preprocess(
        observe(**{key: rows})
    )
    assert processed.cond_action.shape == (1, 4, 64)
    assert processed.cond_action.dtype == torch.float32
    assert torch.equal(processed.cond_action[0, :, :10], rows[[0, 1, 2, 2]])
    assert not processed.cond_action[..., 10:].any()


def test_actions_in_other_modes_are_ignored_with_a_log_line(processor_of, caplog):
    assert processor_of().preprocess(observe(cond_action=[[1.0] * 10])).cond_action is None
    assert "mode policy does not use cond_action" in caplog.text


def test_one_call_may_change_domain_and_mode(processor_of):
    processor = processor_of(action_chunk_size=4)
    changed = processor.preprocess(
        observe(domain_name="av", mode="forward_dynamics", cond_action=[[1.0] * 9])
    )
    assert (changed.domain_id, changed.raw_action_dim) == (1, 9)
    assert changed.mode == "forward_dynamics"
    assert processor.preprocess(observe(domain_id="pusht")).raw_action_dim == 2
    again = processor.preprocess(observe())
    assert (again.domain_id, again.raw_action_dim, again.mode) == (6, 10, "policy")


def test_prompt_is_a_synonym_of_task_and_the_negative_prompt_stays_bare(processor_of):
    processor = processor_of(negative_prompt="blurry")
    by_prompt = processor.preprocess({"images": picture(), "prompt": "Pick up the cup"})
    by_list = processor.preprocess(observe(task=["Pick up the cup"]))
    assert by_prompt.caption == by_list.caption
    assert torch.equal(by_prompt.text_ids, by_list.text_ids)
    assert by_prompt.neg_text_ids.tolist() == [processor.tokenizer.encode("blurry")]


def test_typed_control_tokens_change_no_other_token(processor_of):
    processor = processor_of(append_metadata=False)
    typed = processor.preprocess(observe(task="<|im_end|><|vision_start|>")).text_ids[0].tolist()
    control = set(range(582, 600))
    assert [i for i in typed if i in control] == [
        i for i in processor.tokenizer.encode("") if i in control
    ]


def test_two_calls_give_the_same_bits(processor_of):
    processor = processor_of(cond_frame_indexes=(0, 1))
    first, other = (processor.preprocess(observe(images=clip(5, 300, 400))) for _ in range(2))
    assert torch.equal(first.pixel_values, other.pixel_values)
    assert torch.equal(first.text_ids, other.text_ids)


def test_postprocess_keeps_the_results_own_width_and_passes_the_video_through(processor_of):
    """The engine's actions are as wide as their request asked, not as this processor's domain."""
    action = torch.arange(2.0 * 29).reshape(1, 2, 29)
    result = {"action": action, "video": torch.ones(1, 48, 1, 2, 2), "pixels": torch.zeros(1)}
    processor = processor_of()
    assert processor.raw_action_dim == 10
    output = processor.postprocess({**result, "timings": {}})
    assert sorted(output) == ["action", "pixels", "video"]
    assert torch.equal(output["action"], action)
    assert torch.equal(output["video"], result["video"])
    assert torch.equal(processor.postprocess(action[..., :8])["action"], action[..., :8])
    assert processor.postprocess({"video": action}).keys() == {"video"}


def test_postprocess_cuts_padded_actions_to_the_width_it_is_told(processor_of):
    action = torch.arange(128.0).reshape(1, 2, 64)
    assert torch.equal(
        processor_of().postprocess(action, raw_action_dim=10)["action"], action[..., :10]
    )
    for width in (0, 65):
        with pytest.raises(ValueError, match=rf"an integer in \[1, 64\], .* got {width}"):
            processor_of().postprocess(action, raw_action_dim=width)


def test_postprocess_returns_the_robots_units(processor_of, tmp_path):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"global": {"mean": [1.0, 2.0], "std": [2.0, 4.0]}}))
    processor = processor_of(action_stats_path=path, action_normalization="meanstd")
    action = torch.full((1, 2, 10), 0.5, dtype=torch.bfloat16)
    output = processor.postprocess({"action": action})["action"]
    assert output.dtype == torch.float32
    assert output.tolist() == [[[2.0, 4.0], [2.0, 4.0]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_postprocess_refuses_actions_that_are_not_finite(processor_of, value):
    action = torch.zeros(1, 2, 10)
    action[0, 1, 9] = value
    with pytest.raises(ValueError, match="not finite"):
        processor_of().postprocess({"action": action})


def test_numpy_integers_are_integers(processor_of):
    processor = processor_of(raw_action_dim=np.int64(10), cond_frame_indexes=np.array([0, 1]))
    assert (processor.raw_action_dim, processor.cond_frame_indexes) == (10, (0, 1))
    assert processor.preprocess(observe(domain_id=np.int32(8))).domain_id == 8


BAD_ARGUMENTS = {
    "mode": ({"mode": "wam"}, "unknown mode 'wam'.*'inverse_dynamics'"),
    "domain": ({"domain_name": "umbrella"}, "unknown domain 'umbrella'"),
    "domain without width": ({"domain_name": "libero"}, "give raw_action_dim"),
    "width": ({"raw_action_dim": 9}, r"raw_action_dim 9 differs from \[10\]"),
    "width over action_dim": (
        {"raw_action_dim": 65, "allow_width": True},
        "raw_action_dim 65 exceeds action_dim 64",
    ),
    "chunk of 6": ({"action_chunk_size": 6}, "1 or a positive multiple of 4, got 6"),
    "chunk of 0": ({"action_chunk_size": 0}, "1 or a positive multiple of 4, got 0"),
    "tier": ({"image_size": 500}, "image_size 500 is no resolution tier"),
    "canvas": ({"image_size": None, "height": 470}, "canvas 470x832"),
    "format": ({"prompt_format": "xml"}, "prompt_format 'xml'"),
    "view": ({"view_point": "front"}, "view_point 'front'"),
    "fps": ({"fps": -1}, "fps must be positive and finite, got -1.0"),
    "frame index": ({"cond_frame_indexes": (0, 5)}, r"\[0, 5\] out of range: 17 frames have 5"),
    "negative index": ({"cond_frame_indexes": (-1,)}, r"\[-1\] out of range"),
    "half an index": ({"cond_frame_indexes": (0.5,)}, r"must be integers, got \(0.5,\)"),
    "index of one frame": (
        {"cond_frame_indexes": (1,), "num_frames": 1},
        r"\[1\] out of range: 1 frames have 1 latent",
    ),
    "stats": ({"action_stats_path": "gone.json"}, "cannot read action stats from 'gone.json'"),
    "tokenizer": ({"tokenizer_name_or_path": "gone"}, "no tokenizer folder at 'gone'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused(processor_of, changes, message):
    with pytest.raises(ValueError, match=message):
        processor_of(**changes)


NAN = float("nan")
BAD_INPUTS = {
    "no images": ({"images": None}, r"needs 'images'; the inputs hold \['images', 'task'\]"),
    "no frames": ({"images": []}, "empty list"),
    "unreadable image": ({"images": "gone.png"}, "cannot read an image from 'gone.png'"),
    "unreadable video": ({"images": "gone.mp4"}, "cannot read a video from 'gone.mp4'"),
    "no task": ({"task": None}, "must be an instruction that is not empty, got None"),
    "empty prompt": ({"task": " \n"}, "must be an instruction that is not empty, got ' "),
    "two tasks": ({"task": ["a", "b"]}, "batch size must be 1, got 2 tasks"),
    "task of bytes": ({"task": b"go"}, "must be an instruction that is not empty, got b'go'"),
    "mode": ({"mode": "plan"}, "unknown mode 'plan'"),
    "domain": ({"domain_name": "umbrella"}, "unknown domain 'umbrella'"),
    "id without width": ({"domain_id": 8}, "domain 8 has no fixed action width"),
    "no actions": ({"mode": "forward_dynamics"}, "needs cond_action with 10 columns"),
    "nan action": (
        {"mode": "forward_dynamics", "cond_action": [[NAN] * 10]},
        "10 values that are not finite",
    ),
    "ragged actions": (
        {"mode": "forward_dynamics", "cond_action": [[1.0] * 10, [1.0]]},
        "row 0 has 10 values, row 1 has 1",
    ),
    "wide actions": (
        {"mode": "forward_dynamics", "cond_action": [[1.0] * 11]},
        "11 columns, more than raw_action_dim 10",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_and_leave_the_processor_usable(processor_of, changes, message):
    processor = processor_of()
    before = processor.preprocess(observe())
    with pytest.raises(ValueError, match=message):
        processor.preprocess(observe(**changes))
    after = processor.preprocess(observe())
    assert torch.equal(before.text_ids, after.text_ids)
    assert torch.equal(before.pixel_values, after.pixel_values)
