"""What a command leaves behind: lines, action JSON, video file, plot of the action chunk."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from cosmos3_fast.processor import write_actions

PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells have it


class SaidError(Exception):
    """An error that stands on stderr already: the command has only to end with `status`."""

    def __init__(self, words: str, status: int = 2) -> None:
        super().__init__(words)
        self.status = status


class PipeClosedError(ValueError):
    """Whoever read standard output has gone, as `head` does, and wants no words about it."""


def line(command: str, words: Exception | str) -> str:
    """How the command says why it ends."""
    return f"cosmos3-fast {command}: {words}"


def say(command: str, words: Exception | str) -> SaidError:
    """That line on stderr, now, in one piece: the ranks of a launch share it. None for a closed
    pipe.
    """
    if isinstance(words, PipeClosedError):
        return SaidError(str(words), PIPE_CLOSED)
    sys.stderr.write(f"{line(command, words)}\n")
    sys.stderr.flush()
    return SaidError(str(words))


def tell(*words: object, end: str = "\n") -> None:
    """`print`, at once. Where standard output takes nothing more a ValueError, for a closed pipe a
    PipeClosedError; what is left in its buffer is dropped, so that the end does not try again.
    """
    try:
        print(*words, end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        kind = PipeClosedError if isinstance(error, BrokenPipeError) else ValueError
        raise kind(f"cannot write standard output: {error.strerror or error}") from error


class AboveBars(logging.StreamHandler[TextIO]):
    """Log lines above a progress bar, where they would else stand in it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError in here (no space, no permission) becomes a ValueError that names `path`; so does
    safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {os.fspath(path)}: {said}") from error


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """As tempfile.TemporaryDirectory; ValueError where none can be made."""
    with writing("a temporary folder"):
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    with folder as name:
        yield name


def require_place(path: str | os.PathLike[str]) -> None:
    """Try, before any work, to open the file if it is there, else to make one in its folder, or in
    the nearest one above it that is; nothing stays behind. ValueError names `path`.
    """
    with writing(path):
        if os.path.lexists(path):
            with open(path, "ab"):
                return
        parents = Path(path).absolute().parents
        folder = next(parent for parent in parents if os.path.lexists(parent))
        with tempfile.TemporaryFile(dir=folder):
            return


def result_files(out: str, video: bool) -> list[Path]:
    """What `write_results` writes: OUT_action.json, OUT_action.png and OUT.mp4. ValueError for a
    prefix without a name, whose files would be hidden ones or named like each other's ends.
    """
    if os.path.basename(out) in ("", os.curdir, os.pardir):
        raise ValueError(f"--out PREFIX must end in a name, as in results/policy; got {out!r}")
    return [Path(f"{out}{end}") for end in ("_action.json", "_action.png", ".mp4")[: 2 + video]]


def require_folder(name: str, folder: str) -> None:
    """ValueError for an empty folder, which would be the current one."""
    if not folder:
        raise ValueError(f"{name} must name a folder, got {folder!r}")


def require_writers(video: bool, plot: bool) -> None:
    """Import what the outputs need before any work is done; ImportError names the extra."""
    try:
        if video:
            import av  # noqa: F401
        if plot:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"writing results needs {error.name}: pip install 'cosmos3-fast[video,viz]'"
        ) from error


def video_rate(fps: float) -> Fraction:
    """Frames a second as a fraction of 32-bit integers, which a video file holds; ValueError for
    what none is near to.
    """
    rate = Fraction(fps).limit_denominator(10000)
    if not 0 < rate.numerator < 2**31:
        raise ValueError(f"a video cannot have {fps:g} frames a second")
    return rate


def write_video(path: str | os.PathLike[str], pixels: torch.Tensor, fps: float) -> None:
    """pixels [1, 3, T, H, W] in [0, 1] as H.264 in an mp4 of `fps` frames a second."""
    import av

    frames = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    height, width = frames.shape[1:3]
    with av.open(os.fspath(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=video_rate(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"}
        for frame in frames.contiguous().cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def plot_actions(path: str | os.PathLike[str], action: torch.Tensor, title: str) -> None:
    """One line a channel of action [1, chunk, raw] over the chunk's rows, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = action[0].float().cpu().numpy()
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for channel in range(rows.shape[1]):
        axes.plot(range(1, rows.shape[0] + 1), rows[:, channel], marker=".", label=str(channel))
    axes.set(xlabel="row of the chunk", ylabel="action", title=title)
    axes.legend(title="channel", ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(os.fspath(path))


def write_results(out: str, results: dict[str, torch.Tensor], fps: float, title: str) -> list[Path]:
    """Action JSON, plot and, with pixels, video, their folder made if need be; their paths.
    ValueError names the one that cannot be written.
    """
    actions, plot, *video = files = result_files(out, "pixels" in results)
    with writing(actions):
        actions.parent.mkdir(parents=True, exist_ok=True)
        write_actions(actions, results["action"])
    with writing(plot):
        plot_actions(plot, results["action"], title)
    for path in video:
        with writing(path):
            write_video(path, results["pixels"], fps)
    return files
