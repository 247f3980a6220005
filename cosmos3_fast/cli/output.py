"""What a run leaves behind: action JSON, video file, plot of the action chunk."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path

import torch

from cosmos3_fast.processor import write_actions


class SaidError(Exception):
    """An error that stands on stderr already: the command has only to end with status 2."""


def say(command: str, error: Exception) -> SaidError:
    """One line on stderr, now."""
    print(f"cosmos3-fast {command}: {error}", file=sys.stderr, flush=True)
    return SaidError(str(error))


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


def write_video(path: str | os.PathLike[str], pixels: torch.Tensor, fps: float) -> None:
    """pixels [1, 3, T, H, W] in [0, 1] as H.264 in an mp4 of `fps` frames a second."""
    import av

    frames = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    height, width = frames.shape[1:3]
    with av.open(os.fspath(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10000))
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
    """OUT_action.json, OUT_action.png and, with pixels, OUT.mp4 in a folder that exists; their
    paths.
    """
    written = [Path(f"{out}_action.json"), Path(f"{out}_action.png")]
    write_actions(written[0], results["action"])
    plot_actions(written[1], results["action"], title)
    if "pixels" in results:
        written.append(Path(f"{out}.mp4"))
        write_video(written[-1], results["pixels"], fps)
    return written
