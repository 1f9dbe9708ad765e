"""kv_append in decode steps and prompts."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import kv_append
from effllm.testing.case import Case
from effllm.testing.cases.kv_append import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_kv_append(case: Case, run_case: RunCase) -> None:
    run_case(kv_append, case)
