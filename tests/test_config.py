"""What the user chooses and what the checkpoint says: defaults, reading, refusals by key name."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, UniPCMultistepScheduler
from engine_fixtures import checkpoint

from cosmos3_fast.config import (
    CheckpointConfig,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    TransformerConfig,
    VAEConfig,
    read_json,
)
from cosmos3_fast.testing import NANO_SCHEDULER, NANO_TRANSFORMER, NANO_VAE

NAN, INF = float("nan"), float("inf")
BAD_CHOICES = {
    "device": (DeviceConfig, {"target": "mps"}, "must be cpu, cuda or cuda:N, got 'mps'"),
    "two devices": (DeviceConfig, {"target": "cuda:0,1"}, "cpu, cuda or cuda:N, got 'cuda:0,1'"),
    "dtype": (DeviceConfig, {"params_dtype": torch.float64}, "params_dtype must be .*float64"),
    "cfg 3": (ParallelConfig, {"cfg_size": 3, "world_size": 3}, "cfg_size must be 1 or 2.*got 3"),
    "tp 0": (ParallelConfig, {"tp_size": 0}, "tp_size must be a positive integer, got 0"),
    "half a rank": (ParallelConfig, {"tp_size": 1.0}, "tp_size must be a positive .* got 1.0"),
    "world": (
        ParallelConfig,
        {"world_size": 4, "cfg_size": 2},
        "world_size 4 must be cfg_size 2 x tp_size 1",
    ),
    "deadline": (RuntimeConfig, {"step_deadline_s": 0}, "step_deadline_s must be positive.* got 0"),
    "nan deadline": (RuntimeConfig, {"step_deadline_s": NAN}, "step_deadline_s must .* got nan"),
    "no deadline": (
        RuntimeConfig,
        {"step_deadline_s": INF},
        "step_deadline_s must be positive and finite, got inf",
    ),
    "a long deadline": (
        RuntimeConfig,
        {"step_deadline_s": 1e18},
        r"step_deadline_s must be at most 1e\+09, got 1e\+18",
    ),
    "graphs": (RuntimeConfig, {"max_graphs": 0}, "max_graphs must be a positive integer, got 0"),
    "nan graphs": (RuntimeConfig, {"max_graphs": NAN}, "max_graphs must be .* got nan"),
    "prompts": (RuntimeConfig, {"max_prompts": -1}, "max_prompts must be a positive .* got -1"),
    "half a prompt": (RuntimeConfig, {"max_prompts": 1.5}, "max_prompts must be .* got 1.5"),
    "bytes": (RuntimeConfig, {"decode_max_bytes": 0}, "decode_max_bytes must be .* got 0"),
    "inf bytes": (RuntimeConfig, {"decode_max_bytes": INF}, "decode_max_bytes must be .* got inf"),
    "sums": (RuntimeConfig, {"collective": "ring"}, "collective must be one of .*'ring'"),
    "schedule": (Cosmos3PolicyWNArgs, {"schedule": "euler"}, "schedule must be one of .*'euler'"),
    "shift": (Cosmos3PolicyWNArgs, {"flow_shift": 0.0}, "flow_shift must be positive, got 0.0"),
    "nan shift": (Cosmos3PolicyWNArgs, {"flow_shift": NAN}, "flow_shift must be finite, got nan"),
    "inf shift": (Cosmos3PolicyWNArgs, {"flow_shift": INF}, "flow_shift must be finite, got inf"),
    "plugin": (EngineArgs, {"plugin": "pi0"}, "plugin must be one of .*'pi0'"),
}


@pytest.mark.parametrize(("make", "fields", "message"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_bad_choices_are_refused(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_the_longest_deadline_is_a_good_one():
    assert RuntimeConfig(step_deadline_s=1e9, silence_s=1e9).step_deadline_s == 1e9


def test_defaults_are_phyais():
    plugin = Cosmos3PolicyWNArgs()
    assert (plugin.flow_shift, plugin.use_karras_sigmas, plugin.decode_video) == (5.0, False, False)
    args = EngineArgs(plugin="cosmos3_policy")
    assert args.config == EngineConfig(
        DeviceConfig("cuda:0", torch.bfloat16), ParallelConfig(1, 1, 1), RuntimeConfig()
    )


def test_nano_is_the_default_transformer():
    assert TransformerConfig.from_dict(NANO_TRANSFORMER) == TransformerConfig()


@pytest.mark.parametrize(
    ("cls", "ours", "data"),
    [
        (Cosmos3OmniTransformer, TransformerConfig, NANO_TRANSFORMER),
        (AutoencoderKLWan, VAEConfig, NANO_VAE),
        (UniPCMultistepScheduler, SchedulerConfig, NANO_SCHEDULER),
    ],
    ids=["transformer", "vae", "scheduler"],
)
def test_a_config_that_diffusers_saves_is_read_without_a_warning(cls, ours, data, caplog):
    """diffusers writes every argument of its class: none is unknown here."""
    fields = {name: value for name, value in data.items() if not name.startswith("_")}
    if cls is UniPCMultistepScheduler:
        saved = dict(cls(**fields).config)
    else:
        with torch.device("meta"):
            saved = dict(cls.from_config(fields).config)
    assert ours.from_dict(json.loads(json.dumps(saved, default=list))) == ours.from_dict(data)
    assert not caplog.records


BAD_TRANSFORMERS = {
    "relu2": ({"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported, only 'silu'"),
    "biases": ({"attention_bias": True}, "attention_bias = True is not supported"),
    "edge norms": ({"qk_norm_for_text": False}, "qk_norm_for_text = False is not supported"),
    "edge keys": ({"use_und_k_norm_for_gen": True}, "use_und_k_norm_for_gen = True"),
    "spatial ids": (
        {"unified_3d_mrope_reset_spatial_ids": False},
        "unified_3d_mrope_reset_spatial_ids = False",
    ),
    "no actions": ({"action_gen": False}, "action_gen = False is not supported, only True"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
    "axes": ({"rope_axes_dim": [24, 20, 24]}, r"\(24, 20, 24\) must be .* head_dim / 2 = 64"),
    "two axes": ({"rope_axes_dim": [32, 32]}, r"rope_axes_dim \(32, 32\) must be three"),
    "heads": ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of .* 5"),
    "odd heads": (
        {"head_dim": 129},
        r"rope_axes_dim \(24, 20, 20\) must be .* head_dim / 2 = 64.5",
    ),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
    "no keys": ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive .* got 0"),
    "sizes in words": ({"hidden_size": "4096"}, "hidden_size must be a positive .* got '4096'"),
    "nan eps": ({"rms_norm_eps": NAN}, "rms_norm_eps must be positive and finite, got nan"),
    "inf theta": ({"rope_theta": INF}, "rope_theta must be positive and finite, got inf"),
    "no frames": ({"base_fps": 0}, "base_fps must be positive and finite, got 0"),
    "one axis": ({"rope_axes_dim": 64}, "rope_axes_dim must be positive integers, got 64"),
    "no axes": (
        {"rope_axes_dim": None, "rope_scaling": {"mrope_section": 64}},
        "rope_axes_dim must be positive integers, got 64",
    ),
    "negative axis": ({"rope_axes_dim": [-4, 34, 34]}, r"rope_axes_dim must be positive integers"),
    "patch": ({"patch_latent_dim": 48}, "patch_latent_dim 48 must be latent_channel 48 x"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TRANSFORMERS.values(), ids=BAD_TRANSFORMERS)
def test_other_members_of_the_family_are_refused_by_key(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(NANO_TRANSFORMER | change)


def test_a_model_without_actions_is_refused():
    rest = {name: value for name, value in NANO_TRANSFORMER.items() if name != "action_gen"}
    with pytest.raises(ValueError, match="action_gen is missing"):
        TransformerConfig.from_dict(rest)


@pytest.mark.parametrize(
    ("scaling", "axes"),
    [({"mrope_section": [16, 24, 24]}, (16, 24, 24)), ({}, (24, 20, 20)), (None, (24, 20, 20))],
    ids=["section", "empty", "none"],
)
def test_axes_come_from_the_rope_scaling_when_not_named(scaling, axes):
    data = NANO_TRANSFORMER | {"rope_axes_dim": None, "rope_scaling": scaling}
    assert TransformerConfig.from_dict(data).rope_axes_dim == axes
    named = data | {"rope_axes_dim": [20, 22, 22]}
    assert TransformerConfig.from_dict(named).rope_axes_dim == (20, 22, 22)


def test_a_rope_scaling_of_another_kind_leaves_the_default():
    data = NANO_TRANSFORMER | {"rope_axes_dim": None, "rope_scaling": {"rope_type": "default"}}
    assert TransformerConfig.from_dict(data).rope_axes_dim == (24, 20, 20)


def test_unknown_keys_are_logged_by_name(caplog):
    with caplog.at_level(logging.WARNING):
        TransformerConfig.from_dict(NANO_TRANSFORMER | {"moe_experts": 4, "_class_name": "x"})
    assert "transformer config: keys without a meaning here are ignored: moe_experts" in caplog.text


BAD_VAES = {
    "wan 2.1": ({"is_residual": False}, "is_residual must be true"),
    "means": ({"latents_mean": [0.0]}, "latents_mean must hold z_dim = 48 numbers"),
    "one mean": ({"latents_mean": 0.5}, "latents_mean must hold z_dim = 48 numbers"),
    "no deviations": ({"latents_std": None}, "latents_std must hold z_dim = 48 numbers"),
    "nan mean": ({"latents_mean": [NAN] * 48}, "latents_mean must be finite numbers, got"),
    "zero deviation": ({"latents_std": [0.0] + [1.0] * 47}, "latents_std must be positive, got"),
    "width": ({"base_dim": -1}, "base_dim must be a positive integer, got -1"),
    "attention": ({"attn_scales": [0.5]}, r"attn_scales = \[0.5\] is not supported"),
    "quantised": ({"quantization_config": {"a": 1}}, "vae config: quantization_config is set"),
}


@pytest.mark.parametrize(("change", "message"), BAD_VAES.values(), ids=BAD_VAES)
def test_other_vaes_are_refused_by_key(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(NANO_VAE | change)


BAD_SCHEDULERS = {
    "solver_order": 3,
    "solver_type": "bh1",
    "predict_x0": False,
    "prediction_type": "epsilon",
    "final_sigmas_type": "sigma_min",
    "lower_order_final": False,
    "disable_corrector": [0],
    "thresholding": True,
    "num_train_timesteps": 500,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
}


@pytest.mark.parametrize(("key", "value"), BAD_SCHEDULERS.items(), ids=BAD_SCHEDULERS)
def test_other_solvers_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"scheduler config: {key} = .* is not supported"):
        SchedulerConfig.from_dict(NANO_SCHEDULER | {key: value})


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "flow_shift"])
@pytest.mark.parametrize("value", [NAN, INF, "5"])
def test_numbers_of_the_scheduler_are_finite(name, value):
    with pytest.raises(ValueError, match=f"scheduler config: {name} must be .*finite, got"):
        SchedulerConfig.from_dict(NANO_SCHEDULER | {name: value})


def test_what_the_schedulers_file_leaves_out_is_diffusers_default():
    theirs, ours = UniPCMultistepScheduler().config, SchedulerConfig.from_dict({})
    assert (ours.flow_shift, ours.use_karras_sigmas) == (
        theirs.flow_shift,
        theirs.use_karras_sigmas,
    )
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)


def test_the_schedule_is_read_from_both_files():
    config = SchedulerConfig.from_dict(NANO_SCHEDULER, {"use_native_flow_schedule": True})
    assert (config.sigma_min, config.sigma_max, config.use_karras_sigmas) == (0.147, 200.0, True)
    assert config.use_native_flow_schedule
    assert not SchedulerConfig.from_dict(NANO_SCHEDULER).use_native_flow_schedule


@pytest.fixture
def folder(tmp_path):
    """The tiny checkpoint's JSON side."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(checkpoint(), tmp_path / "tiny", ignore=ignore)


