"""How w4a8_gemm's GPU kernels make int8 of codes, proved without a GPU: their own header, with the
few instructions that it is made of emulated."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / "csrc"


def test_products_of_a_tile(tmp_path: Path) -> None:
    """Every code, zero point, multiplier and x, in both orders of columns."""
    program = tmp_path / "w4a8_codes"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{TESTS / 'warp'}", f"-I{CSRC}"]
    command = [*compiler, "-std=c++20", "-O1", *includes, str(TESTS / "w4a8_codes.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
