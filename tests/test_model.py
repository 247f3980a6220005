"""The two towers against diffusers' transformer, and their slices against the whole."""

import functools
import threading

import oracle
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos3
from engine_fixtures import checkpoint, equal, fill, ids, noise, request

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import open_checkpoint
from cosmos3_fast.config import CheckpointConfig, TransformerConfig
from cosmos3_fast.graph import ShapeKey, StepRunner
from cosmos3_fast.latents import flatten, masks, split
from cosmos3_fast.layers.residual import Residual
from cosmos3_fast.layers.rotary import inverse_frequencies, media_positions
from cosmos3_fast.loader import unfilled
from cosmos3_fast.model import Cosmos3Transformer, parameter_bytes
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.request import layout
from cosmos3_fast.testing import make_tiny_checkpoint

CPU = torch.device("cpu")
REQUESTS = {
    "policy": {},
    "odd height and width": {"video_shape": (2, 5, 7), "cond_video_latents": noise(1, 48, 2, 5, 7)},
    "forward dynamics": {"mode": "forward_dynamics", "cond_action": noise(1, 4, 64)},
    "inverse dynamics": {"mode": "inverse_dynamics"},
    "one latent frame": {"video_shape": (1, 4, 4), "cond_video_latents": noise(1, 48, 1, 4, 4)},
    "state row at 15 fps": {"clean_action": noise(1, 1, 10), "fps": 15.0},
    "no clean frame": {"cond_frame_indexes": ()},
    "another embodiment": {"domain_id": 1, "raw_action_dim": 9},
    "prompt of one token": {"text": ids(1)},
}


@functools.cache
def config():
    return CheckpointConfig.read(checkpoint()).transformer


@functools.cache
def model():
    return fill(Cosmos3Transformer(config(), Mesh.single(), device=CPU, dtype=torch.float32))


def loaded(network, asked, timestep=833):
    """A runner whose buffers hold this request at one timestep, and its layout."""
    shape = layout(asked, config())
    mask = masks(shape, asked.raw_action_dim)
    prompt = tuple(asked.text_ids[0].tolist())
    runner = StepRunner(ShapeKey.of(shape, mask, 1, len(prompt), 1), shape, network, capture=False)
    runner.set_domain(asked.domain_id)
    runner.set_masks(shape, asked.raw_action_dim, mask)
    runner.set_positions(
        0, 0, lambda: media_positions(shape, len(prompt), asked.fps, config(), CPU)
    )
    runner.set_schedule((timestep,), torch.zeros(1, 10))
    runner.set_prompt(0, prompt, network.encode_prompt(prompt))
    return runner, shape


def inputs_of(asked, shape):
    video = noise(1, 48, *asked.video_shape, seed=11)
    action = noise(1, shape.rows, 64, seed=12)
    action[..., asked.raw_action_dim :] = 0
    return video, action


@pytest.mark.parametrize("timestep", [999, 1])
@pytest.mark.parametrize("name", REQUESTS)
def test_one_call_equals_diffusers(name, timestep):
    asked = request(**REQUESTS[name])
    runner, shape = loaded(model(), asked, timestep)
    video, action = inputs_of(asked, shape)
    runner.model_in.copy_(flatten(video, action, shape))
    with torch.no_grad():
        model().velocity(runner.inputs, runner.velocity)
    got_video, got_action = split(runner.velocity[0], shape)
    got_action[..., asked.raw_action_dim :] = 0
    want_video, want_action = oracle.velocity(
        oracle.transformer(checkpoint(), torch.float32),
        asked.text_ids[0].tolist(), video, action[0], timestep, oracle.Plan.of(asked),
        domain=asked.domain_id, raw=asked.raw_action_dim, fps=asked.fps,
    )  # fmt: skip
    want_video = want_video.reshape(got_video.shape)
    for got, want in ((got_video, want_video), (got_action[0], want_action)):
        if want.any():
            assert oracle.error(got, want) <= 2e-6
        else:
            assert not got.any(), "a clean token has a velocity"


