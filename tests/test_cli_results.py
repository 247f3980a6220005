"""Where results cannot be written: one line that names the file, status 2, early where possible.

`/dev/full` is a disk without space.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import checkpoint
from PIL import Image
from ranks import argument, run_cases

from cosmos3_fast.cli import main, output
from cosmos3_fast.cli.output import require_place, result_files, writing
from cosmos3_fast.engine import Engine
from cosmos3_fast.testing import make_tiny_checkpoint

SMALL = (
    "--image-size", "256", "--action-chunk-size", "4", "--domain-name", "droid_lerobot",
    "--steps", "1",
)  # fmt: skip
ENDS = ("_action.json", "_action.png", ".mp4")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "observation.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    return str(path)


def run(image: str, out: Path, *flags: str) -> int:
    base = ["run", "--checkpoint", str(checkpoint()), "--image", image, *SMALL]
    return main([*base, "--out", str(out), *flags])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is the command's; progress bars stand beside it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("cosmos3-fast ")]
    return line


@pytest.mark.parametrize("end", ENDS)
def test_a_full_disk_is_named_with_the_file(image, tmp_path, capsys, end):
    (tmp_path / f"out{end}").symlink_to("/dev/full")
    assert run(image, tmp_path / "out") == 2
    want = f"cosmos3-fast run: cannot write {tmp_path}/out{end}: No space left on device"
    assert said(capsys) == want


@pytest.mark.parametrize("end", ENDS)
def test_a_place_that_cannot_be_written_is_found_before_anything_is_built(
    image, tmp_path, capsys, monkeypatch, end
):
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("an engine was built"))
    (tmp_path / f"out{end}").mkdir()
    assert run(image, tmp_path / "out") == 2
    assert said(capsys) == f"cosmos3-fast run: cannot write {tmp_path}/out{end}: Is a directory"


def test_a_folder_without_permission_is_found_early(tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is planted."""

    def refuse(**place: Any) -> None:
        raise PermissionError(13, "Permission denied", f"{place['dir']}/tmp1")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    want = f"cannot write {tmp_path}/a/b.json: Permission denied"
    with pytest.raises(ValueError, match=want):
        require_place(tmp_path / "a" / "b.json")


def test_trying_a_place_leaves_it_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("[1]")
    require_place(tmp_path / "old.json")
    require_place(tmp_path / "new" / "folder" / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "[1]"


def test_without_a_video_its_place_does_not_matter(image, tmp_path):
    (tmp_path / "out.mp4").mkdir()
    assert run(image, tmp_path / "out", "--no-video") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out.mp4", "out_action.json", "out_action.png"]
    assert result_files(str(tmp_path / "out"), video=False) == [
        tmp_path / "out_action.json",
        tmp_path / "out_action.png",
    ]


def test_errors_that_are_no_files_pass():
    with pytest.raises(KeyError), writing("a.json"):
        raise KeyError


@pytest.mark.parametrize(
    ("command", "flags"),
    [("make-tiny", ["{}/file/tiny"]), ("demo", ["--out", "{}/file/out", "--device", "cpu"]),
     ("bench", ["--tiny", "--device", "cpu", "--json", "{}/file/figures.json"])],
    ids=["make-tiny", "demo", "bench"],
)  # fmt: skip
def test_other_commands_name_it_too(tmp_path, capsys, command, flags):
    (tmp_path / "file").write_text("")
    assert main([command, *(flag.format(tmp_path) for flag in flags)]) == 2
    assert said(capsys).startswith(f"cosmos3-fast {command}: cannot write {tmp_path}/file/")


def case_full_disk() -> dict[str, Any]:
    """Rank 0 alone writes, and cannot; then it can."""
    out, found = Path(argument("out")), {}
    base = ["run", "--checkpoint", argument("folder"), "--image", argument("image"), *SMALL]
    for name in ("full", "good"):
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            status = main([*base, "--tp", "2", "--device", "cpu", "--out", str(out / name)])
        lines = [line for line in text.getvalue().splitlines() if line.startswith("cosmos3-fast ")]
        found[name] = [status, lines]
    return found


def test_every_rank_ends_with_the_error_of_the_one_that_writes(image, tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    arguments = {"folder": str(folder), "image": image, "out": str(tmp_path)}
    found = run_cases(2, [case_full_disk], arguments=arguments)["case_full_disk"]
    words = f"rank 0: cannot write {tmp_path}/full.mp4: No space left on device"
    for got in found:
        assert got == {"full": [2, [f"cosmos3-fast run: {words}"]], "good": [0, []]}
    assert json.loads((tmp_path / "good_action.json").read_text())["shape"] == [1, 4, 10]
    assert os.path.getsize(tmp_path / "good.mp4") > 0
