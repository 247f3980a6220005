"""The whole model through the fused sum, its ranks threads of this process, against one rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_fixtures import fill, noise
from sum_cases import error

from cosmos3_fast import ops, parallel_sum
from cosmos3_fast.config import CheckpointConfig
from cosmos3_fast.model import Cosmos3Transformer, GenInputs
from cosmos3_fast.parallel import Mesh, Symmetric
from cosmos3_fast.parallel_sum import RowSums, SumMemory
from cosmos3_fast.testing import make_tiny_checkpoint

CPU = torch.device("cpu")
PATCHES, ACTIONS, CAPACITY = 13, 5, 32
PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (9, 8, 7))
USED = torch.arange(1, PATCHES), torch.tensor([0, 2, 4])  # what the last layer still computes
# Largest fused sum, and how many a rank makes: 4 for each of 6 prompts, 6 for each of 4 calls. The
# smaller limit leaves both branches' first four to all-reduces.
LIMITS = {"every sum": (1 << 30, 48), "not whole branches": (2 * (12 + 3) * 64 * 4, 40)}


class Poisoned(SumMemory):
    """Whatever is read before it is written spoils the result."""

    def __init__(self, *given):
        super().__init__(*given)
        for tensor in (self.part, self.normed, self.residual):
            tensor.fill_(torch.nan)


class Shared(Mesh):
    """Thread ranks that address each other's memory as GPUs do."""

    def __init__(self, rank, board, barrier):
        super().__init__(CPU, tp_size=len(board))
        self.rank = self.tp_rank = rank
        self.board, self.wait = board, barrier.wait

    def everyones(self, tensor):
        self.board[self.tp_rank] = tensor
        self.wait()
        found = list(self.board)
        self.wait()
        return found

    def all_reduce(self, x, axis="tp"):
        return x.copy_(sum(self.everyones(x.clone())))

    def symmetric(self, shape, dtype=torch.uint8, axis="tp"):
        tensor = torch.zeros(shape, dtype=dtype)
        return Symmetric(tensor, tuple(one.data_ptr() for one in self.everyones(tensor)), axis)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 key/value heads, which 4 ranks divide."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("eight"))


@pytest.fixture
def fused(monkeypatch):
    """Rows of each sum that one kernel makes."""
    calls, launch = [], ops._sum_add_rms_norm

    def counted(part, residual, weight, eps, memory, *, whole=False):
        calls.append(part.shape[0])
        return launch(part, residual, weight, eps, memory, whole=whole)

    monkeypatch.setattr(ops, "_sum_add_rms_norm", counted)
    monkeypatch.setattr(ops, "peer_kernels", lambda device: True)
    monkeypatch.setattr(RowSums, "_peers", property(lambda sums: sums.mesh.tp_size > 1))
    monkeypatch.setattr(parallel_sum, "SumMemory", Poisoned)
    return calls


def inputs_for(network, groups, seed):
    """One call's inputs, of which the prompts' keys and values are the rank's own."""
    config, attention, tokens = network.config, network.gen[0].attention, PATCHES + ACTIONS
    und = torch.zeros(2, len(network.gen), groups, CAPACITY, attention.kv_heads, attention.dim)
    for branch, prompt in enumerate(PROMPTS[:groups]):
        und[:, :, branch, : len(prompt)] = torch.stack(network.encode_prompt(prompt))
    angles = noise(groups, tokens, config.head_dim // 2, seed=seed)
    return GenInputs(
        video=noise(PATCHES, config.patch_latent_dim, seed=seed + 1),
        action=noise(ACTIONS, config.action_dim, seed=seed + 2),
        adapter=network.adapter(3),
        table=0.1 * noise(4, config.hidden_size, seed=seed + 3),
        step=torch.tensor([2], dtype=torch.int32),
        noisy=(torch.arange(tokens) % 3 != 0).to(torch.uint8),
        cos=angles.cos(),
        sin=angles.sin(),
        und_k=und[0],
        und_v=und[1],
        und_len=torch.tensor([len(p) for p in PROMPTS[:groups]], dtype=torch.int32),
        video_rows=USED[0],
        action_rows=USED[1],
    )


@torch.no_grad()
def velocities(mesh, folder):
    """One and two branches, two inputs each, on memory that the calls share."""
    config = CheckpointConfig.read(folder).transformer
    network = Cosmos3Transformer(config, mesh, device=CPU, dtype=torch.float32, deadline=20)
    fill(network, folder)
    width = PATCHES * config.patch_latent_dim + ACTIONS * config.action_dim
    found = []
    for groups, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        given = inputs_for(network, groups, seed)
        found.append(network.velocity(given, torch.zeros(groups, width)))
    assert network.failure() is None
    return torch.cat(found)


def over_threads(size, folder):
    """`velocities` of every rank."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=20)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Shared(rank, board, barrier) for rank in range(size)]
        return list(pool.map(velocities, ranks, [folder] * size))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("limit", LIMITS)
def test_the_fused_ranks_compute_what_one_does(monkeypatch, folder, fused, size, limit):
    nbytes, count = LIMITS[limit]
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {size: nbytes})
    whole = velocities(Mesh.single(), folder)
    assert not fused
    for got in (ranks := over_threads(size, folder)):
        assert torch.equal(got, ranks[0])
        assert error(got, whole) <= 2e-6
    assert len(fused) == size * count


def test_a_residual_left_in_shares_is_seen(monkeypatch, folder, fused):
    """Planted: the last layer's first norm does not complete the residual that it cuts rows of."""
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {2: 1 << 30})
    launch = ops.sum_add_rms_norm
    monkeypatch.setattr(ops, "sum_add_rms_norm", lambda *given, whole: launch(*given, whole=False))
    whole = velocities(Mesh.single(), folder)
    assert all(error(got, whole) > 1e-2 for got in over_threads(2, folder))
