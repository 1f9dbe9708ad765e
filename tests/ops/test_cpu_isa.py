"""The CPU loops for lesser processors: EFFLLM_CPU_ISA limits what is used. All other tests run the
widest that this one has.

The variable is read once per process, so each limit gets its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK_CASES = """
from importlib import import_module
import sys

from effllm import ops
from effllm.testing.run import check_values

op = sys.argv[1]
module = import_module(f"effllm.testing.cases.{op}")
for case in module.CASES + module.CPU_CASES:
    try:
        check_values(getattr(ops, op), case, "cpu")
    except AssertionError as error:
        raise AssertionError(case.id) from error
"""


def run_limited(op: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHECK_CASES, op],
        env=os.environ | {"EFFLLM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("op", ["int4_gemm", "lut4_gemm", "fp8_weight_gemm", "paged_attention"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_values_within_the_limit(op: str, isa: str) -> None:
    result = run_limited(op, isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_padding_of_lut4_gemm_within_the_limit(isa: str) -> None:
    """Each look-up has its own way to leave padding out, which the cases do not tempt."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    file = Path(__file__).parent / "test_lut4_gemm.py"
    result = subprocess.run(
        [*command, "-k", "test_padding_is_never_looked_up", str(file)],
        env=os.environ | {"EFFLLM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_unknown_limit_is_a_named_error() -> None:
    message = "EFFLLM_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got 'sse9'"
    assert message in run_limited("int4_gemm", "sse9").stderr
