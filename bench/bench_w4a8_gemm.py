"""w4a8_gemm on layers of real models, alone and behind int8_quantize.

All cases are minutes of work: `-k` selects by id, as in `-k "m16- and n28672"`.
"""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import w4a8_gemm
from effllm.testing.case import Case
from effllm.testing.cases.w4a8_gemm import BENCH, QUANTIZED_BENCH, quantize_and_multiply


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_w4a8_gemm(case: Case, run_case: RunCase) -> None:
    run_case(w4a8_gemm, case)


@pytest.mark.parametrize("case", QUANTIZED_BENCH, ids=lambda case: case.id)
def bench_quantized_w4a8_gemm(case: Case, run_case: RunCase) -> None:
    run_case(quantize_and_multiply, case)
