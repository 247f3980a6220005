"""Run one request: observation and instruction in, action JSON, rollout video and plot out.

Alone or under torchrun; every rank runs, rank 0 alone prints and writes.
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from cosmos3_fast.cli.flags import (
    Settings,
    add_device_flags,
    add_request_flags,
    named,
    numbers,
)
from cosmos3_fast.cli.idle import warn_of_idle_flags
from cosmos3_fast.cli.observation import add_observation_flags, check_observation, observe
from cosmos3_fast.cli.output import (
    require_place,
    require_writers,
    result_files,
    say,
    tell,
    video_rate,
    write_results,
)
from cosmos3_fast.denoise import schedule_of
from cosmos3_fast.engine import Engine
from cosmos3_fast.launch import launch_size
from cosmos3_fast.processor import (
    DROID,
    Cosmos3PolicyProcessedInputs,
    Cosmos3PolicyProcessor,
    read_actions,
)
from cosmos3_fast.request import Cosmos3ActionRequest, pixel_to_latent_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the example script, and ours."""
    add_device_flags(parser)
    add_request_flags(parser)
    add_observation_flags(parser)
    add = parser.add_argument
    add("--state", help="--preset droid: 7 joints in radians and the gripper, comma-separated")
    add("--action-file", help="JSON actions; needed by --mode forward_dynamics alone")
    add("--action-chunk-index", type=int, help="of a file with action_chunks (default: 0)")
    add("--no-video", action="store_true", help="do not decode the rollout (default: an mp4)")
    add("--warmup", action="store_true", help="first run it unseen: times as in a control loop")
    out = ".cache/cosmos3_policy_wn"
    add("--out", default=out, metavar="PREFIX", help=f"of the files written (default: {out})")


def main(args: argparse.Namespace) -> None:
    """Build the engine, run the request, write the results on rank 0.

    An error is said before the engine closes, which waits for the other ranks: torchrun ends them
    all as soon as one has ended.
    """
    settings = Settings.of(args)
    _check_flags(args)
    for path in result_files(args.out, video=not args.no_video):
        require_place(path)
    with Engine(settings.engine_args(not args.no_video), progress=True) as engine:
        try:
            _answer(settings, engine)
        except (ValueError, FloatingPointError) as error:
            raise say("run", error) from error


def _answer(settings: Settings, engine: Engine) -> None:
    args, main_rank = settings.args, engine.mesh.rank == 0
    try:
        require_writers(not args.no_video and main_rank, main_rank)
        processor, request = _request(settings, engine.device)
        if not args.no_video:
            video_rate(request.fps)
    except (ValueError, ImportError, OSError) as error:
        engine.refuse(ValueError(str(error)))
    if args.warmup:
        engine.warmup(request)
    steps = tqdm(total=request.num_inference_steps, unit="step", disable=not main_rank)
    with steps:
        result = engine.step(request, on_step=lambda _: steps.update())

    def finish() -> None:
        if main_rank:
            _finish(settings, engine, processor.postprocess(result))

    if main_rank:
        plugin, scheduler = engine.args.plugin_args, engine.checkpoint.scheduler
        schedule = schedule_of(plugin, scheduler, request.num_inference_steps)
        warn_of_idle_flags(settings, schedule)
    engine.together(finish)  # all ranks end alike where rank 0 cannot write


def _check_flags(args: argparse.Namespace) -> None:
    check_observation(args)
    if args.image is None and args.video is None:
        raise ValueError("pass exactly one of --image and --video, got neither")
    if args.preset == "droid" and args.state is None:
        raise ValueError("--preset droid needs --state (7 joints in radians and the gripper)")
    if args.preset != "droid" and args.state is not None:
        raise ValueError("--state is the DROID robot's, and goes with --preset droid alone")
    if args.mode == "forward_dynamics" and args.action_file is None:
        raise ValueError("--mode forward_dynamics needs --action-file")
    if args.cfg * args.tp == 1 and launch_size() > 1:  # else every process would write the files
        raise ValueError(
            f"--cfg 1 x --tp 1 is one process, the launch has {launch_size()}: "
            f"pass --tp {launch_size()}, or --nproc_per_node=1 to torchrun"
        )


def _request(
    settings: Settings, device: torch.device
) -> tuple[Cosmos3PolicyProcessor, Cosmos3ActionRequest]:
    args, droid = settings.args, DROID() if settings.args.preset == "droid" else None
    processor = settings.processor(device)
    inputs = {"task": args.prompt}
    if args.mode == "forward_dynamics":
        with named("--action-file"):
            rows = read_actions(args.action_file, args.action_chunk_index)
            inputs["cond_action"] = rows if droid is None else droid.encode_action(rows)
    clean_action = None
    if droid is not None:
        state = numbers(args.state, "--state", droid.raw_action_dim)
        assert state is not None
        with named("--state"):
            clean_action = droid.encode_state(state[:-1], state[-1])
    inputs["images"] = observe(settings, processor.frames_read())
    processed = processor.preprocess(inputs)
    return processor, request_of(processed, settings, clean_action)


def request_of(
    processed: Cosmos3PolicyProcessedInputs,
    settings: Settings,
    clean_action: torch.Tensor | None = None,
) -> Cosmos3ActionRequest:
    """The request of processed inputs and the sampling flags."""
    return Cosmos3ActionRequest(
        text_ids=processed.text_ids,
        text_mask=processed.text_mask,
        neg_text_ids=processed.neg_text_ids,
        neg_text_mask=processed.neg_text_mask,
        video_shape=pixel_to_latent_shape(*processed.video_shape),
        mode=processed.mode,
        domain_id=processed.domain_id,
        action_chunk=processed.action_chunk,
        raw_action_dim=processed.raw_action_dim,
        cond_video_pixels=processed.pixel_values,
        cond_action=processed.cond_action,
        cond_frame_indexes=processed.cond_frame_indexes,
        clean_action=clean_action,
        **settings.sampling(),
    )


def _finish(settings: Settings, engine: Engine, results: dict[str, torch.Tensor]) -> None:
    """Print times and write the files."""
    args = settings.args
    if args.preset == "droid":
        results["action"] = DROID().decode_action(results["action"])
    fps = float(settings.values["fps"])
    title = f"{args.mode}, {settings.values['domain_name']}"
    written = write_results(args.out, results, fps, title)
    times = ", ".join(f"{stage} {ms:.1f}" for stage, ms in engine.times.items())
    tell(f"ms: {times}; total {sum(engine.times.values()):.1f}")
    if engine.peak_bytes:
        tell(f"peak device memory: {engine.peak_bytes / 2**30:.2f} GiB")
    for path in written:
        tell(f"wrote {path}")
