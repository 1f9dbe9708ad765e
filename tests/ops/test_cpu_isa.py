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
for case in module.CASES + getattr(module, "CPU_CASES", []):
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


@pytest.mark.parametrize(
    "op",
    [
        "int4_gemm",
        "lut4_gemm",
        "fp8_gemm",
        "fp8_weight_gemm",
        "int8_gemm",
        "int8_weight_gemm",
        "w4a8_gemm",
        "paged_attention",
        "h2o_attention",
        "attn_colsum",
    ],
)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_values_within_the_limit(op: str, isa: str) -> None:
    result = run_limited(op, isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("op", ["int4_gemm", "int8_gemm", "w4a8_gemm"])
def test_values_without_the_tiles_of_amx(op: str) -> None:
    result = run_limited(op, "avx512bf16")
    assert result.returncode == 0, result.stderr


def test_tokens_of_int4_gemm_without_the_tiles_of_amx() -> None:
    """Each loop has its own order of additions, and its own ways for few tokens and for many."""
    run_tests("avx512bf16", "test_int4_gemm.py", "does_not_depend_on_its_batch or every_code")


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_codes_of_fp8_gemm_within_the_limit(isa: str) -> None:
    """Each instruction set has its own way to decode e4m3, NaN included."""
    run_tests(isa, "test_fp8_gemm.py", "every_code or nan_codes or anywhere_in_memory")


@pytest.mark.parametrize("op", ["int8_weight_gemm", "fp8_weight_gemm"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_codes_of_byte_weights_within_the_limit(op: str, isa: str) -> None:
    """bf16 x goes another way where there are the tiles of AMX."""
    run_tests(isa, f"test_{op}.py", "every_code or anywhere_in_memory")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_tokens_of_byte_weights_within_the_limit(isa: str) -> None:
    run_tests(isa, "test_byte_weight_gemm.py", "its_batch or no_numbers")


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_padding_of_lut4_gemm_within_the_limit(isa: str) -> None:
    """Each look-up has its own way to leave padding out, which the cases do not tempt."""
    run_tests(isa, "test_lut4_gemm.py", "test_padding_is_never_looked_up")


def run_tests(isa: str, file: str, expression: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    result = subprocess.run(
        [*command, "-k", expression, str(Path(__file__).parent / file)],
        env=os.environ | {"EFFLLM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_unknown_limit_is_a_named_error() -> None:
    names = "baseline, avx2, avx512, avx512vnni, avx512bf16 or amx"
    message = f"EFFLLM_CPU_ISA must be {names}, got 'sse9'"
    assert message in run_limited("int4_gemm", "sse9").stderr
