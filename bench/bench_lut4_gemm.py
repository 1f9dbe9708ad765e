"""lut4_gemm on layers of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import lut4_gemm
from effllm.testing.case import Case
from effllm.testing.cases.lut4_gemm import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_lut4_gemm(case: Case, run_case: RunCase) -> None:
    run_case(lut4_gemm, case)
