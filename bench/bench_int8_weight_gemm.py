"""int8_weight_gemm on layers of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import int8_weight_gemm
from effllm.testing.case import Case
from effllm.testing.cases.int8_weight_gemm import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_int8_weight_gemm(case: Case, run_case: RunCase) -> None:
    run_case(int8_weight_gemm, case)
