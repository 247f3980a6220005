"""Products with a weight: what the table chooses, and both ways to run against exact arithmetic."""

from __future__ import annotations

import gpu_gemm
import pytest
import torch
import torch.nn.functional as F
from gpu_gemm_search import Case, search

from cosmos3_fast import _C
from cosmos3_fast.ops import gemm, gemm_table

SECTION, PRODUCT = ("a GPU", 130100), ("bfloat16", 24, 16, False)
TABLE = {SECTION: {PRODUCT: {406: "1", 1966: "2", 3093: "3", 6186: "4.0.5"}}}
GPU = [(63, 136, 72), (406, 1024, 512), (1000, 264, 1024)]  # M, N, K


def random(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return (found.double() - truth).abs().max().item()


# The table


@pytest.mark.parametrize(
    ("m", "row"),
    [
        (406, "1"),
        (370, "1"),
        (446, "1"),
        (1966, "2"),
        (3000, "3"),
        (6186, "4.0.5"),
        (6804, "4.0.5"),
        (1, None),
        (369, None),
        (447, None),
        (1547, None),
        (2500, None),
        (6805, None),
    ],
)
def test_the_nearest_row_serves_and_none_that_is_far(monkeypatch, m, row):
    monkeypatch.setattr(gemm, "GEMM_TABLE", TABLE)
    assert gemm.nearest(SECTION, PRODUCT, m) == row


@pytest.mark.parametrize(
    ("section", "product"),
    {
        "another GPU": (("b GPU", 130100), PRODUCT),
        "another library": (("a GPU", 130000), PRODUCT),
        "another dtype": (SECTION, ("float16", 24, 16, False)),
        "another N": (SECTION, ("bfloat16", 16, 16, False)),
        "another K": (SECTION, ("bfloat16", 24, 24, False)),
        "in place": (SECTION, ("bfloat16", 24, 16, True)),
    }.values(),
    ids=str,
)
def test_a_row_serves_nothing_but_its_own_product(monkeypatch, section, product):
    monkeypatch.setattr(gemm, "GEMM_TABLE", TABLE)
    assert gemm.nearest(section, product, 406) is None


class Library:
    """Says what an algorithm needs, as `_C.gemm_workspace` does."""

    def __init__(self, workspace_bytes: int) -> None:
        self.workspace_bytes = workspace_bytes

    def gemm_library(self) -> int:
        return SECTION[1]

    def gemm_workspace(self, problem: gemm.Problem, algorithm: tuple[int, ...]) -> int:
        assert (problem.m, algorithm) == (6186, (4, 0, 5, 0, 0, 0, 0, 0))
        return self.workspace_bytes


@pytest.mark.parametrize(
    ("needed", "chosen"),
    {"none": (0, True), "some": (gemm.WORKSPACE_BYTES, True)}.values(),
    ids=["none", "some"],
)
def test_a_row_that_the_library_can_run_is_chosen(monkeypatch, needed, chosen):
    choice = choose(monkeypatch, needed)
    assert choice is not None and choice.workspace_bytes == needed
    assert choice.algorithm == (4, 0, 5, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("needed", [-1, gemm.WORKSPACE_BYTES + 1], ids=["unsupported", "too much"])
def test_a_row_that_the_library_cannot_run_leaves_the_product_to_torch(monkeypatch, needed):
    assert choose(monkeypatch, needed) is None


def choose(monkeypatch, needed: int) -> gemm.Choice | None:
    monkeypatch.setattr(gemm, "GEMM_TABLE", TABLE)
    monkeypatch.setattr(gemm, "_extension", lambda: Library(needed))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: SECTION[0])
    return gemm._choice.__wrapped__(gemm.Problem(6186, 24, 16, 16, 16, 24, 2, 0), False)


def test_the_table_holds_algorithms_of_known_products():
    for (name, version), products in gemm_table.GEMM_TABLE.items():
        assert name and version >= 120000
        for (dtype, n, k, _), rows in products.items():
            assert getattr(torch, dtype) in gemm.DTYPES and n % 8 == 0 and k % 8 == 0
            for m, row in rows.items():
                found = gemm.words(row)
                assert m > 0 and len(found) == 8 and all(0 <= word < 1 << 64 for word in found)
                assert gpu_gemm.hexadecimal(found) == row


def test_a_written_table_reads_back_and_new_rows_replace_old_ones(tmp_path):
    case = Case("qkv tp1", 406, 24, 16, False)
    beaten = gpu_gemm.Result(case, 5, [], (7, 0, 1 << 63, 0, 0, 0, 0, 0), 100.0, 90.0, 1.1)
    lost = gpu_gemm.Result(
        Case("qkv tp1", 1966, 24, 16, False), 5, [], (9,) * 8, 100.0, 99.5, 1.005
    )
    section = gpu_gemm.rows([beaten, lost], TABLE[SECTION])
    assert section == {PRODUCT: {406: "7.0.8000000000000000", 3093: "3", 6186: "4.0.5"}}
    assert gemm.words(section[PRODUCT][406]) == beaten.best
    gpu_gemm.write(tmp_path / "gemm_table.py", {SECTION: section})
    names: dict = {}
    exec((tmp_path / "gemm_table.py").read_text(), names)
    assert names["GEMM_TABLE"] == {SECTION: section} and names["__doc__"] == gemm_table.__doc__


# torch's way, on the CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (63, 24, 16)], ids=str)
def test_on_the_cpu_torch_multiplies_and_the_extension_is_not_asked(monkeypatch, shape, dtype):
    monkeypatch.setattr(gemm, "_extension", None)
    m, n, k = shape
    x, weight, residual = (random(*s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
    expected = F.linear(x, weight)
    truth = x.double() @ weight.double().t()
    assert error(expected, truth) <= torch.finfo(dtype).eps * k * truth.abs().max()
    assert torch.equal(gemm.linear(x, weight), expected)
    wide = torch.full((m, n + 3), torch.nan, dtype=dtype)
    out = gemm.linear(x, weight, out=wide[:, :n])
    assert out.data_ptr() == wide.data_ptr() and wide[:, n:].isnan().all()
    assert torch.equal(out, expected)
    sum_ = residual.clone()
    assert gemm.linear_add_(sum_, x, weight) is sum_
    assert torch.equal(sum_, torch.addmm(residual, x, weight.t()))


@pytest.mark.parametrize(
    "out", [torch.empty(4, 6), torch.empty(3, 5, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_an_out_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"out is torch.float\d\d \[\d, \d\]"):
        gemm.linear(random(3, 4), random(5, 4), out=out)


def test_the_library_is_torchs():
    assert (_C.gemm_library() > 0) == (_C.has_cuda and torch.version.cuda is not None)


def test_without_a_device_a_product_raises_and_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    with pytest.raises(RuntimeError, match=r"no CUDA kernels|CUDA driver|libcublasLt"):
        _C.gemm_workspace((8, 8, 8, 8, 8, 8, 2, 0), [0] * 8)


# Both ways, on a GPU


@pytest.fixture
def planted(monkeypatch):
    """Puts the heuristic's `index`-th algorithm for a product into the table, and counts calls."""
    calls = []
    run = gemm.run
    monkeypatch.setattr(gemm, "run", lambda *a: (calls.append(a[0].algorithm), run(*a))[1])
    gemm._choice.cache_clear()

    def plant(m: int, n: int, k: int, dtype: torch.dtype, accumulate: bool, index: int) -> list:
        problem = gemm.Problem(m, n, k, k, k, n, gemm.DTYPES[dtype], 0)
        found = _C.gemm_candidates(problem, gemm.WORKSPACE_BYTES, index + 1)
        row = gpu_gemm.hexadecimal(tuple(found[min(index, len(found) - 1)]))
        section = (torch.cuda.get_device_name(), _C.gemm_library())
        product = (str(dtype).removeprefix("torch."), n, k, accumulate)
        monkeypatch.setattr(gemm, "GEMM_TABLE", {section: {product: {m: row}}})
        return calls

    yield plant
    gemm._choice.cache_clear()


def tensors(shape, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n, k = shape
    return tuple(random(*s, dtype=dtype, device="cuda") for s in ((m, k), (n, k), (m, n)))


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("dtype", gemm.DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU, ids=str)
def test_a_planted_algorithm_is_as_exact_as_torch(planted, shape, dtype, index):
    calls = planted(*shape, dtype, False, index)
    x, weight, _ = tensors(shape, dtype)
    truth = x.double() @ weight.double().t()
    bound = 2 * error(F.linear(x, weight), truth)
    assert error(gemm.linear(x, weight), truth) <= bound
    wide = x.new_full((shape[0] + 1, shape[1] + 8), torch.nan)
    out = gemm.linear(x, weight, out=wide[:-1, :-8])
    assert error(out, truth) <= bound and len(calls) == 2
    assert wide[-1].isnan().all() and wide[:, -8:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("shape", GPU, ids=str)
def test_a_planted_algorithm_adds_in_place_with_one_rounding(planted, shape, index):
    calls = planted(*shape, torch.bfloat16, True, index)
    x, weight, residual = tensors(shape, torch.bfloat16)
    truth = residual.double() + x.double() @ weight.double().t()
    bound = 2 * error(torch.addmm(residual, x, weight.t()), truth)
    assert error(gemm.linear_add_(residual, x, weight), truth) <= bound and len(calls) == 1


@pytest.mark.gpu
def test_a_captured_product_gives_the_eager_bits_every_time(planted):
    calls = planted(406, 1024, 512, torch.bfloat16, False, 1)
    x, weight, _ = tensors((406, 1024, 512), torch.bfloat16)
    expected, out = gemm.linear(x, weight), x.new_full((406, 1024), torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.linear(x, weight, out=out)
    assert out.isnan().all() and len(calls) == 2
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_what_is_not_aligned_or_not_in_rows_goes_to_torch(planted):
    calls = planted(406, 1024, 512, torch.bfloat16, False, 0)
    x, weight, _ = tensors((406, 1024, 513), torch.bfloat16)
    columns = x[:, :512].t().contiguous().t()
    for left, right in ((x[:, :512], weight[:, :512].contiguous()), (columns, weight[:, 1:])):
        assert torch.equal(gemm.linear(left, right), F.linear(left, right))
    assert calls == []


@pytest.mark.gpu
def test_every_row_of_this_gpu_is_as_exact_as_torch(monkeypatch):
    section = (torch.cuda.get_device_name(), _C.gemm_library())
    for (dtype, n, k, accumulate), rows in gemm_table.GEMM_TABLE.get(section, {}).items():
        for m in sorted({near for row in rows for near in (row, row - 3)}):
            x, weight, start = tensors((m, n, k), getattr(torch, dtype))
            truth = x.float() @ weight.float().t() + (start.float() if accumulate else 0)
            plain = torch.addmm(start, x, weight.t()) if accumulate else F.linear(x, weight)
            got = gemm.linear_add_(start, x, weight) if accumulate else gemm.linear(x, weight)
            assert gemm._choose(x, weight, start, accumulate=accumulate) is not None
            assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max(), (m, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "in place"])
def test_the_search_finds_a_working_algorithm(accumulate):
    result = search(Case("small", 406, 1024, 512, accumulate), vary=True, rounds=3)
    assert result.best is not None and result.tried > 1 and result.gain > 0
