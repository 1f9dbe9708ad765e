"""add_rms_norm_int8_quantize on activations of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import add_rms_norm_int8_quantize
from effllm.testing.case import Case
from effllm.testing.cases.add_rms_norm_int8_quantize import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_add_rms_norm_int8_quantize(case: Case, run_case: RunCase) -> None:
    run_case(add_rms_norm_int8_quantize, case)
