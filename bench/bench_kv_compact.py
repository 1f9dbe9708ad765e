"""kv_compact after a batch of trees is verified."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import kv_compact
from effllm.testing.case import Case
from effllm.testing.cases.kv_compact import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_kv_compact(case: Case, run_case: RunCase) -> None:
    run_case(kv_compact, case)
