"""Finds the cuBLASLt algorithms that beat torch's choice: `python tests/gpu_gemm.py --out FILE`.

Every candidate is checked first: at most twice torch's error against a float32 product, and for
those that are kept the same bits in every repeat. Then all run in turn, as captured graphs over
weights that rotate past L2. Prints a line a product, the rows of GEMM_TABLE, and last what they
gain; --out writes the table with the rows of other GPUs and libraries kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_gemm_search import Case, Result, Words, describe, search

from cosmos3_fast import _C
from cosmos3_fast.ops import gemm_table

LAYERS = 36
WORK = {  # tensor-parallel ranks, tokens a rank computes, steps
    "D": (1, 6186, 4),
    "E": (1, 1966, 30),
    "S": (1, 406, 30),
    "D on 2 (cfg 2)": (1, 3093, 4),
    "D on 4 (cfg 2 tp 2)": (2, 3093, 4),
    "E on 2 (tp 2)": (2, 1966, 30),
    "E on 4 (tp 4)": (4, 1966, 30),
}
NAMES = ("qkv", "out", "gate_up", "down")
SIZES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
TOKENS = {1: (6186, 1966, 406, 3093, 1547), 2: (3093, 1966, 6186, 406), 4: (3093, 1966, 6186, 406)}
Products = dict[tuple[str, int, int, bool], dict[int, str]]  # a section of the table
GAIN = 1.01  # a row must beat torch by more


def cases() -> Iterator[Case]:
    """The most important first. Over several ranks a product's sum is reduced before it is added,
    so nothing accumulates there.
    """
    for ranks, tokens in TOKENS.items():
        for m in tokens:
            for name, (n, k) in zip(NAMES, SIZES, strict=True):
                if name in ("out", "down"):
                    yield Case(f"{name} tp{ranks}", m, n, k // ranks, ranks == 1)
                else:
                    yield Case(f"{name} tp{ranks}", m, n // ranks, k, False)


def line(result: Result) -> str:
    case, rate = result.case, result.case.tflop / result.best_us * 1e6
    return (
        f"{case.name:12s} M={case.m:<5d} torch {result.torch_us:7.1f} us, best "
        f"{result.best_us:7.1f} us {rate:4.0f} TFLOP/s x{result.gain:.3f} "
        f"{'ROW' if kept(result) else '-  '} of {result.tried} ({len(result.bad)} bad)  "
        f"{describe(result.best) if result.best else ''}"
    )


def kept(result: Result) -> bool:
    return result.best is not None and result.gain > GAIN


def hexadecimal(words: Words) -> str:
    """A row of the table: the words, without the zeros at the end."""
    used = max(i for i, word in enumerate(words) if word) + 1
    return ".".join(f"{word:x}" for word in words[:used])


def rows(results: list[Result], old: Products) -> Products:
    """`old` with the measured products replaced: a row where torch is beaten, none elsewhere."""
    new = {product: dict(found) for product, found in old.items()}
    for result in results:
        case = result.case
        found = new.setdefault(("bfloat16", case.n, case.k, case.accumulate), {})
        found.pop(case.m, None)
        if result.best is not None and kept(result):
            found[case.m] = hexadecimal(result.best)
    return {product: found for product, found in new.items() if found}


def render(table: gemm_table.Table) -> str:
    """The table as Python, as ruff lays it out."""
    lines = ["GEMM_TABLE: Table = {"]
    for section, products in sorted((key, rows) for key, rows in table.items() if rows):
        lines.append(f'    ("{section[0]}", {section[1]}): {{')
        for (dtype, n, k, accumulate), found in sorted(products.items()):
            lines.append(f'        ("{dtype}", {n}, {k}, {accumulate}): {{')
            lines += [f'            {m}: "{words}",' for m, words in sorted(found.items())]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def write(path: Path, table: gemm_table.Table) -> None:
    """gemm_table.py with this table in place of its own."""
    head, _, _ = Path(gemm_table.__file__).read_text().partition("GEMM_TABLE: Table = ")
    path.write_text(head + render(table))


def summary(results: list[Result]) -> Iterator[str]:
    """What the rows gain: a rank's products over all layers and steps, in milliseconds."""
    for label, (ranks, m, steps) in WORK.items():
        of = [r for r in results if r.case.m == m and r.case.name.endswith(f"tp{ranks}")]
        if len(of) != len(NAMES):
            continue
        before = sum(r.torch_us for r in of) * steps * LAYERS / 1e3
        after = sum(r.torch_us / (r.gain if kept(r) else 1) for r in of) * steps * LAYERS / 1e3
        flop = sum(r.case.tflop for r in of) * steps * LAYERS
        yield (
            f"{label:20s} GEMMs {before:7.1f} -> {after:7.1f} ms, x{before / after:.3f}, "
            f"{flop / after * 1e3:.0f} TFLOP/s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write gemm_table.py here")
    parser.add_argument("--seconds", type=float, default=110, help="no new product after that")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of the last two timings")
    parser.add_argument("--tokens", type=int, nargs="*", help="these M alone")
    parser.add_argument("--no-vary", action="store_true", help="the heuristic's list alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__, _C.gemm_library(), flush=True)
    section = (torch.cuda.get_device_name(), _C.gemm_library())
    old = gemm_table.GEMM_TABLE.get(section, {})
    begin, results, left = time.monotonic(), [], []
    for case in cases():
        if options.tokens and case.m not in options.tokens:
            continue
        if time.monotonic() - begin > options.seconds:
            left.append(case)
            continue
        results.append(search(case, vary=not options.no_vary, rounds=options.rounds))
        print(line(results[-1]), *results[-1].bad[:3], sep="\n    ", flush=True)
        if options.out:
            write(options.out, gemm_table.GEMM_TABLE | {section: rows(results, old)})
    print("---", render({section: rows(results, old)}), *summary(results), sep="\n")
    bad = sum(len(result.bad) for result in results)
    seconds = time.monotonic() - begin
    print(f"{len(results)} products in {seconds:.0f} s, {sum(map(kept, results))} rows")
    print(f"{bad} candidates refused or wrong; out of time: {[f'{c.name} {c.m}' for c in left]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
