"""Clips are shown as players show them: by the display matrix of their track."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from engine_fixtures import checkpoint

from cosmos3_fast.cli import main
from cosmos3_fast.processor.images import load_frames, read_video

av = pytest.importorskip("av")

FIXED = 1 << 16
HEIGHT, WIDTH = 32, 48
CORNERS = np.array([[20, 90], [160, 230]], np.uint8)  # grey of the quarters
# name -> (a, b, c, d) of the matrix: (x, y) is shown at (a x + c y, b x + d y)
MATRICES = {
    "upright": (1, 0, 0, 1),
    "a quarter clockwise": (0, 1, -1, 0),
    "a quarter counterclockwise": (0, -1, 1, 0),
    "upside down": (-1, 0, 0, -1),
    "mirrored": (-1, 0, 0, 1),
    "mirrored upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def write_clip(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Two frames of four grey quarters, with that matrix in the track's header."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        grey = CORNERS.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.dstack([grey] * 3), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = path.read_bytes()
    a, b, c, d = (round(value * FIXED) for value in matrix)
    rows, unity = (
        struct.pack(">9i", *nine)
        for nine in (
            (a, b, 0, c, d, 0, 0, 0, 1 << 30),
            (FIXED, 0, 0, 0, FIXED, 0, 0, 0, 1 << 30),
        )
    )
    place = data.index(unity, data.index(b"tkhd"))
    path.write_bytes(data[:place] + rows + data[place + len(rows) :])
    return path


def shown(matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The grey quarters after each centre went where the matrix takes it."""
    a, b, c, d = matrix
    found = np.zeros((2, 2), np.uint8)
    for row, y in enumerate((-1, 1)):
        for column, x in enumerate((-1, 1)):
            found[(b * x + d * y + 1) // 2, (a * x + c * y + 1) // 2] = CORNERS[row, column]
    return found


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_a_clip_is_turned_as_its_matrix_says(tmp_path, matrix):
    path = write_clip(tmp_path / "clip.mp4", matrix)
    for frames in (read_video(path), load_frames(path, 2)):
        upright = bool(matrix[0])
        assert tuple(frames.shape) == (2, *((HEIGHT, WIDTH) if upright else (WIDTH, HEIGHT)), 3)
        height, width = frames.shape[1:3]
        quarters = frames.numpy().reshape(2, 2, height // 2, 2, width // 2, 3)
        middle = quarters[:, :, 4:-4, :, 4:-4].astype(int)
        want = shown(matrix)[None, :, None, :, None, None].astype(int)
        assert np.abs(middle - want).max() <= 6


def test_a_clip_that_a_phone_wrote_upright_is_portrait(tmp_path):
    """-90 degrees of PyAV is a quarter clockwise: the lower left corner comes up."""
    path = write_clip(tmp_path / "clip.mp4", MATRICES["a quarter clockwise"])
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90
    first = read_video(path, 1)[0, :, :, 0].int()
    assert [int(first[6, 6]), int(first[6, -6])] == pytest.approx([160, 20], abs=6)


def test_a_clip_turned_by_half_a_quarter_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(ValueError, match=r"clip\.mp4': it is turned by -45 degrees; expected"):
        read_video(path)


def test_the_command_reads_it_so_too(tmp_path, capsys):
    path = write_clip(tmp_path / "clip.mp4", MATRICES["a quarter clockwise"])
    base = ["info", "--checkpoint", str(checkpoint()), "--domain-name", "umi"]
    assert main([*base, "--video", str(path)]) == 0
    assert f"(17, {WIDTH}, {HEIGHT})" in capsys.readouterr().out
