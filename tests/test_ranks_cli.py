"""The four commands of PhyAI's multi-GPU page under real torchrun, on CPU ranks.

The script's path is exchanged for `-m cosmos3_fast run`; sizes are small. All commands run from a
folder of their own, which shows what was written there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import _ENVIRONMENT, _free_port

from cosmos3_fast.cli import main
from cosmos3_fast.cli.output import write_video
from cosmos3_fast.launch import leave_together
from cosmos3_fast.processor import read_actions, write_actions
from cosmos3_fast.testing import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--steps", "2", "--action-chunk-size", "4", "--image-size", "256")
EVERYWHERE = ("--checkpoint", "tiny", "--domain-name", "droid_lerobot", *SMALL)
COMMON = (*EVERYWHERE, "--device", "cpu")  # also where there are a few GPUs
CUP = ("--image", "observation.png", "--prompt", "robot picks up the cup")
# name: (ranks, the flags that --out and what is common to all follow)
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "policy on 4": (4, ("--tp", "4", *CUP)),
    "policy with guidance on 8": (
        8,
        ("--cfg", "2", "--tp", "4", "--guidance-scale", "4.0", *CUP),
    ),
    "forward dynamics on 4": (
        4,
        (
            "--tp", "4", "--image", "observation.png",
            "--prompt", "robot pushes the object forward",
            "--mode", "forward_dynamics", "--action-file", "action.json",
        ),
    ),
    "inverse dynamics on 4": (
        4,
        (
            "--tp", "4", "--video", "obs.mp4",
            "--prompt", "robot moves the cup to the right",
            "--mode", "inverse_dynamics", "--condition-frames", "0,1",
        ),
    ),
}  # fmt: skip
WRONG = {
    "2 processes for cfg 2 x tp 4": (
        2,
        ("--cfg", "2", "--tp", "4", *CUP),
        "ParallelConfig(world_size=8, cfg_size=2, tp_size=4) needs 8 ranks, the launch has 2 "
        "(torchrun --nproc_per_node=8)",
    ),
    "2 processes for one": (
        2,
        CUP,
        "--cfg 1 x --tp 1 is one process, the launch has 2: pass --tp 2, or --nproc_per_node=1",
    ),
    "a picture that is not there": (
        2,
        ("--tp", "2", "--image", "nowhere.png", "--prompt", "x"),
        "nowhere.png",
    ),
}


@dataclass
class Outcome:
    status: int
    output: str
    seconds: float


def torchrun(
    ranks: int,
    flags: Sequence[str],
    folder: Path,
    program: Sequence[str] = ("-m", "cosmos3_fast"),
    covered: bool = True,
) -> subprocess.Popen[str]:
    """The command in the background, in its own process group. Not `covered`: its processes end at
    once, where coverage would first write its figures.
    """
    environment = {k: v for k, v in os.environ.items() if covered or "COVERAGE" not in k}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    return subprocess.Popen(
        [*launcher, *program, "run", *flags],
        cwd=folder,
        env=environment | _ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str], began: float) -> Outcome:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        _end_group(process.pid)
    return Outcome(process.returncode, output, time.monotonic() - began)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, 9)
    except ProcessLookupError:
        return  # nobody is left, as it should be


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an observation, a clip and actions."""
    folder = tmp_path_factory.mktemp("commands")
    make_tiny_checkpoint(folder / "tiny")
    clip = np.random.RandomState(0).randint(0, 256, (5, 96, 160, 3), np.uint8)
    Image.fromarray(clip[0]).save(folder / "observation.png")
    frames = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 255
    write_video(folder / "obs.mp4", frames, 24.0)
    rows = np.random.RandomState(1).uniform(-1, 1, (4, 10))
    write_actions(folder / "action.json", torch.from_numpy(rows))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Iterator[dict[str, Outcome]]:
    """Every command, two at a time: their ranks wait for files and for each other."""
    asked = [(name, ranks, flags) for name, (ranks, flags) in COMMANDS.items()]
    asked += [(name, ranks, flags) for name, (ranks, flags, _) in WRONG.items()]
    found: dict[str, Outcome] = {}
    while asked:
        running = {}
        for name, ranks, flags in [asked.pop(0) for _ in asked[:2]]:
            place = folder / name
            place.mkdir()
            for item in ("tiny", "observation.png", "obs.mp4", "action.json"):
                (place / item).symlink_to(folder / item)
            command = [*flags, *COMMON, "--out", ".cache/out"]
            process = torchrun(ranks, command, place, covered=name not in WRONG)
            running[name] = process, time.monotonic()
        found |= {name: outcome(*process) for name, process in running.items()}
    yield found


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Path]:
    """The folder of each command's results in this process alone."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, (_, flags) in COMMANDS.items():
            alone = flags[4 if "--cfg" in flags else 2 :]
            assert main(["run", *alone, *COMMON, "--out", f"alone {name}/out"]) == 0
    finally:
        os.chdir(before)
    return {name: folder / f"alone {name}" for name in COMMANDS}


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documented_command_gives_what_one_process_gives(
    outcomes, single, folder, name
) -> None:
    ended = outcomes[name]
    assert ended.status == 0, ended.output
    place = folder / name / ".cache"
    assert (
        written(place) == written(single[name]) == ["out.mp4", "out_action.json", "out_action.png"]
    )
    want, got = (read_actions(f / "out_action.json") for f in (single[name], place))
    assert got.shape == (4, 10)
    assert oracle.error(got, want) <= 1e-5
    shown, wanted = frames(place / "out.mp4"), frames(single[name] / "out.mp4")
    assert shown.shape == wanted.shape
    # Pixels are compared in test_engine_ranks. A video of noise that is rounded otherwise in a few
    # hundred pixels comes out of the codec with a mean difference of 1 to 2.
    assert np.abs(shown.astype(int) - wanted).mean() <= 4


@pytest.mark.parametrize("name", COMMANDS)
def test_rank_0_alone_prints_and_writes(outcomes, folder, name) -> None:
    output = outcomes[name].output
    assert output.count("ms: prepare") == 1
    assert output.count("wrote ") == 3
    assert "step/s" in output and "Traceback" not in output
    beside = ["action.json", "obs.mp4", "observation.png", "tiny"]
    assert written(folder / name) == [".cache", *beside]


def require_refused(ended: Outcome, folder: Path, name: str) -> None:
    """Every rank said what is wrong with this command of WRONG, and nothing was written."""
    ranks, _, words = WRONG[name]
    said = [line for line in ended.output.splitlines() if line.startswith("cosmos3-fast run: ")]
    assert ended.status != 0
    assert len(said) == ranks and all(words in line for line in said), ended.output
    assert ended.output.count("exitcode  : 2") == ranks, "none was ended by torchrun"
    assert not (folder / name / ".cache" / "out_action.json").exists()


@pytest.mark.parametrize("name", WRONG)
def test_a_command_that_cannot_run_says_why_on_every_rank(outcomes, folder, name) -> None:
    require_refused(outcomes[name], folder, name)


def test_a_rank_that_is_slower_than_the_others_still_says_its_error(folder) -> None:
    """torchrun would end it as soon as rank 0 has ended."""
    (folder / "slow.py").write_text(
        "import os, sys, time\n"
        "time.sleep(4 * int(os.environ['RANK']))\n"
        "from cosmos3_fast.cli import main\n"
        "sys.exit(main())\n"
    )
    ranks, flags, words = WRONG["2 processes for one"]
    process = torchrun(ranks, [*flags, *COMMON], folder, ["slow.py"])
    ended = outcome(process, time.monotonic())
    assert ended.status != 0
    assert ended.output.count(f"cosmos3-fast run: {words}") == ranks, ended.output


def test_ctrl_c_ends_a_launch_with_at_most_a_line_a_rank(folder) -> None:
    flags = ["--tp", "2", *CUP, *COMMON, "--steps", "900", "--schedule", "flow"]
    process = torchrun(2, [*flags, "--flow-shift", "1", "--out", "long/out"], folder)
    assert process.stdout is not None
    shown = ""
    while "/900" not in shown:
        piece = process.stdout.readline(80)
        assert piece, shown
        shown += piece
    os.killpg(process.pid, signal.SIGINT)
    ended = outcome(process, time.monotonic())
    assert ended.status != 0 and ended.seconds < 20
    assert 1 <= ended.output.count("cosmos3-fast run: interrupted") <= 2, ended.output
    assert ended.output.count("KeyboardInterrupt") == 0, ended.output


def test_ranks_leave_together_or_when_their_patience_ends(monkeypatch) -> None:
    port = _free_port()
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    for name, value in (launch | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)

    def left(timeout: float) -> float:
        began = time.monotonic()
        leave_together(timeout)
        return time.monotonic() - began

    assert left(30.0) < 5  # no launch: at once
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a launch")
    left(0.5)  # its store has gone: an end, no error
    for patience, least in ((0.5, 0.5), (30.0, 1.0)):
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        with ThreadPoolExecutor(3) as pool:
            first = [pool.submit(left, patience) for _ in range(2)]
            if patience > 1:
                time.sleep(1.0)
                assert not any(one.done() for one in first)
                pool.submit(left, patience).result()
            assert all(least <= one.result() < 25 for one in first)
        del store


def test_the_clones_root_is_no_place_where_kernels_are_found(folder) -> None:
    """From a clone's root `python -m` would show transformers our folder `kernels`."""
    code = (
        "import runpy, sys; sys.argv = ['cosmos3_fast', '--help']\n"
        "try: runpy.run_module('cosmos3_fast', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import importlib.util; print('found', importlib.util.find_spec('kernels'))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout.endswith("found None\n")
