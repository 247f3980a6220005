"""compute-sanitizer over every kernel on a GPU: `python tests/gpu_sanitize.py`.

memcheck, racecheck, initcheck and synccheck each watch a process of their own that runs every
Triton and csrc kernel at small, odd sizes; torch allocates each tensor apart, so that an access
past its end is seen. A planted defect of each kind must be found, and one in a Triton kernel.
Prints a table of findings by case; exit status 1 for a finding that is not explained here, a
defect that was missed, or a case that failed, 2 where a GPU or a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_sanitize_cases import CASES, blank

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
    text = "\n".join(source.read_text().splitlines()[int(line) - 1 :])
    kernel, call = r"def _\w+_kernel\(", r"(if [^\n]*:\s*)?gl\.warp_specialize\("
    return re.match(rf"\s*({kernel}|{call})", text) is not None


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
