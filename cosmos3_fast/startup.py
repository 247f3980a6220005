"""Before the first request: arguments, the checkpoint's configuration, what ranks agree on, the
networks and their weights, the report.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast import agreement, denoise, ops
from cosmos3_fast.checkpoint import Slot, open_checkpoint
from cosmos3_fast.config import (
    CheckpointConfig,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
    TransformerConfig,
)
from cosmos3_fast.loader import LoadReport, load, progress_bar
from cosmos3_fast.model import Cosmos3Transformer, parameter_bytes
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import SPATIAL_FACTOR, TEMPORAL_FACTOR
from cosmos3_fast.vae import WanVAE

log = logging.getLogger(__name__)
SAMPLED = 64  # tensors of a network of which ranks compare some numbers
PREPARE_S = 600.0  # deadline of a request that must compile, capture or search first
# What the attention kernels take: powers of two. At 256 the tiles that are set would need more
# shared memory than a block has on sm_90 (262144 bytes of 232448 by triton 3.6.0).
GPU_HEAD_DIMS = (16, 32, 64, 128)


def arguments(
    dir_or_hub_id: str | Path,
    *,
    revision: str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    cfg_size: int,
    tp_size: int,
    schedule: str | None,
    flow_shift: float | None,
    decode_video: bool,
    use_cuda_graph: bool,
) -> EngineArgs:
    """What `Engine.from_pretrained` stands for; a hub's name that is no folder is downloaded."""
    folder = _folder(dir_or_hub_id, revision)
    target = str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    default = torch.bfloat16 if target.startswith("cuda") else torch.float32
    plugin = Cosmos3PolicyWNArgs(
        checkpoint_dir=folder,
        flow_shift=flow_shift,
        use_karras_sigmas=None,
        decode_video=decode_video,
        schedule=schedule,
    )
    config = EngineConfig(
        device=DeviceConfig(target, default if dtype is None else dtype),
        parallel=ParallelConfig(cfg_size * tp_size, cfg_size, tp_size),
        runtime=RuntimeConfig(use_cuda_graph=use_cuda_graph),
    )
    return EngineArgs(plugin_args=plugin, config=config)


def _folder(dir_or_hub_id: str | Path, revision: str | None) -> Path:
    """The checkpoint's folder, downloaded where the hub knows the name; ValueError says what it
    says.
    """
    name = str(dir_or_hub_id)
    if not isinstance(dir_or_hub_id, str | Path) or not name:
        raise ValueError(f"a checkpoint is a folder or a name of the hub, got {dir_or_hub_id!r}")
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder; revision {revision!r} is for names of the hub")
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"checkpoint folder {name} does not exist, and is no name of the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"checkpoint folder {name} does not exist; the hub: {said}") from error


def device_of(config: DeviceConfig) -> torch.device:
    """The configured device; ValueError when it is not there."""
    device = torch.device(config.target)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {config.target} was asked for, but no CUDA GPU is available")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {config.target} was asked for; there are {torch.cuda.device_count()} GPUs"
            )
    return device


def read(plugin: Cosmos3PolicyWNArgs, device: torch.device) -> CheckpointConfig:
    """The checkpoint's configuration, checked against arguments and device; ValueError names the
    fault.
    """
    if plugin.checkpoint_dir is None:
        raise ValueError("Cosmos3PolicyWNArgs.checkpoint_dir is not set")
    checkpoint = CheckpointConfig.read(plugin.checkpoint_dir)
    if plugin.decode_video and checkpoint.vae is None:
        raise ValueError(f"decode_video needs {checkpoint.folder / 'vae'}, which is missing")
    _check_vae(checkpoint)
    _check_kernels(checkpoint.transformer, device)
    denoise.schedule_of(plugin, checkpoint.scheduler, 1)
    return checkpoint


def _check_vae(checkpoint: CheckpointConfig) -> None:
    """The VAE's latents must be the transformer's, at the factors that requests count with."""
    vae = checkpoint.vae
    if vae is None:
        return
    found = (vae.z_dim, vae.scale_factor_temporal, vae.scale_factor_spatial)
    wanted = (checkpoint.transformer.latent_channel, TEMPORAL_FACTOR, SPATIAL_FACTOR)
    if found != wanted:
        raise ValueError(
            "vae config: z_dim, scale_factor_temporal and scale_factor_spatial must be "
            f"{wanted}, got {found}"
        )


