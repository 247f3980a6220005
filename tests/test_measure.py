"""What benchmarks measure with: parts of a step, checks that can fail, figures, the command."""

from __future__ import annotations

import ast
import json
import platform
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from engine_fixtures import checkpoint, engine_args, request, shared_engine
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_fast import Engine, denoise, kept, ops, parallel_sum
from cosmos3_fast.cli import main
from cosmos3_fast.cli.bench import table
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.testing import gate, tune
from cosmos3_fast.testing.machine import folder_name, machine, script_command
from cosmos3_fast.testing.measure import (
    Times,
    choose_sums,
    configured,
    gemm_rate,
    growth,
    measure,
    memory_mib,
)
from cosmos3_fast.testing.parts import StepParts, StepShape
from cosmos3_fast.testing.requests import WORKLOADS

# torch counts addmm but not addmm_: 2 m k n for x [m, k] times w [k, n]
IN_PLACE = {torch.ops.aten.addmm_: lambda _, x, w, **rest: 2 * x[0] * x[1] * w[1]}
SMALL = {kind: workload.small() for kind, workload in WORKLOADS.items()}


@pytest.fixture(scope="module")
def engine():
    with Engine(engine_args(decode_video=True)) as engine:
        yield engine


def shape_of(engine, made):
    steps = made.num_inference_steps
    schedule = denoise.schedule_of(engine.args.plugin_args, engine.checkpoint.scheduler, steps)
    return StepShape.of(denoise.plan(made, engine.checkpoint.transformer, schedule))


@pytest.mark.parametrize("kind", SMALL)
def test_flop_of_products_are_those_that_run(engine, kind):
    made = SMALL[kind].request(0)
    parts = StepParts(engine.model, engine.checkpoint, made, engine.args.plugin_args)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        parts.products()
    assert counter.get_total_flops() == parts.shape.product_flop(engine.model.config)
    parts.attentions()
    parts.close()


def test_products_need_no_norm_between_them(engine, monkeypatch):
    """Over several ranks a product's sum is left to the norm after it, of which there is none."""
    made = SMALL["E"].request(0)
    parts = StepParts(engine.model, engine.checkpoint, made, engine.args.plugin_args)
    monkeypatch.setattr(engine.model.sums, "mesh", Mesh(engine.device, tp_size=2))
    parts.products()
    parts.close()


def test_parts_of_several_ranks_are_refused(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "mesh", Mesh(engine.device, tp_size=2))
    with pytest.raises(ValueError, match="on one rank"):
        StepParts(engine.model, engine.checkpoint, SMALL["E"].request(0), engine.args.plugin_args)


def test_flop_of_d_at_nano_size():
    """By hand: 3093 tokens a branch of which 3058 - 340 video and 32 action rows are noisy."""
    config = TransformerConfig()
    shape = StepShape(2, 3093, 2752, 3060, 2720, (160, 12), 256)
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288
    rest = layer - 4096 * 6144
    whole = 2 * 6186 * 36 * layer - 2 * (6186 - 5504) * rest
    ends = 2 * (3060 + 5440) * 192 * 4096
    assert shape.product_flop(config) == whole + ends
    keys = 3093 + 160 + 3093 + 12
    assert shape.attention_flop(config) == 4 * (35 * 3093 + 2752) * keys * 32 * 128


def test_shape_of_a_request_and_a_mixed_schedule_is_refused(engine):
    shape = shape_of(engine, request())
    assert (shape.branches, shape.tokens, shape.und) == (2, 2 * 3 * 3 + 4, (19, 7))
    with pytest.raises(ValueError, match="guidance_interval"):
        shape_of(engine, request(num_inference_steps=4, guidance_interval=(980.0, 1000.0)))


def test_figures_of_a_row(engine):
    row = measure(engine, SMALL["D"], repeats=2, rounds=1, rate=1.0, decode=True)
    assert row["requests"] == 2 and row["ms"] >= row["stages_ms"]["denoise"] > 0
    assert row["overhead"] == pytest.approx(
        row["loop_ms"] / (row["products_ms"] + row["attentions_ms"])
    )
    assert row["share_of_rate"] == row["tflops"] > 0
    assert 0 < row["decode_ms"] <= row["with_decode_ms"]
    assert engine.args.plugin_args.decode_video
    assert gemm_rate(engine.device, torch.float32, rounds=1) > 0


