"""The engine over several ranks on the CPU: one result, and errors that every rank raises alike.

The same lines run as on one rank; TP sums in another order, so its numbers are equal up to
rounding, and equal bit for bit among the ranks.
"""

from pathlib import Path

import oracle
import pytest
import torch
from engine_fixtures import counted, engine_args, equal, ids, noise, request
from ranks import argument, run_cases

from cosmos3_fast import Engine, EngineArgs, EngineConfig, ParallelConfig
from cosmos3_fast.testing import make_tiny_checkpoint

PIXELS = {
    "cond_video_latents": None,
    "cond_video_pixels": noise(1, 3, 1, 80, 96, seed=6).clamp(-1, 1),
}
REQUESTS = {
    "guided": {},
    "one branch": {"guidance_scale": 1.0},
    "interval": {"guidance_interval": (900, 1000), "num_inference_steps": 3},
    "pixels": PIXELS | {"text": ids(30, seed=3)},
    "guided again": {},
}


def build(cfg_size=1, tp_size=1, folder=None):
    single = engine_args(Path(folder or argument("folder")), decode_video=True)
    parallel = ParallelConfig(cfg_size * tp_size, cfg_size, tp_size)
    config = EngineConfig(single.config.device, parallel, single.config.runtime)
    return Engine(EngineArgs(plugin_args=single.plugin_args, config=config))


def answers(engine):
    """Every request's tensors under "name key"."""
    found = {}
    for name, changes in REQUESTS.items():
        result = engine.step(request(**changes))
        found |= {f"{name} {key}": tensor.clone() for key, tensor in result.items()}
    return found


def said(call, *args):
    try:
        call(*args)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def case_engine():
    """One engine from start to end: answers, refusals, caches that differ, and at last a failure.

    One engine alone, as the launch's store ends with rank 0's.
    """
    with build(argument("cfg"), argument("tp")) as engine:
        return answers(engine) | refusals(engine) | caches(engine) | failure(engine)


def refusals(engine):
    """Errors of one rank alone, then a request that all ranks answer."""
    mine = engine.mesh.rank == 1
    found = {
        "seed": said(engine.step, request(seed=43 if mine else 42)),
        "text": said(engine.step, request(text=ids(19, seed=5) if mine else ids(19))),
        "steps": said(engine.step, request(num_inference_steps=0 if mine else 2)),
        "refuse": said(engine.refuse, ValueError("no such picture"))
        if mine
        else said(engine.step, request()),
    }
    with counted(engine) as calls:
        said(engine.step, request(seed=1 if mine else 2))
    return found | {"calls": len(calls), "after": engine.step(request())["action"]}


def caches(engine):
    """A rank that lost its caches makes the others start without theirs; the bits stay."""
    first = engine.step(request())
    if engine.mesh.rank == 0:
        engine._prompts.clear()
        engine._runners.clear()
    return {"caches": equal(first, engine.step(request()))}


def failure(engine):
    """After an error past the checks the engine of several ranks refuses to go on."""
    engine.model.proj_out.bias[0] = float("nan")
    return {"first": said(engine.step, request()), "second": said(engine.step, request())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("ranks"), kv_heads=2)


@pytest.fixture(scope="module")
def single(folder):
    with build(folder=folder) as engine:
        return answers(engine)


@pytest.fixture(scope="module", params=[(2, 1), (1, 2), (2, 2)], ids=["cfg2", "tp2", "cfg2-tp2"])
def ranks(request, folder):
    cfg, tp = request.param
    arguments = {"folder": str(folder), "cfg": cfg, "tp": tp}
    return run_cases(cfg * tp, [case_engine], timeout=90, arguments=arguments)["case_engine"]


def tensors(result):
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def test_all_ranks_give_the_bits_of_rank_0(ranks):
    first, *others = map(tensors, ranks)
    assert all(equal(first, other) for other in others)


def test_several_ranks_compute_what_one_does(ranks, single):
    for name, want in single.items():
        assert oracle.error(ranks[0][name], want) <= 1e-5, name


def test_what_came_between_changes_no_bit(ranks):
    for key in ("action", "video", "pixels"):
        assert torch.equal(ranks[0][f"guided {key}"], ranks[0][f"guided again {key}"])


def test_an_error_of_one_rank_is_an_error_of_all(ranks, single):
    expected = {
        "seed": "ValueError: the ranks disagree: seed is 42 on rank",
        "text": "ValueError: the ranks disagree: text_ids is ",
        "steps": "ValueError: rank 1: num_inference_steps must be a positive integer, got 0",
        "refuse": "ValueError: rank 1: no such picture",
    }
    for result in ranks:
        for name, text in expected.items():
            said_here = result[name]
            bare = name == "refuse" and said_here == "ValueError: no such picture"
            assert said_here.startswith(text) or bare, name
        assert result["calls"] == 0
        assert oracle.error(result["after"], single["guided action"]) <= 1e-5


def test_ranks_that_cached_different_things_stay_together(ranks):
    assert all(result["caches"] for result in ranks)


def test_an_engine_of_several_ranks_must_be_rebuilt_after_a_failure(ranks):
    for result in ranks:
        assert result["first"].startswith("FloatingPointError: not finite")
        assert "must be rebuilt: FloatingPointError" in result["second"]
