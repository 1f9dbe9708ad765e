"""block_copy of the pages that beams and forks write into."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import block_copy
from effllm.testing.case import Case
from effllm.testing.cases.block_copy import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_block_copy(case: Case, run_case: RunCase) -> None:
    run_case(block_copy, case)