def _check_kernels(config: TransformerConfig, device: torch.device) -> None:
    """The torch references, which the CPU runs, take any even head_dim."""
    if device.type == "cuda" and config.head_dim not in GPU_HEAD_DIMS:
        raise ValueError(
            f"transformer config: head_dim must be one of {GPU_HEAD_DIMS} on a GPU, "
            f"got {config.head_dim}"
        )


def facts(args: EngineArgs, checkpoint: CheckpointConfig, with_tensors: bool) -> dict[str, str]:
    """What must be equal on all ranks before weights are read, as {name: digest}.

    `with_tensors`: names, shapes and dtypes of the checkpoint's tensors count too, and some numbers
    of some of them: other weights of the same shapes show.
    """
    found = agreement.facts(args.plugin_args, skip=("checkpoint_dir",))
    found |= agreement.facts(checkpoint, "checkpoint.", skip=("folder",))
    found |= agreement.facts(args.config.runtime)
    present = ("transformer", "vae") if checkpoint.vae is not None else ("transformer",)
    for part in present if with_tensors else ():
        with open_checkpoint(checkpoint.folder / part) as tensors:
            ordered = sorted(tensors.items())
            listing = [[n, *t.shape, str(t.dtype)] for n, t in ordered]
            some = [t for _, t in ordered[:: max(1, -(-len(ordered) // SAMPLED))]]
            numbers = [t.read(tuple(slice(0, min(8, size)) for size in t.shape)) for t in some]
            found[f"{part} tensors"] = agreement.digest(listing)
            found[f"{part} numbers"] = agreement.digest(numbers)
    return found | {"dtype": agreement.digest(args.config.device.params_dtype)}


def build(
    args: EngineArgs,
    checkpoint: CheckpointConfig,
    mesh: Mesh,
    weights: Callable[[Mapping[str, Slot]], None] | None,
    progress: bool,
) -> tuple[Cosmos3Transformer, WanVAE | None, dict[str, LoadReport]]:
    """The networks with their weights, and what was loaded of each part; `weights` as in `Engine`.
    ValueError names the file or tensor at fault.
    """
    runtime, vae = args.config.runtime, None
    place: dict[str, Any] = {"device": mesh.device, "dtype": args.config.device.params_dtype}
    # Graphs keep it. The watchdog ends a request that is past its own deadline before.
    deadline = max(runtime.step_deadline_s, PREPARE_S)
    model = Cosmos3Transformer(checkpoint.transformer, mesh, deadline=deadline, **place)
    parts: list[tuple[str, Cosmos3Transformer | WanVAE]] = [("transformer", model)]
    if checkpoint.vae is not None:
        vae = WanVAE(
            checkpoint.vae,
            mesh=mesh,
            decoder=args.plugin_args.decode_video,
            max_bytes=runtime.decode_max_bytes,
            deadline=deadline,
            **place,
        )
        parts.append(("vae", vae))
    reports = {}
    for name, part in parts:
        if weights is not None:
            weights(part.slots())
            continue
        reports[name] = load(
            part.slots(),
            open_checkpoint(checkpoint.folder / name),
            unused=part.unused,
            strict=args.plugin_args.weight_strict,
            progress=progress_bar(name) if progress and mesh.rank == 0 else None,
        )
    return model, vae, reports


def report(
    args: EngineArgs,
    model: Cosmos3Transformer,
    vae: WanVAE | None,
    loads: Mapping[str, LoadReport],
) -> None:
    """Log what runs where, once."""
    mesh, on_gpu = model.mesh, model.device.type == "cuda"
    size = parameter_bytes(model) + (parameter_bytes(vae) if vae is not None else 0)
    log.info(
        "%s %s, mesh cfg %d x tp %d, %.2f GB of weights a rank, graphs %s",
        model.device,
        model.dtype,
        mesh.cfg_size,
        mesh.tp_size,
        size / 1e9,
        "on" if args.config.runtime.use_cuda_graph and on_gpu else "off",
    )
    for name, loaded in loads.items():
        log.info("%s: %s", name, loaded)
    rows = ops.backends(model.device, model.sums)
    log.info("ops: %s", ", ".join(f"{op} {where}" for op, where in rows.items()))
    if on_gpu and rows["rms_norm"] == "triton" and rows["conv_input"] != "_C":
        log.warning("cosmos3_fast._C was built without nvcc: the VAE runs its torch reference")
