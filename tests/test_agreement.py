"""Ranks that hold different things all raise the same error; what is equal has equal digests."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ranks import run_cases

from cosmos3_fast.agreement import _word, agree, digest, facts
from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh


@dataclass(frozen=True)
class Request:
    text_ids: torch.Tensor
    seed: int = 42
    steps: int = 4
    prompt: str | None = None


def _request(**changes: object) -> Request:
    return Request(**({"text_ids": torch.arange(33)[None]} | changes))


def _said(mesh: Mesh, held: dict[str, str], **more: object) -> object:
    try:
        return agree(mesh, held, **more)
    except ValueError as error:
        return str(error)


def case_agree() -> dict[str, object]:
    mesh = Mesh.create(ParallelConfig(4, 2, 2), "cpu", timeout=30)
    rank = mesh.rank
    other = _request(text_ids=torch.arange(33)[None] + (rank == 3))
    got = {
        "same": _said(mesh, facts(_request())),
        "order": _said(mesh, dict(sorted(facts(_request()).items(), reverse=rank == 1))),
        "seed": _said(mesh, facts(_request(seed=42 + (rank == 2)))),
        "prompt": _said(mesh, facts(other)),
        "two": _said(mesh, facts(_request(seed=rank % 2, steps=4 + rank))),
        "missing": _said(mesh, facts(_request(), skip=("steps",) if rank == 1 else ())),
        "file": _said(
            mesh,
            {} if rank == 1 else facts(_request()),
            error=OSError("no a.png") if rank == 1 else None,
        ),
        "all": _said(mesh, {}, error=ValueError("bad") if rank % 2 else "worse"),
        "state": _said(mesh, facts(_request()), state={"prompt": rank != 3, "graph": True}),
        "nobody": _said(mesh, facts(_request()), state={"prompt": False, "graph": None}),
        "branch": _said(mesh, facts(_request()), state={"prompt": None if rank < 2 else False}),
        "next": _said(mesh, facts(_request()), state={"prompt": True}),
    }
    held = facts(_request())
    times = []
    for _ in range(200):
        start = time.perf_counter()
        agree(mesh, held, state={"prompt": True, "graph": True})
        times.append(time.perf_counter() - start)
    got["milliseconds"] = sorted(times)[len(times) // 2] * 1e3
    mesh.close()
    return got


@pytest.fixture(scope="module")
def four() -> list[dict[str, object]]:
    return run_cases(4, [case_agree])["case_agree"]


IDS = [digest(torch.arange(33)[None]), digest(torch.arange(33)[None] + 1)]
EXPECTED = {
    "same": {},
    "order": {},
    "seed": "the ranks disagree: seed is 42 on ranks 0, 1, 3 and 43 on rank 2",
    "prompt": f"the ranks disagree: text_ids is {IDS[0]} on ranks 0, 1, 2 and {IDS[1]} on rank 3",
    "two": "the ranks disagree: seed is 0 on ranks 0, 2 and 1 on ranks 1, 3; "
    "steps is 4 on rank 0 and 5 on rank 1 and 6 on rank 2 and 7 on rank 3",
    "missing": "the ranks disagree: steps is 4 on ranks 0, 2, 3 and absent on rank 1",
    "file": "rank 1: OSError: no a.png",
    "all": "rank 0: worse; rank 1: bad; rank 2: worse; rank 3: bad",
    "state": {"prompt": None, "graph": True},
    "nobody": {"prompt": False, "graph": True},
    "branch": {"prompt": False},
    "next": {"prompt": True},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_rank_hears_the_same(four, name) -> None:
    assert [got[name] for got in four] == [EXPECTED[name]] * 4


def test_one_rank_agrees_with_itself_and_raises_its_own_error() -> None:
    mesh = Mesh.single("cpu")
    assert agree(mesh, facts(_request()), state={"prompt": True}) == {"prompt": True}
    with pytest.raises(ValueError, match=r"^no tokens$"):
        agree(mesh, {}, error=ValueError("no tokens"))


VALUES = {
    "int": 1,
    "bool": True,
    "float": 1.0,
    "next float": float(np.nextafter(1.0, 2.0)),
    "none": None,
    "text of none": "None",
    "fp32": torch.ones(2, 3),
    "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
    "shape": torch.ones(3, 2),
    "one bit": torch.nextafter(torch.ones(2, 3), torch.zeros(2, 3)),
    "minus zero": torch.tensor([-0.0]),
    "zero": torch.tensor([0.0]),
    "integer zero": torch.tensor([0], dtype=torch.int32),
    "empty": torch.empty(0, 3),
    "scalar tensor": torch.tensor(1.0),
    "array": np.arange(6, dtype=np.uint8),
    "list": [1, "a"],
    "dict": {"a": torch.ones(2)},
    "long text": "x" * 41,
    "longer text": "x" * 42,
    "dtype": torch.float32,
    "dataclass": _request(),
    "other dataclass": _request(seed=1),
}


def test_different_values_have_different_digests() -> None:
    digests = {name: digest(value) for name, value in VALUES.items()}
    assert len(set(digests.values())) == len(VALUES), digests


def test_a_short_value_shows_itself_a_long_one_its_hash() -> None:
    assert digest(42) == "42" and digest("x" * 38) == f"{'x' * 38!r}"
    assert all(re.fullmatch("[0-9a-f]{16}", digest("x" * count)) for count in (39, 10_000))


def test_equal_values_have_equal_digests() -> None:
    x = torch.randn(3, 63, generator=torch.Generator().manual_seed(0))
    assert digest(x) == digest(x.T.contiguous().T) == digest(x.clone().requires_grad_())
    assert digest({"b": 1, "a": x}) == digest({"a": x, "b": 1})
    assert digest(x.numpy()) == digest(np.asfortranarray(x.numpy()))
    assert digest(_request()) == digest(_request())
    assert digest((np.int64(4), np.float64(0.5))) == digest((4, 0.5))
    assert digest(range(3)) == digest([0, 1, 2]) == digest((0, 1, 2))


@pytest.mark.parametrize("error", [ValueError(), KeyError(), "", ValueError("no")])
def test_an_error_without_words_is_an_error(error) -> None:
    assert _word(error) != ""


def test_an_error_of_another_kind_is_named_with_it() -> None:
    assert _word(ValueError("no")) == "no"
    assert _word(UnicodeError("no")) == "UnicodeError: no"  # a ValueError, too


def test_a_value_without_a_digest_is_refused() -> None:
    with pytest.raises(TypeError, match="no digest for a object"):
        digest(object())
