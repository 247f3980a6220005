"""Our side of a comparison with the oracle: its cases as requests through the drop-in API."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import oracle
import torch
from oracle import Case

from cosmos3_fast import (
    Cosmos3ActionRequest,
    Cosmos3PolicyProcessor,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    Engine,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
    pixel_to_latent_shape,
)


@functools.cache
def engine(
    folder: Path,
    schedule: str,
    dtype: torch.dtype = torch.float32,
    shift: float = 5.0,
    decode: bool = False,
) -> Engine:
    """An engine on the CPU; tests share them, `close_engines` ends them."""
    made = Engine(
        EngineArgs(
            plugin_args=Cosmos3PolicyWNArgs(
                checkpoint_dir=folder, flow_shift=shift, schedule=schedule, decode_video=decode
            ),
            config=EngineConfig(
                device=DeviceConfig(target="cpu", params_dtype=dtype),
                parallel=ParallelConfig(),
                runtime=RuntimeConfig(use_cuda_graph=False),
            ),
        )
    )
    _OPEN.append(made)
    return made


_OPEN: list[Engine] = []


def close_engines() -> None:
    while _OPEN:
        _OPEN.pop().close()
    engine.cache_clear()


@functools.cache
def processed(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """The case's picture or clip, prompt and actions through the processor."""
    processor = Cosmos3PolicyProcessor(
        tokenizer_name_or_path=str(folder / "text_tokenizer"),
        height=192,
        width=320,
        mode=case.mode,
        domain_name=case.domain,
        action_chunk_size=case.chunk,
        fps=case.fps,
        image_size=case.tier,
        prompt_format="json",
        view_point=case.view_point,
        device="cpu",
        params_dtype=dtype,
    )
    clip = oracle.frames(case)
    return processor.preprocess(
        {
            "images": clip if case.source == "video" else clip[0],
            "task": case.prompt,
            "cond_action": oracle.actions(case) if case.mode == "forward_dynamics" else None,
        }
    )


def common(case: Case) -> dict[str, Any]:
    """What every request of a case says, whatever its video comes from."""
    return {
        "mode": case.mode,
        "domain_id": oracle.DOMAINS[case.domain],
        "action_chunk": case.chunk,
        "raw_action_dim": case.raw,
        "fps": case.fps,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "seed": case.seed,
    }


def request(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> Cosmos3ActionRequest:
    """The request of a case, from pixels, or from latents for a "latents" case."""
    if case.source == "latents":
        return request_of_latents(case, *oracle.tokens(folder, case))
    got = processed(folder, case, dtype)
    return Cosmos3ActionRequest(
        text_ids=got.text_ids,
        text_mask=got.text_mask,
        neg_text_ids=got.neg_text_ids,
        neg_text_mask=got.neg_text_mask,
        video_shape=pixel_to_latent_shape(*got.video_shape),
        cond_video_pixels=got.pixel_values,
        cond_action=got.cond_action,
        cond_frame_indexes=got.cond_frame_indexes,
        **common(case),
    )


def request_of_latents(
    case: Case, ids: list[int], negative_ids: list[int], **changes: Any
) -> Cosmos3ActionRequest:
    """A request with 33x40 latents as clean frames; `changes` replace fields."""
    ids_of = {"text": torch.tensor([ids]), "neg_text": torch.tensor([negative_ids])}
    fields = {f"{name}_ids": value for name, value in ids_of.items()}
    fields |= {f"{name}_mask": torch.ones_like(value) for name, value in ids_of.items()}
    padded = torch.nn.functional.pad(oracle.actions(case), (0, 64 - case.raw))[None]
    fields |= {
        "video_shape": (case.frames, *oracle.DIRECT),
        "cond_video_latents": oracle.direct_latents(case),
        "cond_action": padded if case.mode == "forward_dynamics" else None,
    }
    return Cosmos3ActionRequest(**fields | common(case) | changes)