def test_a_folder_is_read_whole(folder):
    config = CheckpointConfig.read(str(folder))
    assert (config.transformer.hidden_size, config.transformer.rope_axes_dim) == (64, (4, 2, 2))
    assert config.vae is not None and config.vae.base_dim == 8
    assert config.vae.latents_std == tuple(NANO_VAE["latents_std"])
    assert config.scheduler.use_karras_sigmas


def test_vae_and_model_index_may_be_missing(folder):
    shutil.rmtree(folder / "vae")
    (folder / "model_index.json").unlink()
    config = CheckpointConfig.read(folder)
    assert config.vae is None and not config.scheduler.use_native_flow_schedule


def test_a_vae_folder_of_hidden_files_alone_is_none(folder):
    shutil.rmtree(folder / "vae")
    (folder / "vae").mkdir()
    (folder / "vae" / ".gitkeep").touch()
    assert CheckpointConfig.read(folder).vae is None


@pytest.mark.parametrize("part", ["transformer/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*{part}: No such file"),
        ("{", "{part} is not valid JSON"),
        ("[]", "{part} must hold a JSON object, got list"),
        (b"\xff\xfe", "{part} is not valid JSON"),
    ],
    ids=["missing", "not json", "not an object", "not text"],
)
def test_an_unusable_file_is_named(folder, part, text, message):
    if text is None:
        (folder / part).unlink()
    elif isinstance(text, bytes):
        (folder / part).write_bytes(text)
    else:
        (folder / part).write_text(text)
    with pytest.raises(ValueError, match=message.format(part=part)):
        CheckpointConfig.read(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint folder .*gone does not exist"):
        CheckpointConfig.read(tmp_path / "gone")


def test_read_json_gives_the_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(str(tmp_path / "a.json")) == {"a": [1, None]}
