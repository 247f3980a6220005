"""What the real model looks like: configs as JSON dicts, and every tensor's name and shape.

The names and shapes follow from the configs alone (diffusers layout, docs/model.md, 1, 3, 7), so a
checkpoint of any size can be written without the model's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Shapes = dict[str, tuple[int, ...]]

NANO_TRANSFORMER: dict[str, Any] = {
    "_class_name": "Cosmos3OmniTransformer",
    "action_dim": 64,
    "action_gen": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "base_fps": 24,
    "enable_fps_modulation": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "latent_channel": 48,
    "latent_patch_size": 2,
    "num_attention_heads": 32,
    "num_embodiment_domains": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "patch_latent_dim": 192,
    "qk_norm_for_text": True,
    "rms_norm_eps": 1e-06,
    "rope_axes_dim": [24, 20, 20],
    "rope_theta": 5000000.0,
    "sound_dim": None,
    "sound_gen": False,
    "timestep_scale": 0.001,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000,
    "use_und_k_norm_for_gen": False,
    "vocab_size": 151936,
}

NANO_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 160,
    "decoder_base_dim": 256,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "in_channels": 12,
    "is_residual": True,
    # a plausible spread; the real 48 numbers come with the real checkpoint
    "latents_mean": [round(0.3 * ((7 * c) % 11 - 5) / 5, 4) for c in range(48)],
    "latents_std": [round(0.4 + 0.3 * ((5 * c) % 13) / 12, 4) for c in range(48)],
    "num_res_blocks": 2,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 48,
}

NANO_SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 1.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "sigma_max": 200.0,
    "sigma_min": 0.147,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": True,
}

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "Cosmos3OmniPipeline",
    "default_use_system_prompt": False,
    "enable_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "sound_tokenizer": [None, None],
    "text_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Cosmos3OmniTransformer"],
    "use_native_flow_schedule": False,
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of `transformer/`, the unused `norm` and `lm_head` included."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    patch, action, domains = (
        config["patch_latent_dim"],
        config["action_dim"],
        config["num_embodiment_domains"],
    )
    shapes: Shapes = {"action_modality_embed": (hidden,), "embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{layer}.{k}": v for k, v in _layer_shapes(config).items()}
    return shapes | {
        "norm.weight": (hidden,),
        "norm_moe_gen.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "proj_in.weight": (hidden, patch),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (patch, hidden),
        "proj_out.bias": (patch,),
        "time_embedder.linear_1.weight": (hidden, 256),
        "time_embedder.linear_1.bias": (hidden,),
        "time_embedder.linear_2.weight": (hidden, hidden),
        "time_embedder.linear_2.bias": (hidden,),
        "action_proj_in.fc.weight": (domains, action * hidden),
        "action_proj_in.bias.weight": (domains, hidden),
        "action_proj_out.fc.weight": (domains, hidden * action),
        "action_proj_out.bias.weight": (domains, action),
    }


def _layer_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {}
    towers = (
        (("to_q", "to_k", "to_v", "to_out"), ("norm_q", "norm_k"), ""),
        (
            ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ("norm_added_q", "norm_added_k"),
            "_moe_gen",
        ),
    )
    for linears, norms, suffix in towers:
        sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
        for name, size in zip(linears, sizes, strict=True):
            shapes[f"self_attn.{name}.weight"] = size
        shapes |= {f"self_attn.{name}.weight": (head,) for name in norms}
        shapes |= {
            f"mlp{suffix}.gate_proj.weight": (inner, hidden),
            f"mlp{suffix}.up_proj.weight": (inner, hidden),
            f"mlp{suffix}.down_proj.weight": (hidden, inner),
            f"input_layernorm{suffix}.weight": (hidden,),
            f"post_attention_layernorm{suffix}.weight": (hidden,),
        }
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of `vae/` (the residual kind, Wan2.2)."""
    z, mult, blocks = config["z_dim"], list(config["dim_mult"]), config["num_res_blocks"]
    down = list(config["temperal_downsample"])
    widths = [config["base_dim"] * m for m in [1, *mult]]
    shapes = _conv("encoder.conv_in", config["in_channels"], widths[0], 3, 3, 3)
    for level, (narrow, wide) in enumerate(pairwise(widths)):
        at = f"encoder.down_blocks.{level}"
        for block in range(blocks):
            shapes |= _resnet(f"{at}.resnets.{block}", wide if block else narrow, wide)
        if level < len(mult) - 1:
            shapes |= _conv(f"{at}.downsampler.resample.1", wide, wide, 3, 3)
            if down[level]:
                shapes |= _conv(f"{at}.downsampler.time_conv", wide, wide, 3, 1, 1)
    shapes |= _middle("encoder", widths[-1]) | _conv("encoder.conv_out", widths[-1], 2 * z, 3, 3, 3)
    shapes |= _conv("quant_conv", 2 * z, 2 * z, 1, 1, 1) | _conv("post_quant_conv", z, z, 1, 1, 1)

    widths = [config["decoder_base_dim"] * m for m in [mult[-1], *mult[::-1]]]
    shapes |= _conv("decoder.conv_in", z, widths[0], 3, 3, 3) | _middle("decoder", widths[0])
    for level, (wide, narrow) in enumerate(pairwise(widths)):
        at = f"decoder.up_blocks.{level}"
        for block in range(blocks + 1):
            shapes |= _resnet(f"{at}.resnets.{block}", narrow if block else wide, narrow)
        if level < len(mult) - 1:
            shapes |= _conv(f"{at}.upsampler.resample.1", narrow, narrow, 3, 3)
            if down[::-1][level]:
                shapes |= _conv(f"{at}.upsampler.time_conv", narrow, 2 * narrow, 3, 1, 1)
    shapes["decoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
    return shapes | _conv("decoder.conv_out", widths[-1], config["out_channels"], 3, 3, 3)


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.norm1.gamma": (inputs, 1, 1, 1),
        f"{name}.norm2.gamma": (outputs, 1, 1, 1),
    }
    shapes |= _conv(f"{name}.conv1", inputs, outputs, 3, 3, 3)
    shapes |= _conv(f"{name}.conv2", outputs, outputs, 3, 3, 3)
    if inputs != outputs:
        shapes |= _conv(f"{name}.conv_shortcut", inputs, outputs, 1, 1, 1)
    return shapes


def _middle(side: str, width: int) -> Shapes:
    """The mid block, and for the encoder the norm after it."""
    at = f"{side}.mid_block"
    shapes: Shapes = {f"{at}.attentions.0.norm.gamma": (width, 1, 1)}
    shapes |= _conv(f"{at}.attentions.0.to_qkv", width, 3 * width, 1, 1)
    shapes |= _conv(f"{at}.attentions.0.proj", width, width, 1, 1)
    for block in range(2):
        shapes |= _resnet(f"{at}.resnets.{block}", width, width)
    if side == "encoder":
        shapes["encoder.norm_out.gamma"] = (width, 1, 1, 1)
    return shapes
