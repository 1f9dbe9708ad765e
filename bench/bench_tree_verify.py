"""tree_verify after one pass of the target model over trees of draft tokens."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import tree_verify
from effllm.testing.case import Case
from effllm.testing.cases.tree_verify import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_tree_verify(case: Case, run_case: RunCase) -> None:
    run_case(tree_verify, case)
