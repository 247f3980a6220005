"""Reading observations: files, arrays, clips; and the mosaic of the DROID views."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from cosmos3_fast.processor import compose_droid_views
from cosmos3_fast.processor.images import fit_length, load_frames, read_image, read_video
from cosmos3_fast.processor.views import droid_mosaic

av = pytest.importorskip("av")


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def write_video(path, levels, height=32, width=48):
    """A clip whose frame k is the grey `levels[k]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in levels:
            grey = np.full((height, width, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


PICTURE = picture(5, 7)
SOURCES = {
    "pil": Image.fromarray(PICTURE),
    "array": PICTURE,
    "array with alpha": np.dstack([PICTURE, PICTURE[..., 0]]),
    "array with strides": np.ascontiguousarray(PICTURE[:, ::-1])[:, ::-1],
    "planes": PICTURE.transpose(2, 0, 1),
    "tensor": torch.from_numpy(PICTURE),
    "tensor planes": torch.from_numpy(PICTURE).permute(2, 0, 1),
    "floats in [0, 1]": PICTURE.astype(np.float32) / 255,
    "floats in [-1, 1]": torch.from_numpy(PICTURE).float() / 127.5 - 1,
    "list": [PICTURE],
    "clip": PICTURE[None],
    "clip of planes": PICTURE.transpose(2, 0, 1)[None],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_one_picture_in_any_form(source):
    frames = load_frames(source, 5)
    assert frames.dtype == torch.uint8 and frames.is_contiguous()
    assert np.array_equal(frames.numpy(), PICTURE[None])


@pytest.mark.parametrize("convert", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_image_files(tmp_path, suffix, convert):
    path = tmp_path / f"frame.{suffix}"
    Image.fromarray(PICTURE).save(path)
    assert np.array_equal(load_frames(convert(path), 1)[0].numpy(), PICTURE)
    assert np.array_equal(load_frames([path, path], 2)[1].numpy(), PICTURE)


def test_grey_and_palette_images_become_rgb(tmp_path):
    grey = Image.fromarray(PICTURE[..., 0])
    for image in (grey, grey.convert("P")):
        image.save(tmp_path / "image.png")
        frame = read_image(tmp_path / "image.png").numpy()
        assert np.array_equal(frame, np.repeat(PICTURE[..., :1], 3, axis=2))


ALL = [20, 90, 160, 230]


def test_videos_are_read_up_to_the_limit(tmp_path):
    path = write_video(tmp_path / "clip.mp4", ALL)
    for limit, expected in (
        (None, [20, 90, 160, 230]),
        (3, [20, 90, 160]),
        (9, [20, 90, 160, 230]),
    ):
        frames = read_video(path, limit)
        assert frames.shape == (len(expected), 32, 48, 3)
        assert frames.float().mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=3)
    assert len(load_frames(str(path), 2)) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_pictures_are_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"frame.{suffix}"
    Image.fromarray(PICTURE).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert (expected.shape == PICTURE.shape) == (orientation < 5)
        assert np.array_equal(load_frames(image, 1)[0].numpy(), expected)
    assert np.array_equal(read_image(path).numpy(), expected)


def test_metadata_that_pil_cannot_write_again_do_not_matter(tmp_path):
    """`ImageOps.exif_transpose` raises TypeError here."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    data = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x07")
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=data)
    assert np.array_equal(read_image(tmp_path / "a.png").numpy(), np.rot90(PICTURE, -1))


def test_exif_data_that_are_none_are_named(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=b"Exif\0\0no tiff header")
    with pytest.raises(ValueError, match=r"image from '.*a\.png': its EXIF data cannot be read"):
        read_image(tmp_path / "a.png")


DEEP = {  # mode -> file type, values
    "I;16": ("png", np.full((4, 6), 40000, np.uint16)),
    "I": ("tiff", np.full((4, 6), 70000, np.int32)),
    "F": ("tiff", np.full((4, 6), 0.5, np.float32)),
}


@pytest.mark.parametrize("mode", DEEP)
def test_pictures_of_more_than_8_bits_a_channel_are_refused(tmp_path, mode):
    """PIL would clip them at 255: white, or black for floats in [0, 1]."""
    suffix, values = DEEP[mode]
    image = Image.fromarray(values)
    assert image.mode == mode
    image.save(tmp_path / f"depth.{suffix}")
    said = f"image mode '{mode}' has more than 8 bits a channel"
    with pytest.raises(ValueError, match=rf"cannot read an image from .*depth\.{suffix}': {said}"):
        read_image(tmp_path / f"depth.{suffix}")
    with pytest.raises(ValueError, match=said):
        load_frames([image], 1)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_modes_of_8_bits_become_rgb_as_pil_has_them(mode):
    image = Image.fromarray(PICTURE).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_frames(image, 1)[0].numpy(), expected)


def test_alpha_is_dropped():
    alpha = Image.fromarray(np.dstack([PICTURE, PICTURE[..., 0]]))
    assert alpha.mode == "RGBA"
    assert np.array_equal(load_frames(alpha, 1)[0].numpy(), PICTURE)


def test_floats_down_to_zero_are_fractions():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(load_frames(levels / np.float32(255), 1).numpy(), levels[None])


def test_a_clip_in_memory_is_cut():
    clip = np.stack([PICTURE, picture(*PICTURE.shape[:2], 1), PICTURE])
    assert np.array_equal(load_frames(clip, 2).numpy(), clip[:2])


UNIT = PICTURE.astype(np.float32) / 255  # in [0, 1]
BRIGHT = UNIT / 2 + 0.5  # in [-1, 1], without a negative value
SIGNED = torch.from_numpy(UNIT * 2 - 1)
# floats -> what each frame is, of the float that 0.5 stands for
FLOATS = {
    "all in [0, 1]": ([UNIT, BRIGHT], [UNIT, BRIGHT]),
    "a bright frame first": ([BRIGHT, SIGNED], [BRIGHT / 2 + 0.5, UNIT]),
    "a bright frame last": ([SIGNED, BRIGHT], [UNIT, BRIGHT / 2 + 0.5]),
    "bytes between": ([BRIGHT, PICTURE, SIGNED], [BRIGHT / 2 + 0.5, UNIT, UNIT]),
    "alpha below 0": ([np.dstack([UNIT, -UNIT[..., 0]]), UNIT], [UNIT, UNIT]),
}


@pytest.mark.parametrize(("source", "truth"), FLOATS.values(), ids=FLOATS)
def test_the_floats_of_a_list_have_one_range(source, truth):
    """Frames that are not read decide, too."""
    want = np.stack([np.round(frame * 255) for frame in truth])
    assert np.abs(load_frames(source, 3).numpy() - want).max() <= 0.5
    assert np.abs(load_frames(source, 1).numpy() - want[:1]).max() <= 0.5
    if all(frame.shape[-1] == 3 and frame.dtype != np.uint8 for frame in map(np.asarray, source)):
        clip = np.stack([np.asarray(frame) for frame in source])
        assert torch.equal(load_frames(clip, 3), load_frames(source, 3))


def test_the_floats_of_three_views_have_one_range():
    views = [picture(360, 640, seed).astype(np.float32) / 255 for seed in (1, 2, 3)]
    views[1] = views[1] / 2 + 0.5
    want = compose_droid_views(*views).float()
    got = compose_droid_views(*(view * 2 - 1 for view in views)).float()
    assert (want - got).abs().max() <= 1


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_read_only_are_read_quietly():
    for source in (PICTURE.copy(), UNIT.copy()):
        source.flags.writeable = False
        assert np.array_equal(load_frames(source, 1)[0].numpy(), PICTURE)
        assert np.array_equal(load_frames([source], 1)[0].numpy(), PICTURE)


def test_lists_are_read_whole_and_cut():
    other = picture(5, 7, 1)
    assert np.array_equal(load_frames([PICTURE, other, other], 1).numpy(), PICTURE[None])
    with pytest.raises(ValueError, match=r"cannot read an image from 'no such file\.png'"):
        load_frames([PICTURE, PICTURE, "no such file.png"], 2)
    with pytest.raises(ValueError, match=r"one size, got .*\(5, 7\), \(9, 7\)"):
        load_frames([PICTURE, PICTURE, picture(9, 7)], 1)


def test_lists_hold_single_frames(tmp_path):
    for clip in (np.stack([PICTURE, PICTURE]), write_video(tmp_path / "clip.mp4", ALL)):
        with pytest.raises(ValueError, match=r"images\[1\] is a clip; a list must hold single"):
            load_frames([picture(32, 48), clip], 3)
    still = write_video(tmp_path / "still.mp4", [20])
    assert len(load_frames([still, picture(32, 48)], 3)) == 2


def test_short_clips_repeat_their_last_frame_and_long_ones_are_cut():
    frames = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 2, 2, 3)
    assert fit_length(frames, 5)[:, 0, 0, 0].tolist() == [0, 1, 2, 2, 2]
    assert fit_length(frames, 2)[:, 0, 0, 0].tolist() == [0, 1]
    assert fit_length(frames, 3).shape == frames.shape


def damaged(tmp_path, name):
    if name == "truncated.png":
        Image.fromarray(picture(64, 64)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    elif name == "cut.mp4":
        data = write_video(tmp_path / "whole.mp4", [10] * 5).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 3])
    elif name != "missing.png" and name != "missing.mp4":
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"not a picture" * 9)
    return tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "missing.png",
        "empty.png",
        "text.jpg",
        "truncated.png",
        "missing.mp4",
        "empty.mp4",
        "text.mp4",
        "cut.mp4",
    ],
)
def test_unreadable_files_are_named(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"(cannot read an? (image|video) from|empty video:) '.*{name}'"
    ):
        load_frames(damaged(tmp_path, name), 3)


def test_a_picture_too_large_to_be_honest_is_named(tmp_path, monkeypatch):
    Image.fromarray(PICTURE).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(ValueError, match=r"cannot read an image from .*bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_a_video_without_a_frame_is_named(tmp_path):
    """A container that holds sound alone."""
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"empty video: '.*sound\.mp4' holds no frame"):
        load_frames(path, 3)


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    plain_import = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("no av")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ImportError, match=r"pip install cosmos3-fast\[video\]"):
        read_video(tmp_path / "clip.mp4")


BAD = {
    "empty list": ([], "empty list"),
    "none": (None, "got NoneType"),
    "number": (3, "got int"),
    "two sizes": ([picture(4, 6), picture(4, 5)], r"one size, got .*\(4, 5\), \(4, 6\)"),
    "two dimensions": (PICTURE[..., 0], r"got \[5, 7\]"),
    "five dimensions": (PICTURE[None, None], r"got \[1, 1, 5, 7, 3\]"),
    "no pixel": (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
    "two colours": (np.zeros((5, 7, 2), np.uint8), r"3 colours, got shape \[5, 7, 2\]"),
    "integers": (PICTURE.astype(np.int64), "uint8 or floating point, got torch.int64"),
    "objects": (PICTURE.astype(object), "uint8 or floating point, got object"),
    "one frame to 255": ([UNIT, UNIT * 255], "must lie in .* got 1.0 to 254.0"),
    "floats to 255": (PICTURE.astype(np.float32), "must lie in .* got 1.0 to 254.0"),
    "nan": (np.full((4, 4, 3), np.nan), "must lie in .* got nan"),
}


@pytest.mark.parametrize(("source", "message"), BAD.values(), ids=BAD)
def test_bad_observations_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_frames(source, 5)


def test_droid_views_at_the_robots_own_sizes():
    """Halving by bilinear interpolation without antialias averages 2x2 pixels, truncated."""
    wrist, left, right = (picture(360, 640, seed) for seed in (1, 2, 3))
    mosaic = compose_droid_views(wrist, left, right)
    assert mosaic.shape == (540, 640, 3) and mosaic.dtype == torch.uint8
    assert np.array_equal(mosaic[:360].numpy(), wrist)
    for view, columns in ((left, slice(0, 320)), (right, slice(320, 640))):
        blocks = view.reshape(180, 2, 320, 2, 3).astype(np.int64).sum((1, 3)) // 4
        assert np.array_equal(mosaic[360:, columns].numpy(), blocks)


def test_droid_views_of_other_sizes_are_stretched():
    mosaic = compose_droid_views(
        np.full((180, 320, 3), 10, np.uint8), picture(7, 9) * 0 + 20, picture(90, 160) * 0 + 30
    )
    assert mosaic.shape == (540, 640, 3)
    # Truncation may lose one level where the weights' float sum is just below 1, as in CF.
    for part, level in ((mosaic[:358], 10), (mosaic[362:, :318], 20), (mosaic[362:, 322:], 30)):
        assert {level} <= set(part.unique().tolist()) <= {level - 1, level}


def test_a_mosaic_made_elsewhere_is_stretched_to_the_policys_size():
    mosaic = picture(540, 640)
    assert np.array_equal(droid_mosaic(mosaic).numpy(), mosaic)
    small = np.repeat(np.repeat(np.eye(2, dtype=np.uint8)[..., None] * 200, 135, 0), 160, 1)
    stretched = droid_mosaic(np.repeat(small, 3, 2))
    assert stretched.shape == (540, 640, 3)
    assert stretched[0, 0].tolist() == [200] * 3 and stretched[0, -1].tolist() == [0] * 3


def test_droid_views_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match=r"even width, got \[4, 5\]"):
        compose_droid_views(picture(4, 5), picture(4, 4), picture(4, 4))


def test_an_array_is_copied_to_the_host_once(monkeypatch):
    """One that torch cannot share: read-only; a camera's picture is up to a megabyte a copy."""
    copied, require = [], np.require

    def counted(array, **arguments):
        copied.append(array.shape)
        return require(array, **arguments)

    monkeypatch.setattr(np, "require", counted)
    views = [np.full((4, 6, 3), level, np.float32) for level in (-1, 0, 1)]
    for view in views:
        view.setflags(write=False)
    assert load_frames(views, 3).flatten(1).unique(dim=1).flatten().tolist() == [0, 128, 255]
    compose_droid_views(*views)
    assert copied == [(4, 6, 3)] * 6
