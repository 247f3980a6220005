"""Before the first request: the checkpoint's configuration, what ranks agree on, the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from cosmos3_fast import agreement, denoise, ops
from cosmos3_fast.checkpoint import open_checkpoint
from cosmos3_fast.config import CheckpointConfig, Cosmos3PolicyWNArgs, DeviceConfig, EngineArgs
from cosmos3_fast.loader import LoadReport
from cosmos3_fast.model import Cosmos3Transformer, parameter_bytes
from cosmos3_fast.request import SPATIAL_FACTOR, TEMPORAL_FACTOR
from cosmos3_fast.vae import WanVAE

log = logging.getLogger(__name__)


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


def read(plugin: Cosmos3PolicyWNArgs) -> CheckpointConfig:
    """The checkpoint's configuration, checked against the arguments; ValueError names the fault."""
    if plugin.checkpoint_dir is None:
        raise ValueError("Cosmos3PolicyWNArgs.checkpoint_dir is not set")
    checkpoint = CheckpointConfig.read(plugin.checkpoint_dir)
    if plugin.decode_video and checkpoint.vae is None:
        raise ValueError(f"decode_video needs {checkpoint.folder / 'vae'}, which is missing")
    _check_vae(checkpoint)
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


def facts(args: EngineArgs, checkpoint: CheckpointConfig, with_tensors: bool) -> dict[str, str]:
    """What must be equal on all ranks before weights are read, as {name: digest}.

    `with_tensors`: names, shapes and dtypes of the checkpoint's tensors count too.
    """
    found = agreement.facts(args.plugin_args, skip=("checkpoint_dir",))
    found |= agreement.facts(checkpoint, "checkpoint.", skip=("folder",))
    found |= agreement.facts(args.config.runtime)
    present = ("transformer", "vae") if checkpoint.vae is not None else ("transformer",)
    for part in present if with_tensors else ():
        with open_checkpoint(checkpoint.folder / part) as tensors:
            listing = [[n, *t.shape, str(t.dtype)] for n, t in sorted(tensors.items())]
        found[f"{part} tensors"] = agreement.digest(listing)
    return found | {"dtype": agreement.digest(args.config.device.params_dtype)}


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
    for name, load in loads.items():
        log.info("%s: %s", name, load)
    rows = ops.backends(model.device)
    log.info("ops: %s", ", ".join(f"{op} {where}" for op, where in rows.items()))
    if on_gpu and rows["rms_norm"] == "triton" and rows["conv_input"] != "_C":
        log.warning("cosmos3_fast._C was built without nvcc: the VAE runs its torch reference")
