"""int8_quantize_asymmetric on activations of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import int8_quantize_asymmetric
from effllm.testing.case import Case
from effllm.testing.cases.int8_quantize_asymmetric import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_int8_quantize_asymmetric(case: Case, run_case: RunCase) -> None:
    run_case(int8_quantize_asymmetric, case)