@pytest.mark.parametrize(
    ("ms", "p50", "p99"),
    [((3.0,), 3.0, 3.0), (tuple(range(100, 0, -1)), 50.5, 99), (tuple(range(200)), 99.5, 197)],
    ids=["one", "hundred", "two-hundred"],
)
def test_percentiles(ms, p50, p99):
    times = Times(ms, {})
    assert (times.p50, times.p99) == (p50, p99)


def test_configured_restores_the_engine(engine):
    before = engine.args
    with pytest.raises(RuntimeError), configured(engine, graph=False, decode=False):
        assert not engine.args.plugin_args.decode_video
        assert not engine.args.config.runtime.use_cuda_graph
        raise RuntimeError
    assert engine.args is before


@pytest.mark.parametrize("graph", [True, False])
def test_a_configured_engine_captures_as_told(engine, monkeypatch, graph):
    told = []

    class Runner(kept.StepRunner):
        def __init__(self, *arguments, capture):
            told.append(capture)
            super().__init__(*arguments, capture=capture)

    monkeypatch.setattr(kept, "StepRunner", Runner)
    with configured(engine, graph=graph):
        engine.step(SMALL["S"].request(0))
    assert told == [graph]


def test_growth_compares_two_halves(engine):
    grown = growth(engine, [SMALL["S"]], 4)
    assert grown["requests"] == 60 and abs(grown["host_grown_MiB"]) < 200
    assert set(memory_mib(torch.device("cpu"))) == {"host"}


def test_gate_passes_and_leaves_the_engine_as_it_was(engine):
    before = engine.args
    errors = gate.gate(engine, SMALL["D"], layers=2)
    assert errors == {"error": 0.0, "eager_error": 0.0}  # float32, the references on both sides
    assert engine.args is before


def test_gate_finds_a_step_that_differs_from_eager(monkeypatch):
    engine = shared_engine(decode=False)
    real, calls = engine.step, []

    def drifting(made):
        calls.append(1)
        result = real(made)
        result["action"][0, 0, 0] += len(calls) > 2  # the second captured run
        return result

    monkeypatch.setattr(engine, "step", drifting)
    with pytest.raises(ValueError, match=r"differs from the eager one: action, 1 of \d+ values"):
        gate.graph_equals_eager(engine, SMALL["D"].request(1))


def test_gate_finds_a_prompt_that_stays(monkeypatch):
    engine = shared_engine(decode=False)
    real, first = engine.step, []

    def stuck(made):
        first.append(made)
        return real(first[0] if len(first) < 3 else first[1])

    monkeypatch.setattr(engine, "step", stuck)
    with pytest.raises(ValueError, match="the prompt before it"):
        gate.prompts_in_turn(engine, SMALL["D"])
    monkeypatch.setattr(engine, "step", lambda made: real(first[0]))
    with pytest.raises(ValueError, match="two prompts give one answer"):
        gate.prompts_in_turn(engine, SMALL["D"])


def test_gate_finds_a_kernel_that_errs(monkeypatch):
    real = ops.gate_up_silu

    def erring(x, weight):
        return real(x, weight) * (1.0 if ops._forced else 1.001)

    monkeypatch.setattr(ops, "gate_up_silu", erring)
    with pytest.raises(ValueError, match="over twice eager torch's"):
        gate.rounding(shared_engine(decode=False), SMALL["E"])


def test_reduced_keeps_everything_but_the_number_of_layers(tmp_path):
    gate.reduced(checkpoint(), tmp_path, 1)
    for name in (*gate.CONFIGS, "model_index.json"):
        was, now = (json.loads((folder / name).read_text()) for folder in (checkpoint(), tmp_path))
        changed = {"num_hidden_layers": 1} if name == gate.CONFIGS[0] else {}
        assert now == was | changed


