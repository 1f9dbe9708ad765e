"""The register look-up of lut4_gemm's GPU kernels, proved without a GPU: their own header, with the
one instruction that it is made of emulated."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / "csrc"


def test_every_combination_of_codes(tmp_path: Path) -> None:
    program = tmp_path / "lut4_look_up"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++20", "-O1", f"-I{CSRC}", str(TESTS / "lut4_look_up.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
