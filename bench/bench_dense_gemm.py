"""dense_gemm beside cuBLAS: what tiles and ring reach where nothing is dequantised."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import dense_gemm
from effllm.testing.case import Case
from effllm.testing.cases.dense_gemm import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_dense_gemm(case: Case, run_case: RunCase) -> None:
    run_case(dense_gemm, case)
