"""merge_states after attention to a shared prefix."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import merge_states
from effllm.testing.case import Case
from effllm.testing.cases.merge_states import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_merge_states(case: Case, run_case: RunCase) -> None:
    run_case(merge_states, case)
