"""rope_kv_append in decode steps and prompts, beside rotation in PyTorch and kv_append."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import rope_kv_append
from effllm.testing.case import Case
from effllm.testing.cases.rope_kv_append import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_rope_kv_append(case: Case, run_case: RunCase) -> None:
    run_case(rope_kv_append, case)
