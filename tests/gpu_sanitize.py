"""compute-sanitizer over every kernel on a GPU: `python tests/gpu_sanitize.py`.

memcheck, racecheck, initcheck and synccheck each watch a process of their own that runs every
Triton and csrc kernel at small, odd sizes; torch allocates each tensor apart, so that an access
past its end is seen. A planted defect of each kind must be found, and one in a Triton kernel.
Prints a table of findings by case; exit status 1 for a finding that is not explained here, a
defect that was missed, or a case that failed, 2 where a GPU or a tool is missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

TOOLS = {
    "memcheck": ["--padding", "256", "--report-api-errors", "no"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}
# Of kernels that are not ours: torch's and cuDNN's. initcheck watches them too: it has to see what
# they write.
THEIRS = "_ZN2at|_ZN3c10|cudnn|cutlass|flash|cub|cask|nvjet"
SECONDS = 300  # for one tool
DONE = "CASES DONE"

HAND_OVER = (
    "warp_specialize in Triton's own code: the first warps write what the others do next, all "
    "meet at `barrier.sync 1`, the others read it, all meet again before it is written anew; it "
    "seems that racecheck does not follow a barrier that warps reach at different instructions"
)

PLANTED = r"""
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>
__global__ void planted_write(int* x, int n) { x[n + threadIdx.x] = 1; }
__global__ void planted_race(int* x) {
    __shared__ int shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = shared[63 - threadIdx.x];  // no barrier between two warps
}
__global__ void planted_read(int* x) { x[threadIdx.x] += 1; }
__global__ void planted_barrier(int* x) {
    if (threadIdx.x < 7) __syncthreads();
    x[threadIdx.x] = 0;
}
int main(int, char** arguments) {
    int* x;
    if (cudaMalloc(&x, 64 * sizeof(int)) != cudaSuccess) return 2;
    const char* tool = arguments[1];
    if (strcmp(tool, "initcheck")) cudaMemset(x, 0, 64 * sizeof(int));
    if (!strcmp(tool, "memcheck")) planted_write<<<1, 3>>>(x, 64);
    if (!strcmp(tool, "racecheck")) planted_race<<<1, 64>>>(x);
    if (!strcmp(tool, "initcheck")) planted_read<<<1, 3>>>(x);
    if (!strcmp(tool, "synccheck")) planted_barrier<<<1, 64>>>(x);
    cudaDeviceSynchronize();
}
"""


@triton.jit
def _planted_kernel(x_ptr, size):
    tl.store(x_ptr + size + tl.arange(0, 32), 1.0)


@dataclass(frozen=True)
class Finding:
    """One report of a tool: the case it came with, the kernel, its places in the source."""

    tool: str
    case: str
    what: str
    kernel: str
    places: tuple[str, ...]

    @property
    def explained(self) -> str | None:
        """Why it is no defect. That of a hand-over has no place but a kernel's first line and its
        calls of warp_specialize.
        """
        handed = self.tool == "racecheck" and self.places
        return HAND_OVER if handed and all(map(is_hand_over, self.places)) else None


def is_hand_over(place: str) -> bool:
    from cosmos3_fast import kernels

    name, _, line = place.partition(":")
    source = Path(kernels.__path__[0], name)
    if not source.is_file() or not line.isdigit():
        return False
    text = [*source.read_text().splitlines(), ""][int(line) - 1].strip()
    return re.match(r"def _\w+_kernel\(|gl\.warp_specialize\(", text) is not None


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Made on the host: no kernel of torch's need be watched."""
    return torch.randn(shape).to(dtype).cuda()


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype).cuda()


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).cuda()


