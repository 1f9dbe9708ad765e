"""h2o_append with full caches and with room in them."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import h2o_append
from effllm.testing.case import Case
from effllm.testing.cases.h2o_append import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_h2o_append(case: Case, run_case: RunCase) -> None:
    run_case(h2o_append, case)