def test_bf16_errs_no_more_than_twice_what_diffusers_does(tmp_path):
    """Both networks hold the same bf16 weights; the truth is theirs in fp32."""
    folder = make_tiny_checkpoint(tmp_path, kv_heads=2, dtype=torch.bfloat16)
    network = Cosmos3Transformer(config(), Mesh.single(), device=CPU, dtype=torch.bfloat16)
    fill(network, folder)
    asked = request()
    runner, shape = loaded(network, asked)
    video, action = (x.bfloat16().float() for x in inputs_of(asked, shape))
    runner.model_in.copy_(flatten(video, action, shape))
    with torch.no_grad():
        network.velocity(runner.inputs, runner.velocity)
    got = split(runner.velocity[0].float(), shape)
    truth, theirs = (
        oracle.velocity(
            oracle.transformer(folder, dtype), asked.text_ids[0].tolist(), video, action[0], 833,
            oracle.Plan.of(asked), domain=8, raw=10, fps=24.0,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    for part, cut in ((0, 64), (1, 10)):
        want = truth[part].reshape(got[part].shape)[..., :cut]
        other = theirs[part].reshape(got[part].shape)[..., :cut]
        allowed = 2 * oracle.error(other, want)
        assert oracle.error(got[part][..., :cut], want) <= allowed


def test_frequencies_are_diffusers_bit_for_bit():
    """Nano's: rounded from float64 some of them would differ."""
    nano = TransformerConfig()
    arguments = nano.head_dim, nano.rope_theta, nano.rope_axes_dim
    want = transformer_cosmos3.Cosmos3VLTextRotaryEmbedding(*arguments).inv_freq
    assert torch.equal(inverse_frequencies(nano), want)


def test_the_modality_embedding_is_rounded_apart(tmp_path):
    """bf16: the projection is rounded, then its sum with the embedding."""
    folder = make_tiny_checkpoint(tmp_path, kv_heads=2, dtype=torch.bfloat16)
    network = Cosmos3Transformer(config(), Mesh.single(), device=CPU, dtype=torch.bfloat16)
    runner, shape = loaded(fill(network, folder), request())
    inputs = runner.inputs
    runner.model_in.copy_(flatten(*inputs_of(request(), shape), shape))
    inputs.noisy.zero_()  # no timestep on top
    projected = inputs.action.double() @ inputs.adapter.w_in.double() + inputs.adapter.b_in
    want = projected.bfloat16() + network.action_modality_embed
    got = network._embed(inputs)[shape.video_tokens :]
    assert want.shape == got.shape and (got != want).float().mean() < 0.01


def test_every_parameter_has_a_slot_and_every_slot_a_tensor():
    assert not unfilled(dict(model().named_parameters()), model().slots())
    names = set(open_checkpoint(checkpoint() / "transformer"))
    assert {"lm_head.weight", "norm.weight"} == names - set(model().slots())


def test_parameter_bytes_count_every_weight():
    tensors = open_checkpoint(checkpoint() / "transformer")
    read = sum(t.nbytes for name, t in tensors.items() if name in model().slots())
    assert parameter_bytes(model()) == read


def test_both_branches_in_one_call_equal_each_alone():
    """The tokens are shared; prompts, their lengths and the positions differ."""
    asked = request()
    shape = layout(asked, config())
    mask = masks(shape, 10)
    prompts = [tuple(ids(19)[0].tolist()), tuple(ids(7, seed=1)[0].tolist())]
    runner = StepRunner(ShapeKey.of(shape, mask, 2, 19, 1), shape, model(), capture=False)
    runner.set_domain(8)
    runner.set_masks(shape, 10, mask)
    runner.set_schedule((833,), torch.zeros(1, 10))
    for branch, prompt in enumerate(prompts):
        where = functools.partial(media_positions, shape, len(prompt), 24.0, config(), CPU)
        runner.set_positions(branch, 0, where)
        runner.set_prompt(branch, prompt, model().encode_prompt(prompt))
    runner.model_in.copy_(flatten(*inputs_of(asked, shape), shape))
    with torch.no_grad():
        both = model().velocity(runner.inputs, torch.zeros(2, shape.values))
        for branch in (0, 1):
            alone = runner.inputs.branches(branch, branch + 1)
            one = model().velocity(alone, torch.zeros(1, shape.values))
            assert oracle.error(both[branch], one[0]) <= 1e-6
    assert oracle.error(both[0], both[1]) > 1e-3


def test_the_last_layer_computes_only_the_rows_that_are_used(monkeypatch):
    """Queries are cut to the noisy tokens before the last attention; the others change nothing."""
    asked = request()
    runner, shape = loaded(model(), asked)
    runner.model_in.copy_(flatten(*inputs_of(asked, shape), shape))
    rows = []
    attention = ops.attention

    def seen(q, *rest):
        rows.append(q.shape[1])
        return attention(q, *rest)

    monkeypatch.setattr(ops, "attention", seen)
    with torch.no_grad():
        cut = model().velocity(runner.inputs, torch.zeros(1, shape.values))
        noisy = int(masks(shape, 10).tokens.sum())
        assert rows == [shape.tokens, shape.tokens, noisy]
        every = vars(runner.inputs) | {
            "video_rows": torch.arange(shape.video_tokens),
            "action_rows": torch.arange(shape.rows),
        }
        whole = model().velocity(type(runner.inputs)(**every), torch.zeros(1, shape.values))
    used = cut != 0
    assert used.sum() == noisy_values(shape)
    assert oracle.error(cut[used], whole[used]) <= 1e-6


def noisy_values(shape):
    found = masks(shape, 64)
    return len(found.video_rows) * shape.patch_dim + len(found.action_rows) * 64


def test_the_last_und_layer_stops_after_its_keys_and_values(monkeypatch):
    calls = []
    causal = ops.causal_attention
    monkeypatch.setattr(ops, "causal_attention", lambda *a: calls.append(1) or causal(*a))
    keys, values = model().encode_prompt((1, 2, 3))
    assert len(calls) == config().num_hidden_layers - 1
    assert keys.shape == values.shape == (3, 3, 2, 16)
    assert torch.isfinite(keys).all() and torch.isfinite(values).all()


def test_a_prompts_keys_are_those_of_its_beginning():
    """Causal: a longer prompt begins with the same keys and values."""
    short, long = (model().encode_prompt(tuple(range(n))) for n in (5, 9))
    for first, second in zip(short, long, strict=True):
        assert oracle.error(second[:, :5], first) <= 1e-6


class Together(Mesh):
    """Tensor-parallel ranks as threads of this process; all_reduce adds in rank order."""

    def __init__(self, rank, size, board, barrier):
        super().__init__(CPU, tp_size=size)
        self.tp_rank = rank
        self.board, self.wait = board, barrier.wait

    def all_reduce(self, x, axis="tp"):
        self.board[self.tp_rank] = x.clone()
        self.wait()
        total = sum(self.board[1:], start=self.board[0])
        self.wait()
        return x.copy_(total)


def in_threads(size, work, settings):
    """work(mesh) on every rank; their results in rank order."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=60)
    results = [None] * size

    def run(rank):
        try:
            with torch.no_grad():
                results[rank] = work(Together(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results), settings
    return results


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory):
    """8 key/value heads, so that 4 ranks divide them."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("eight"))


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_of_a_group_compute_what_one_does(eight_heads, size):
    wide = CheckpointConfig.read(eight_heads).transformer
    asked = request(video_shape=(2, 5, 7), cond_video_latents=noise(1, 48, 2, 5, 7))

    def work(mesh):
        network = fill(Cosmos3Transformer(wide, mesh, device=CPU, dtype=torch.float32), eight_heads)
        runner, shape = loaded(network, asked)
        runner.model_in.copy_(flatten(*inputs_of(asked, shape), shape))
        velocity = network.velocity(runner.inputs, torch.zeros(1, shape.values))
        keys, values = network.encode_prompt(tuple(range(9)))
        return {"velocity": velocity, "keys": keys, "values": values}

    with torch.no_grad():
        whole = work(Mesh.single())
    ranks = in_threads(size, work, eight_heads)
    for rank, part in enumerate(ranks):
        assert torch.equal(part["velocity"], ranks[0]["velocity"]), "ranks differ"
        assert oracle.error(part["velocity"], whole["velocity"]) <= 2e-6
        heads = slice(rank * 8 // size, (rank + 1) * 8 // size)
        for name in ("keys", "values"):
            assert oracle.error(part[name], whole[name][:, :, heads]) <= 2e-6


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_shards_of_a_layer_sum_to_the_whole(eight_heads, size):
    """What is still to be added on a rank is its own share."""
    wide = CheckpointConfig.read(eight_heads).transformer
    x = noise(7, 64, seed=3)

    def shares(rank, ranks):
        mesh = Mesh(CPU, tp_size=ranks)
        mesh.tp_rank = rank
        network = fill(Cosmos3Transformer(wide, mesh, device=CPU, dtype=torch.float32), eight_heads)
        layer, residual = network.gen[1], Residual(x.clone(), network.sums)
        layer.mlp.add_to(residual, x)
        return residual.x - x if residual.part is None else residual.part

    with torch.no_grad():
        whole = shares(0, 1)
        parts = [shares(rank, size) for rank in range(size)]
    assert oracle.error(sum(parts), whole) <= 2e-6
    assert all(oracle.error(part, whole) > 0.1 for part in parts)


@pytest.mark.parametrize("size", [2, 8])
def test_the_slots_of_all_ranks_cover_the_checkpoint_once(eight_heads, size):
    """Sliced weights are cut, the others are read whole by every rank."""
    wide = CheckpointConfig.read(eight_heads).transformer
    counts = {}
    for rank in range(size):
        mesh = Mesh(CPU, tp_size=size)
        mesh.tp_rank = rank
        meta = torch.device("meta")
        slots = Cosmos3Transformer(wide, mesh, device=meta, dtype=torch.float32).slots()
        for name, slot in slots.items():
            seen = counts.setdefault(name, torch.zeros(slot.shape))
            seen[slot.index or ...] += 1
    for name, seen in counts.items():
        sliced = (
            any(part in name for part in ("self_attn.to_", "add_", "mlp"))
            and "norm" not in (name.split(".")[-2])
        )
        assert seen.unique().tolist() == [1.0 if sliced else float(size)], name


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tp_size 3 does not divide num_attention_heads 8"),
        (4, "tp_size 4 does not divide num_key_value_heads 2"),
    ],
)
def test_heads_that_do_not_divide_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        Cosmos3Transformer(
            config(), Mesh(CPU, tp_size=size), device=torch.device("meta"), dtype=torch.float32
        )


def test_two_calls_give_the_same_bits():
    asked = request()
    results = []
    for _ in range(2):
        runner, shape = loaded(model(), asked)
        runner.model_in.copy_(flatten(*inputs_of(asked, shape), shape))
        with torch.no_grad():
            results.append({"v": model().velocity(runner.inputs, runner.velocity).clone()})
    assert equal(*results)