def norms(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import rms_norm

    for rows, width in ((3, 1000), (1, 4096), (5, 7)):
        x, residual, weight = (random(*s, dtype=dtype) for s in ((rows, width),) * 2 + ((width,),))
        yield rms_norm.rms_norm(x, weight, 1e-6, out=blank(rows, width, dtype=dtype))
        yield rms_norm.add_rms_norm(x, residual, weight, 1e-6)
        yield residual


def rope(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels.qk_norm_rope import qk_norm_rope

    for rows, queries, keys, dim in ((3, 4, 1, 128), (5, 3, 1, 16)):
        qkv = random(rows, (queries + 2 * keys) * dim, dtype=dtype)
        weights = random(dim, dtype=dtype), random(dim, dtype=dtype)
        tables = (random(rows, dim // 2, dtype=torch.float32) for _ in range(2))
        heads = {"q_out": queries, "k_out": keys, "v_out": keys}
        outputs = {name: blank(rows, count, dim, dtype=dtype) for name, count in heads.items()}
        qk_norm_rope(qkv, *weights, *tables, 1e-6, **outputs)
        yield from outputs.values()


def gate_up(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels.gate_up_silu import gate_up_silu_fused

    for rows, width, inner in ((130, 200, 264), (1, 8, 8)):
        x, weight = random(rows, width, dtype=dtype), random(2 * inner, width, dtype=dtype)
        yield gate_up_silu_fused(x, weight, out=blank(rows, inner, dtype=dtype))


def elementwise(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import silu_mul, timestep_add, unipc_step

    for rows, width in ((3, 1000), (1, 3), (2, 12288)):
        yield silu_mul.silu_mul(random(rows, 2 * width, dtype=dtype))
        x, table = random(rows, width, dtype=dtype), random(4, width, dtype=dtype)
        noisy = integers(*(i % 2 for i in range(rows)), dtype=torch.uint8)
        yield timestep_add.timestep_add(x, table, integers(3), noisy)
    for branches, size in ((1, 1), (2, 1001), (2, 4096)):
        state = [random(size, dtype=torch.float32) for _ in range(5)]
        noisy = integers(*(i % 9 != 0 for i in range(size)), dtype=torch.uint8)
        coef = random(4, len(unipc_step.COLUMNS), dtype=torch.float32)
        model_in = blank(size, dtype=dtype)
        velocity = random(branches, size, dtype=dtype)
        unipc_step.unipc_step(velocity, *state, noisy, coef, integers(2), model_in)
        yield from (*state[:4], model_in)


def attentions(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Every way of ops.variants; Triton's own also by plain loads."""
    from cosmos3_fast.kernels import attention
    from cosmos3_fast.ops import variants

    plain = attention.TILES[dtype.itemsize]._replace(tma=False)
    without_tma = functools.partial(attention.attention_triton, tile=plain)
    for tokens, keys, capacity, lengths in ((19, 203, 96, (70, 0)), (1, 1, 3, (3, 1))):
        q = random(2, tokens, 8, 128, dtype=dtype)
        gen = [random(2, keys, 2, 128, dtype=dtype) for _ in range(2)]
        und = [random(2, capacity, 2, 128, dtype=dtype) for _ in range(2)]
        for run in (*variants.attention(dtype).values(), without_tma):
            yield run(q, *gen, *und, integers(*lengths), out=blank(*q.shape, dtype=dtype))


def causal(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast.kernels import causal_attention as module

    tiles = [t for _, t in module.TILES] if dtype.itemsize == 2 else [module.FLOAT32]
    for tokens in (1, 33, 203):
        for tile in tiles:
            q = random(tokens, 8, 128, dtype=dtype)
            k, v = (random(tokens, 2, 128, dtype=dtype) for _ in range(2))
            out = blank(tokens, 8, 128, dtype=dtype)
            yield module.causal_attention(q, k, v, out=out, tile=tile)


def image(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from cosmos3_fast import ops

    for shape in ((1, 5, 7, 3), (2, 16, 16, 3), (1, 1, 1, 3)):
        yield ops.image_to_tensor(torch.randint(0, 256, shape, dtype=torch.uint8).cuda())
    odd = torch.randint(0, 256, (106,), dtype=torch.uint8).cuda()[1:]  # no aligned address
    yield ops.image_to_tensor(odd.view(1, 5, 7, 3))


def halo_input(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    from halo_cases import ODD, inputs

    from cosmos3_fast.ops import halo

    for case in ODD:
        given = inputs(case, dtype, "cuda")
        yield halo.conv_input(**given)
        rest = {name: given[name] for name in ("x", "prologue", "gamma", "bias")}
        for axis in (3, 4):
            yield from halo.conv_edges(**rest, axis=axis, before=1, after=1)


def halo_exchange(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Ranks that share this GPU, as in gpu_halo.py; every other thread's work is a slice's."""
    from gpu_halo import check_ranks
    from halo_cases import ODD

    for case in ODD:
        for axis, count in ((3, 2), (4, 3)):
            if (problem := check_ranks(case, dtype, axis, count)) is not None:
                raise AssertionError(f"{case.name}: {problem}")
    yield from ()


DTYPES = torch.bfloat16, torch.float32
CASES: dict[
    str, tuple[Callable[[torch.dtype], Iterator[torch.Tensor]], tuple[torch.dtype, ...]]
] = {
    "rms_norm, add_rms_norm": (norms, DTYPES),
    "qk_norm_rope": (rope, DTYPES),
    "silu_mul, timestep_add, unipc_step": (elementwise, DTYPES),
    "gate_up_silu": (gate_up, (torch.bfloat16,)),
    "attention": (attentions, DTYPES),
    "causal_attention": (causal, DTYPES),
    "image_to_tensor": (image, (torch.uint8,)),
    "conv_input, conv_edges": (halo_input, (torch.float16, *DTYPES)),
    "conv_input_exchange": (halo_exchange, DTYPES),
}


def run_cases(names: list[str], *, planted: bool) -> None:
    """In a process of its own: cases, each one's name in front of what a tool prints about it."""
    torch.manual_seed(0)
    failed = []
    for name in names:
        print(f"CASE {name}", flush=True)
        case, dtypes = CASES[name]
        try:
            for dtype in dtypes:
                for index, result in enumerate(case(dtype)):
                    if not bool(result.cpu().isfinite().all()):
                        raise AssertionError(f"result {index} in {dtype} is not finite")
            torch.cuda.synchronize()
        except Exception:  # the other cases still run; without DONE the process counts as failed
            failed.append(name)
            print(f"{name} FAILED\n{traceback.format_exc(limit=-2)}", flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else DONE, flush=True)
    if planted:
        _planted_kernel[(1,)](blank(7, dtype=torch.float32), 7)


def watched(tool: str, command: list[str]) -> list[str]:
    """A command under a tool."""
    which = [] if tool == "initcheck" else ["--kernel-name-exclude", f"regex={THEIRS}"]
    quiet = ["--show-backtrace", "no", "--print-limit", "100000"]
    return ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *which, *quiet, *command]


_AT = re.compile(r"\bat (?P<kernel>.+?)\+0x[0-9a-f]+(?: in (?P<place>\S+))?")
_OURS = re.compile(r"cosmos3::|_[a-z]\w*_kernel$|planted|\?")
_NO_REPORT = re.compile(r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|Error: process")


def kernel_name(text: str) -> str:
    """Of a demangled function, without its parameters."""
    bare = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", text)
    return re.split(r"[<(]", bare)[0]


def findings(tool: str, output: str) -> list[Finding]:
    """The tool's reports: behind `=========`, a line that says what, indented ones that say where.

    One that names no kernel counts as ours.
    """
    case, blocks = "", []
    for line in output.splitlines():
        if line.startswith("CASE "):
            case = line.removeprefix("CASE ")
        elif line.startswith("========="):
            text = line.removeprefix("=========").rstrip()
            if text.startswith("     ") and blocks:
                blocks[-1][1].append(text)
            elif text and not _NO_REPORT.match(text.strip()):
                blocks.append((case, [text]))
    found = []
    for case, lines in blocks:
        where = [match for line in lines if (match := _AT.search(line))]
        kernel = kernel_name(where[0]["kernel"]) if where else "?"
        places = tuple(match["place"] or "" for match in where)
        what = lines[0].split(" at ")[0].strip()
        found.append(Finding(tool, case, what, kernel, places))
    return [f for f in found if _OURS.match(f.kernel)]


def together(commands: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """What each command prints, all of them run at once; one that is late is ended."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    logs = {name: folder / f"{name}.log" for name in commands}
    running = {}
    for name, command in commands.items():
        with logs[name].open("wb") as output:
            running[name] = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
    end = time.monotonic() + SECONDS
    for process in running.values():
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:  # its output lacks the end, which is a failure
            process.kill()
    return {name: log.read_text(errors="replace") for name, log in logs.items()}


def run_tools(folder: Path) -> tuple[list[Finding], list[str]]:
    """What the tools found, planted defects not among it, and what went wrong."""
    source, planted = folder / "planted.cu", str(folder / "planted")
    source.write_text(PLANTED)
    subprocess.run(["nvcc", "-lineinfo", "-arch=native", "-o", planted, source], check=True)
    found, wrong = [], []
    myself = [sys.executable, str(Path(__file__).resolve()), "--cases"]
    # First without a tool: that finds what fails by itself, and compiles the Triton kernels.
    first = {name: [*myself, name] for name in CASES}
    first |= {f"planted {tool}": watched(tool, [planted, tool]) for tool in TOOLS}
    then = {tool: watched(tool, [*myself, *CASES]) for tool in TOOLS}
    then["memcheck"].append("--planted")
    for commands in (first, then):
        begin = time.monotonic()
        for name, output in together(commands, folder).items():
            tool = name.split()[-1]
            reports = findings(tool, output) if tool in TOOLS else []
            defects = [f for f in reports if "planted" in f.kernel]
            found += [f for f in reports if "planted" not in f.kernel and name == tool]
            if not name.startswith("planted") and DONE not in output:
                wrong.append(f"{name}: did not come to its end:\n{output[-2000:]}")
            if (name.startswith("planted") or name == "memcheck") and not defects:
                wrong.append(f"{name}: the planted defect was not found:\n{output[-2000:]}")
        print(f"{len(commands)} processes: {time.monotonic() - begin:.0f} s", flush=True)
    return found, wrong


def show(found: list[Finding]) -> None:
    print(f"\n{'findings':36}", *(f"{tool:>10}" for tool in TOOLS))
    counts = Counter((f.case, f.tool) for f in found)
    for case in CASES:
        print(f"{case:36}", *(f"{counts[case, tool]:>10}" for tool in TOOLS))
    for finding, count in Counter(found).most_common():
        where = " ".join((finding.kernel, *finding.places))
        why = finding.explained or "NOT EXPLAINED"
        print(f"{finding.tool}: {count} x {finding.what} at {where} ({finding.case}): {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", help="run these cases, under no tool")
    parser.add_argument("--planted", action="store_true", help="and end with a planted defect")
    parser.add_argument("--keep", type=Path, help="folder for what the tools print")
    options = parser.parse_args()
    if options.cases:
        run_cases(options.cases, planted=options.planted)
        return 0
    missing = [x for x in ("compute-sanitizer", "nvcc") if shutil.which(x) is None]
    if missing or not torch.cuda.is_available():
        print("needs a GPU" if not missing else f"not on the PATH: {', '.join(missing)}")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found, wrong = run_tools(folder)
    show(found)
    print(*wrong, sep="\n")
    unexplained = [f for f in found if f.explained is None]
    print(f"{len(found)} findings, {len(unexplained)} not explained, {len(wrong)} other failures")
    return int(bool(unexplained or wrong))


if __name__ == "__main__":
    sys.exit(main())
