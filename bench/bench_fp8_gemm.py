"""fp8_gemm on layers of real models, alone and behind fp8_quantize.

All cases are minutes of work: `-k` selects by id, as in `-k "quantize and row-row and n28672"` or
`-k "block and m16-"`.
"""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import fp8_gemm
from effllm.testing.case import Case
from effllm.testing.cases.fp8_gemm import BENCH, QUANTIZED_BENCH, quantize_and_multiply


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_fp8_gemm(case: Case, run_case: RunCase) -> None:
    run_case(fp8_gemm, case)


@pytest.mark.parametrize("case", QUANTIZED_BENCH, ids=lambda case: case.id)
def bench_quantized_fp8_gemm(case: Case, run_case: RunCase) -> None:
    run_case(quantize_and_multiply, case)
