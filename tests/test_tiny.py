"""testing: seeded weights, the real model's shapes, and a tiny checkpoint that diffusers loads."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from cosmos3_fast.checkpoint import STEM, Slot, open_checkpoint
from cosmos3_fast.config import CheckpointConfig, SchedulerConfig, TransformerConfig, VAEConfig
from cosmos3_fast.loader import load
from cosmos3_fast.testing import (
    NANO_SCHEDULER,
    NANO_TRANSFORMER,
    NANO_VAE,
    fill_random,
    make_tiny_checkpoint,
    random_tensor,
    transformer_shapes,
    vae_shapes,
    write_sharded,
)
from cosmos3_fast.testing.shapes import MODEL_INDEX


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), kv_heads=2)


def read_all(folder):
    return {name: lazy.read().clone() for name, lazy in open_checkpoint(folder).items()}


@pytest.mark.parametrize("index", [(), (slice(3, 7),), (slice(None), slice(1, 4))], ids=str)
def test_fill_is_a_slice_of_one_model(index):
    full = random_tensor("a.weight", (9, 5), 4)
    target = torch.empty_like(full[index or ...])
    fill_random({"other": Slot(torch.empty(3), (3,)), "a.weight": Slot(target, (9, 5), index)}, 4)
    assert torch.equal(target, full[index or ...])


def test_values_depend_on_key_and_seed():
    values = [random_tensor(key, (50,), seed) for key, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert torch.equal(values[0], random_tensor("a", (50,), 0))
    assert all(abs(torch.corrcoef(torch.stack(values))[i, j]) < 0.5 for i, j in ((0, 1), (0, 2)))


@pytest.mark.parametrize(
    ("key", "shape", "mean", "std"),
    [
        ("layers.0.mlp.down_proj.weight", (64, 1024), 0, 1 / 32),
        ("layers.0.input_layernorm_moe_gen.weight", (4096,), 1, 0.1),
        ("layers.0.self_attn.norm_added_k.weight", (4096,), 1, 0.1),
        ("norm_moe_gen.weight", (4096,), 1, 0.1),
        ("decoder.norm_out.gamma", (4096, 1, 1, 1), 1, 0.1),
        ("encoder.conv_in.weight", (64, 12, 3, 3, 3), 0, 1 / 18),
        ("embed_tokens.weight", (600, 64), 0, 1),
        ("action_proj_in.fc.weight", (32, 64 * 64), 0, 1 / 8),
        ("action_proj_in.bias.weight", (32, 64), 0, 0.1),
        ("proj_in.bias", (4096,), 0, 0.1),
        ("action_modality_embed", (4096,), 0, 0.1),
    ],
)
def test_scales(key, shape, mean, std):
    values = random_tensor(key, shape, 0)
    assert values.std().item() == pytest.approx(std, rel=0.06)
    assert values.mean().item() == pytest.approx(mean, abs=6 * std / math.sqrt(values.numel()))


def test_nano_parameter_counts():
    """6.946e9 a tower and 704.7 M in the VAE (docs/model.md, sections 1 and 7)."""
    shapes = transformer_shapes(NANO_TRANSFORMER)
    und = sum(math.prod(s) for n, s in shapes.items() if n.startswith("layers.") and "to_q" in n)
    assert und == 36 * 4096 * 4096
    gen = ("add_", "to_add", "norm_added", "moe_gen")
    tower = [
        math.prod(s)
        for n, s in shapes.items()
        if n.startswith("layers.") and any(part in n for part in gen)
    ]
    assert sum(tower) == pytest.approx(6.946e9, rel=1e-4)
    assert sum(map(math.prod, vae_shapes(NANO_VAE).values())) == pytest.approx(704.7e6, rel=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_names_and_shapes_are_those_of_diffusers(kv_heads):
    from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer

    changes = {"num_hidden_layers": 2, "num_key_value_heads": kv_heads, "vocab_size": 600}
    for model, config, shapes in (
        (Cosmos3OmniTransformer, NANO_TRANSFORMER | changes, transformer_shapes),
        (AutoencoderKLWan, NANO_VAE, vae_shapes),
    ):
        with torch.device("meta"):
            state = model.from_config(config).state_dict()
        assert shapes(config) == {name: tuple(value.shape) for name, value in state.items()}


def test_configs_are_read(tiny):
    nano = TransformerConfig.from_dict(NANO_TRANSFORMER)
    assert nano == TransformerConfig()
    assert VAEConfig.from_dict(NANO_VAE).decoder_base_dim == 256
    assert SchedulerConfig.from_dict(NANO_SCHEDULER).sigma_max == 200
    config = CheckpointConfig.read(tiny)
    assert config.transformer.num_key_value_heads == 2 and config.scheduler.use_karras_sigmas
    assert config.vae is not None and config.vae.base_dim == 8


def test_equal_arguments_give_equal_files(tmp_path):
    first, second, other = (
        make_tiny_checkpoint(tmp_path / name, seed=seed, layers=1, shard_bytes=1 << 20)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    assert any((first / f).read_bytes() != (other / f).read_bytes() for f in files)
    assert sum(f.suffix == ".safetensors" for f in files) > 2


def test_all_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        tiny = make_tiny_checkpoint(tmp_path / "tiny", layers=1, shard_bytes=1 << 20)
    finally:
        os.umask(before)
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert sum(path.suffix == ".safetensors" for path in files) > 2


def test_kv_heads_must_divide(tmp_path):
    with pytest.raises(ValueError, match=r"heads 8 .* kv_heads 3"):
        make_tiny_checkpoint(tmp_path, kv_heads=3)
    assert not any(tmp_path.iterdir())


def test_only_a_tiny_checkpoint_is_written_over(tmp_path):
    """The mark stands in the first file, so half a checkpoint has it as well."""
    tiny = make_tiny_checkpoint(tmp_path / "tiny", seed=1, layers=1)
    (tiny / "transformer" / "config.json").unlink()
    assert (make_tiny_checkpoint(tiny, layers=1) / "transformer" / "config.json").is_file()
    for index in (None, "{}", "[]", "no json", json.dumps(MODEL_INDEX)):
        if index is None:
            (tiny / "model_index.json").unlink()
        else:
            (tiny / "model_index.json").write_text(index)
        before = {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="tiny must be empty or hold a tiny checkpoint"):
            make_tiny_checkpoint(tiny, seed=2, layers=1)
        assert before == {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}


def test_vocabulary_covers_every_token(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "text_tokenizer")
    vocab = json.loads((tiny / "transformer" / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) <= vocab < len(tokenizer) + 8
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") < vocab


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_diffusers_loads_the_tiny_checkpoint_strictly(tiny, part):
    from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer

    model = {"transformer": Cosmos3OmniTransformer, "vae": AutoencoderKLWan}[part]
    loaded, info = model.from_pretrained(tiny, subfolder=part, output_loading_info=True)
    assert not any(info.values()), info
    ours = read_all(tiny / part)
    state = loaded.state_dict()
    assert set(state) == set(ours) and all(torch.equal(state[n], ours[n]) for n in ours)


@pytest.mark.parametrize("size", ["10GB", "500KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_what_diffusers_saves_is_read_back(tiny, tmp_path, part, size):
    from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer

    model = {"transformer": Cosmos3OmniTransformer, "vae": AutoencoderKLWan}[part]
    model.from_pretrained(tiny, subfolder=part).save_pretrained(tmp_path, max_shard_size=size)
    assert (size == "500KB") == (tmp_path / f"{STEM}.safetensors.index.json").is_file()
    ours, theirs = read_all(tiny / part), read_all(tmp_path)
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = json.loads((tmp_path / "config.json").read_text())
    reader = {"transformer": TransformerConfig, "vae": VAEConfig}[part]
    mine = json.loads((tiny / part / "config.json").read_text())
    assert reader.from_dict(config) == reader.from_dict(mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_diffusers_pipeline_runs_one_step(tiny, dtype):
    """Everything finite, of order one: the demo is no blank screen and no overflow."""
    from diffusers import Cosmos3OmniPipeline
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
    from PIL import Image

    pipeline = Cosmos3OmniPipeline.from_pretrained(tiny, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.linear_gradient("L").convert("RGB").resize((256, 256))
    condition = CosmosActionCondition(
        mode="policy", chunk_size=4, domain_name="umi", resolution_tier=256, image=image
    )
    out = pipeline(
        "pick up the cup",
        action=condition,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
        use_system_prompt=False,
        generator=torch.Generator().manual_seed(0),
    )
    video, action = torch.as_tensor(out.video[0]).float(), torch.as_tensor(out.action[0]).float()
    assert video.isfinite().all() and action.isfinite().all()
    assert 0.1 < video.std() < 0.45 and 0.2 < action.std() < 5
    clipped = ((video <= 0) | (video >= 1)).float().mean()
    assert clipped < 0.3


def test_the_writer_is_streamed_and_exact(tmp_path):
    shapes = transformer_shapes(NANO_TRANSFORMER | {"hidden_size": 8, "num_hidden_layers": 1})
    shapes = {name: shape for name, shape in shapes.items() if math.prod(shape) < 10_000}
    files = write_sharded(tmp_path, shapes, dtype=torch.float32, shard_bytes=1000)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 4 * sum(map(math.prod, shapes.values()))
    for file in files[:-1]:
        held = load_file(file)
        total = sum(value.nbytes for value in held.values())
        assert total <= 1000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    slots = {n: Slot(torch.empty(s), s) for n, s in shapes.items()}
    assert load(slots, open_checkpoint(tmp_path)).tensors == len(shapes)
