"""paged_attention in decode steps and prompts of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import paged_attention
from effllm.testing.case import Case
from effllm.testing.cases.paged_attention import BENCH, CPU_BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_paged_attention(case: Case, run_case: RunCase) -> None:
    run_case(paged_attention, case)


@pytest.mark.parametrize("case", CPU_BENCH, ids=lambda case: case.id)
def bench_paged_attention_on_the_cpu(
    case: Case, run_case: RunCase, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("--device cpu runs it")
    run_case(paged_attention, case)
