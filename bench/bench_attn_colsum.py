"""attn_colsum after prompts."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import attn_colsum
from effllm.testing.case import Case
from effllm.testing.cases.attn_colsum import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_attn_colsum(case: Case, run_case: RunCase) -> None:
    run_case(attn_colsum, case)
