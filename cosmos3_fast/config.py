"""Configuration: what the user chooses (engine, device, parallel) and what the checkpoint says.

Every class is a frozen dataclass made once. The checkpoint's classes keep the field names of its
JSON files; a member of the family that this engine does not run is refused by the name of the key,
before a weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast.numeric import is_finite, is_integer

log = logging.getLogger(__name__)

SCHEDULES = ("karras", "flow", "native")
COLLECTIVES = ("auto", "symmetric", "nccl")
PLUGINS = ("cosmos3_policy_wn", "cosmos3_policy")
MAX_DEADLINE_S = 1e9  # kernels that wait count nanoseconds in 64 bits


def _all(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, tuple) and all(map(kind, values))


_NUMBERS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # by a field's annotation
    "int": ("a positive integer", lambda value: is_integer(value) and value >= 1),
    "float": ("positive and finite", lambda value: is_finite(value) and value > 0),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "bool | None": ("true or false", lambda value: value is None or isinstance(value, bool)),
    "float | None": ("finite", lambda value: value is None or is_finite(value)),
    "tuple[int, ...]": ("positive integers", lambda values: _all(_NUMBERS["int"][1], values)),
    "tuple[float, ...]": ("finite numbers", lambda values: _all(is_finite, values)),
}


def _check_numbers(config: Any, prefix: str = "") -> None:
    """ValueError naming the field for a number that is none, or not what `_NUMBERS` says."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        what, holds = _NUMBERS.get(str(one.type), ("", lambda _: True))
        if not holds(value):
            raise ValueError(f"{prefix}{one.name} must be {what}, got {value!r}")


@dataclass(frozen=True)
class DeviceConfig:
    """Where the engine runs: `target` is "cuda:N" or "cpu"; `params_dtype` the dtype of both
    networks.
    """

    target: str = "cuda:0"
    params_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.target)):
            raise ValueError(f"device target must be cpu, cuda or cuda:N, got {self.target!r}")
        if self.params_dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                "params_dtype must be torch.bfloat16, torch.float16 or torch.float32, got "
                f"{self.params_dtype!r}"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh: rank = cfg_rank * tp_size + tp_rank; `world_size` must be cfg_size * tp_size."""

    world_size: int = 1
    cfg_size: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.cfg_size not in (1, 2):
            raise ValueError(
                f"cfg_size must be 1 or 2 (there are two branches), got {self.cfg_size}"
            )
        if self.world_size != self.cfg_size * self.tp_size:
            product = f"cfg_size {self.cfg_size} x tp_size {self.tp_size}"
            raise ValueError(f"world_size {self.world_size} must be {product}")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the engine runs.

    `use_cuda_graph`: capture the denoising step (CUDA only; False runs the same code eagerly).
    Over several ranks the watchdog ends the process when a request takes longer than
    `step_deadline_s` seconds, or another rank gives no sign for `silence_s`. `max_graphs`,
    `max_prompts`: how many captured shapes, prompts' keys and values stay. `decode_max_bytes`:
    activation memory the VAE may plan with before it decodes in latent-frame groups. `collective`:
    GPU ranks' sums by "auto" (tables), "symmetric" memory or "nccl" alone.
    """

    use_cuda_graph: bool = True
    step_deadline_s: float = 30.0
    silence_s: float = 10.0
    max_graphs: int = 4
    max_prompts: int = 8
    decode_max_bytes: int = 48 << 30
    collective: str = "auto"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.collective not in COLLECTIVES:
            raise ValueError(f"collective must be one of {COLLECTIVES}, got {self.collective!r}")
        for name in ("step_deadline_s", "silence_s"):
            seconds = getattr(self, name)
            if seconds > MAX_DEADLINE_S:
                raise ValueError(f"{name} must be at most {MAX_DEADLINE_S:g}, got {seconds}")


