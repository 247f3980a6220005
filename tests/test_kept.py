"""What an engine keeps from one request for the next, and when it must let it go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_fixtures import engine_args, noise, request

from cosmos3_fast import Engine, RuntimeConfig, agreement
from cosmos3_fast.cache import BoundedCache
from cosmos3_fast.kept import DECODER, MAX_ENCODERS, Kept


def test_room_is_made_before_a_value_is():
    """Two captured shapes never share the device's memory."""
    said = []
    cache = BoundedCache(1, lambda value: said.append(f"{value} goes"))
    for key in "ab":
        cache.get(key, lambda key=key: said.append(f"{key} is made") or key)
    assert said == ["a is made", "a goes", "b is made"]


def test_a_look_does_not_count_as_use():
    cache = BoundedCache(2)
    for key in "ab":
        cache.get(key, lambda key=key: key)
    assert (cache.peek("a"), cache.peek("c")) == ("a", None)
    cache.get("c", lambda: "c")
    assert "a" not in cache and "b" in cache


def test_the_last_encoders_are_kept():
    kept, device = Kept(RuntimeConfig()), torch.device("cpu")
    vae = SimpleNamespace(dtype=torch.float32, encode=lambda pixels: pixels + 1)
    shapes = [(1, 3, 1, 16, 16 * (1 + i)) for i in range(MAX_ENCODERS + 1)]
    for shape in shapes:
        x = noise(*shape)
        assert torch.equal(kept.encoders.encode(vae, x, device, capture=False), x + 1)
    assert [shape in kept.encoders for shape in shapes] == [False] + [True] * MAX_ENCODERS


def test_a_step_counts_as_had_only_once_it_is_prepared():
    """A runner that has run guided steps alone must still make its unguided one."""
    with Engine(engine_args()) as engine:
        engine.step(request())
        asked = request(guidance_interval=(990, 1000))
        plan, noise_of_it, _ = engine._agree(asked)
        noise_of_it.result()
        assert plan.guided == (True, False)

        def steps():
            held = engine._kept.state(plan, asked, engine.mesh, decode=False)
            return {name: there for name, there in held.items() if name.startswith("step")}

        assert steps() == {"step True": True, "step False": False}
        engine.step(asked)
        assert steps() == {"step True": True, "step False": True}


@pytest.mark.parametrize(
    ("differ", "left"),
    [(DECODER, 1), ("step True", 0), ("prompt 0 of group 0", 0)],
    ids=["decoder", "step", "prompt"],
)
def test_caches_go_where_ranks_differ_in_what_they_compute_together(monkeypatch, differ, left):
    """cuDNN's search of the decoder is a rank's own matter."""
    with Engine(engine_args()) as engine:
        engine.step(request())
        told = {"step True": True, "prompt 0 of group 0": True, DECODER: True, differ: None}
        monkeypatch.setattr(agreement, "agree", lambda *_, **__: told)
        *_, ready = engine._agree(request())
        assert not ready and len(engine._kept.runners) == left
        assert bool(engine._kept.prompts) == bool(left)
