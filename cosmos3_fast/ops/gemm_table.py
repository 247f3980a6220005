"""Which cuBLASLt algorithm each measured product runs: data, written by
`python tests/gpu_gemm.py --out cosmos3_fast/ops/gemm_table.py` on the GPU that a section names.

(GPU, cublasLtGetVersion) -> (dtype, N, K, accumulate) -> M -> the algorithm's words in hexadecimal,
zeros at the end left out. cuBLASLt restores them in the same version alone, so any other version
or GPU has a section of its own, or none. Only what beat torch's choice by 1 % has a row.
"""

from __future__ import annotations

Table = dict[tuple[str, int], dict[tuple[str, int, int, bool], dict[int, str]]]

GEMM_TABLE: Table = {}
