"""How decode attention shares keys out to CTAs, proved without a GPU: the kernel's own header, on a
warp whose lanes take turns."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / "csrc"


def test_every_block_is_in_one_share(tmp_path: Path) -> None:
    """Each block of keys once, parts numbered as the merge counts on, and shares of one size."""
    program = tmp_path / "decode_split"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{TESTS / 'warp'}", f"-I{CSRC}"]
    command = [*compiler, "-std=c++20", "-O1", *includes, str(TESTS / "decode_split.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
