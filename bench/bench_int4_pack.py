"""int4_pack on layers of real models."""

from __future__ import annotations

import pytest
from conftest import RunCase

from effllm.ops import int4_pack
from effllm.testing.case import Case
from effllm.testing.cases.int4_pack import BENCH


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
def bench_int4_pack(case: Case, run_case: RunCase) -> None:
    run_case(int4_pack, case)