@dataclass(frozen=True)
class EngineConfig:
    """Device, mesh and run-time settings of one engine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Cosmos3PolicyWNArgs:
    """Arguments of the policy plugin.

    `flow_shift`: shift of the flow and native schedules; None takes the checkpoint's.
    `use_karras_sigmas`: True karras, False native, None what the checkpoint's files say; `schedule`
    names one outright ("karras", "flow", "native") and wins. `weight_strict=False` turns unknown
    tensors in the checkpoint into a warning; a missing tensor or a wrong shape stays an error.
    """

    checkpoint_dir: str | Path | None = None
    flow_shift: float | None = 5.0
    use_karras_sigmas: bool | None = False
    decode_video: bool = False
    schedule: str | None = None
    weight_strict: bool = True

    def __post_init__(self) -> None:
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        _check_numbers(self)
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift must be positive, got {self.flow_shift}")


@dataclass(frozen=True)
class EngineArgs:
    """What `Engine` is built from; `plugin` is "cosmos3_policy_wn" (or its synonym
    "cosmos3_policy").
    """

    plugin: str = "cosmos3_policy_wn"
    plugin_args: Cosmos3PolicyWNArgs = field(default_factory=Cosmos3PolicyWNArgs)
    config: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.plugin not in PLUGINS:
            raise ValueError(f"plugin must be one of {PLUGINS}, got {self.plugin!r}")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file if it is missing, not JSON or not an
    object.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _take(cls: type, data: Mapping[str, Any], required: Mapping[str, Any], name: str) -> dict:
    """Fields of `cls` found in `data`; keys in `required` must hold exactly that value."""
    if data.get("quantization_config"):
        raise ValueError(
            f"{name}: quantization_config is set; quantised checkpoints are not supported"
        )
    for key, value in required.items():
        if key in data and data[key] != value:
            raise ValueError(f"{name}: {key} = {data[key]!r} is not supported, only {value!r}")
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(k for k in data if k not in fields | set(required) and not k.startswith("_"))
    if unknown:
        log.warning("%s: keys without a meaning here are ignored: %s", name, ", ".join(unknown))
    return {k: _tupled(v) for k, v in data.items() if k in fields and v is not None}


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json`; the defaults are Nano's. Sizes in elements, `base_fps` in frames a
    second.
    """

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    rope_axes_dim: tuple[int, ...] = (24, 20, 20)
    latent_channel: int = 48
    latent_patch_size: int = 2
    patch_latent_dim: int = 192
    action_dim: int = 64
    num_embodiment_domains: int = 32
    base_fps: float = 24.0
    enable_fps_modulation: bool = True
    unified_3d_mrope_temporal_modality_margin: int = 15000
    timestep_scale: float = 0.001

    REQUIRED = {  # noqa: RUF012 - a constant of the class, not a field
        "hidden_act": "silu",
        "attention_bias": False,
        "qk_norm_for_text": True,
        "use_und_k_norm_for_gen": False,
        "unified_3d_mrope_reset_spatial_ids": True,
        "action_gen": True,
    }
    IGNORED = (
        "attention_dropout", "dtype", "rope_scaling", "sound_dim", "sound_gen", "sound_latent_fps",
    )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TransformerConfig:
        """From the checkpoint's JSON; ValueError names the key that is not supported."""
        if "action_gen" not in data:
            raise ValueError(
                "transformer config: action_gen is missing; this engine runs policy models"
            )
        rest = {k: v for k, v in data.items() if k not in cls.IGNORED}
        fields = _take(cls, rest, cls.REQUIRED, "transformer config")
        scaling = data.get("rope_scaling")
        if isinstance(scaling, Mapping) and scaling.get("mrope_section") is not None:
            section = scaling["mrope_section"]
            fields.setdefault("rope_axes_dim", _tupled(section))
        return cls(**fields)

    def __post_init__(self) -> None:
        _check_numbers(self, "transformer config: ")
        if 2 * sum(self.rope_axes_dim) != self.head_dim or len(self.rope_axes_dim) != 3:
            raise ValueError(
                f"transformer config: rope_axes_dim {self.rope_axes_dim} must be three numbers "
                f"that sum to head_dim / 2 = {self.head_dim / 2:g}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"transformer config: num_attention_heads {self.num_attention_heads} is no "
                f"multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.patch_latent_dim != self.latent_channel * self.latent_patch_size**2:
            raise ValueError(
                f"transformer config: patch_latent_dim {self.patch_latent_dim} must be "
                f"latent_channel {self.latent_channel} x latent_patch_size "
                f"{self.latent_patch_size} squared"
            )


@dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json` of Wan2.2's VAE; the defaults are the real one's, without its 48 means and
    deviations.
    """

    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 48
    latents_std: tuple[float, ...] = (1.0,) * 48
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int = 2
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 16

    REQUIRED = {"is_residual": True, "attn_scales": []}  # noqa: RUF012 - a constant of the class
    IGNORED = ("dropout", "clip_output")

    def __post_init__(self) -> None:
        _check_numbers(self, "vae config: ")
        if not all(deviation > 0 for deviation in self.latents_std):
            raise ValueError(f"vae config: latents_std must be positive, got {self.latents_std}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VAEConfig:
        """From the checkpoint's JSON; ValueError names the key that is not supported."""
        if not data.get("is_residual"):
            raise ValueError("vae config: is_residual must be true (Wan2.2's VAE)")
        for key in ("latents_mean", "latents_std"):
            found = _tupled(data.get(key))
            if not isinstance(found, tuple) or len(found) != data.get("z_dim", cls.z_dim):
                raise ValueError(f"vae config: {key} must hold z_dim = {data.get('z_dim')} numbers")
        rest = {k: v for k, v in data.items() if k not in cls.IGNORED}
        return cls(**_take(cls, rest, cls.REQUIRED, "vae config"))


@dataclass(frozen=True)
class SchedulerConfig:
    """What `scheduler/scheduler_config.json` and `model_index.json` say about the schedule."""

    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    flow_shift: float = 1.0
    num_train_timesteps: int = 1000
    use_native_flow_schedule: bool = False

    REQUIRED = {  # noqa: RUF012 - a constant of the class, not a field
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "disable_corrector": [],
        "thresholding": False,
        "num_train_timesteps": 1000,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "solver_p": None,
    }
    IGNORED = (  # betas, thresholds, other schedules' timesteps
        *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
        *("dynamic_thresholding_ratio", "sample_max_value", "use_flow_sigmas"),
        *("timestep_spacing", "steps_offset", "time_shift_type"),
    )

    def __post_init__(self) -> None:
        _check_numbers(self, "scheduler config: ")

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], model_index: Mapping[str, Any] | None = None
    ) -> SchedulerConfig:
        """From the two files' JSON; ValueError names the key that this solver does not have."""
        known = {k: v for k, v in data.items() if k not in cls.IGNORED}
        known["use_native_flow_schedule"] = (model_index or {}).get("use_native_flow_schedule")
        return cls(**_take(cls, known, cls.REQUIRED, "scheduler config"))


@dataclass(frozen=True)
class CheckpointConfig:
    """The JSON side of a checkpoint folder; `vae` is None when the folder has no `vae/`."""

    folder: Path
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    vae: VAEConfig | None

    @classmethod
    def read(cls, folder: str | Path) -> CheckpointConfig:
        """Read every config of a diffusers-layout folder; ValueError names the file or key at
        fault.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"checkpoint folder {folder} does not exist")
        index = folder / "model_index.json"
        model_index = read_json(index) if index.is_file() else {}
        if not index.is_file():
            log.warning("%s is missing: taken as one that asks for no native schedule", index)
        has_vae = any((folder / "vae").glob("[!.]*"))
        return cls(
            folder=folder,
            transformer=TransformerConfig.from_dict(
                read_json(folder / "transformer" / "config.json")
            ),
            scheduler=SchedulerConfig.from_dict(
                read_json(folder / "scheduler" / "scheduler_config.json"), model_index
            ),
            vae=VAEConfig.from_dict(read_json(folder / "vae" / "config.json")) if has_vae else None,
        )
