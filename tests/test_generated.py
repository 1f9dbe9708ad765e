"""Checked-in files that a script writes are what the script writes."""

from __future__ import annotations

import runpy
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def test_wgmma_wrappers() -> None:
    generator = runpy.run_path(str(CSRC / "ptx/gen_wgmma.py"))
    for name, text in generator["sources"]().items():
        assert (CSRC / "ptx" / name).read_text() == text