def test_the_machine_is_described_without_its_name():
    found = machine()
    assert found["torch"] == torch.__version__
    assert platform.node() not in found.values()
    assert set(folder_name()) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "cpu" / "requests.json"
    flags = ["--requests", "S", "--repeats", "1", "--growth", "1", "--json", str(out)]
    assert main(["bench", "--tiny", "--device", "cpu", *flags]) == 0
    printed = capsys.readouterr().out
    assert "S: checks passed" in printed and "ms p50" in printed and "decode" not in printed
    report = json.loads(out.read_text())
    assert set(report) == {"machine", "command", "dtype", "gemm_tflops", "requests", "growth"}
    assert report["requests"]["S"]["tokens"] == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tiny", "--requests", "D,X"), "D, E, S, got X"),
        (("--tiny", "--repeats", "0"), "at least 1"),
        (("--device", "cpu"), "add --tiny"),
        (("--device", "cpu", "--tiny", "--tune"), "needs a GPU"),
    ],
    ids=["unknown-request", "no-repeats", "real-size-on-a-cpu", "tune-on-a-cpu"],
)
def test_command_refuses(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


def test_table_leaves_out_what_no_row_has():
    lines = table({"D": {"ms": 600.04, "tokens": 3093}, "E": {"ms": 1310.0}}).splitlines()
    assert [line.split() for line in lines] == [
        ["tokens", "ms", "p50"],
        ["D", "3093", "600.0"],
        ["E", "-", "1310.0"],
    ]


D = StepShape(2, 3093, 2752, 3060, 2720, (160, 12), 256)
S = StepShape(1, 406, 16, 390, 0, (110,), 256)


def test_tune_measures_every_shard_of_every_shape():
    """Nano on 1, 2, 4 and 8 ranks: D's branches together or apart, its last layer, S."""
    shapes = tune.attention_shapes([D, S], TransformerConfig())
    keys = {(n, heads, 4) for n in (3093, 2752) for heads in (64, 32, 16, 8, 4)}
    keys |= {(n, heads, 4) for n in (406, 16) for heads in (32, 16, 8, 4)}
    assert [shape.key for shape in shapes] == sorted(keys)
    assert {shape.key[1]: len(shape.und) for shape in shapes if shape.queries == 2752} == {
        **dict.fromkeys((64, 32, 16, 8), 2),
        4: 1,
    }
    rows = {6186, 5504, 3093, 2752, 406, 16}
    inner = (12288, 6144, 3072, 1536)
    assert tune.gate_up_shapes([D, S], TransformerConfig()) == sorted(product(rows, inner))
    two = replace(TransformerConfig(), num_key_value_heads=2)
    assert {heads for _, heads in tune.gate_up_shapes([S], two)} == {12288, 6144}


def test_a_row_of_tune_names_the_fastest_and_can_be_pasted(monkeypatch):
    us = iter(({"b": 20.04, "a": 10.0}, {"b": 1.0, "a": 9.96}))
    monkeypatch.setattr(tune, "in_turn", lambda ways, make, nbytes: next(us))
    cases = [((6, 4), lambda: [torch.zeros(1)]), ((7, 4), lambda: [torch.zeros(1)])]
    lines = list(tune.table_rows("TABLE", cases, lambda _: {"b": torch.neg, "a": torch.abs}))
    assert lines == [
        "TABLE: b, a",
        '    (6, 4): "a",  # 20.0, 10.0',
        '    (7, 4): "b",  # 1.0, 10.0',
    ]


@pytest.mark.gpu
def test_tune_prints_rows_of_both_tables(capsys):
    assert main(["bench", "--tiny", "--tune", "--requests", "S"]) == 0
    text = capsys.readouterr().out
    head, attention, gate_up = re.split("^(?:ATTENTION|GATE_UP)_CHOICE: .*$", text, flags=re.M)
    assert "microseconds" in head
    for rows, sizes, ways in ((attention, 3, {"triton"}), (gate_up, 2, {"fused", "pair"})):
        table = ast.literal_eval(f"{{{rows}}}")
        assert table and all(len(key) == sizes for key in table)
        assert set(table.values()) <= ways  # Hopper's own kernel takes no heads of 16 values
        assert len(re.findall(r"# \d+\.\d", rows)) == len(table)


def test_a_script_is_stored_as_it_is_typed_at_the_root(tmp_path):
    argv = [str(tmp_path / "bench" / "ranks.py"), "--json", "a b.json"]
    assert script_command(["torchrun"], argv) == "torchrun bench/ranks.py --json 'a b.json'"


def test_the_kind_of_sums_that_a_script_asks_for(monkeypatch):
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {2: 1 << 20})
    kinds = ("table", "fused", "nccl")
    assert [choose_sums(kind, 2) for kind in kinds] == ["auto", "symmetric", "nccl"]
    assert parallel_sum.FUSED_BYTES == {2: 1 << 20}
    assert choose_sums("all-reduce", 2) == "auto" and parallel_sum.FUSED_BYTES == {}
    with pytest.raises(ValueError, match="tp size of 2 or more"):
        choose_sums("fused", 1)
