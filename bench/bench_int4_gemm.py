"""int4_gemm on layers of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import int4_gemm
from effllm.testing.case import Case
from effllm.testing.cases.int4_gemm import BENCH, CPU_BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_int4_gemm(case: Case, run_case: RunCase) -> None:
    run_case(int4_gemm, case)


@pytest.mark.parametrize("case", CPU_BENCH, ids=lambda case: case.id)
def bench_int4_gemm_on_the_cpu(case: Case, run_case: RunCase, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("--device cpu runs it")
    run_case(int4_gemm, case)
