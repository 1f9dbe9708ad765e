"""h2o_attention in steps of decoding over caches of limited size."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import h2o_attention
from effllm.testing.case import Case
from effllm.testing.cases.h2o_attention import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_h2o_attention(case: Case, run_case: RunCase) -> None:
    run_case(h2o_attention, case)
