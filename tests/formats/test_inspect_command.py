"""`python -m effllm inspect PATH`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from formats_zoo import Zoo, edit_config, write_checkpoint

from effllm.cli import main
from effllm.formats import inspect


def test_prints_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, Zoo("gptq", bits=3, symmetric=True))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == f"{inspect(tmp_path)}\n"
    line = next(line for line in out.splitlines() if "layers.0.mlp.down_proj" in line)
    assert line.split() == ["model.layers.0.mlp.down_proj", "gptq", "3", "32", "int4_gemm", "3,144"]


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "no checkpoint folder" in capsys.readouterr().err
    write_checkpoint(tmp_path, Zoo("awq"))
    edit_config(tmp_path, version="gemv")
    assert main(["inspect", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("effllm inspect: ")
    assert "AWQ version 'gemv' is not supported; effllm reads AWQ (gemm, 4 bits), GPTQ v1" in line


def test_needs_no_transformers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo("awq"))
    code = (
        "import sys; from effllm.cli import main; main(['inspect', sys.argv[1]]);"
        "assert not {'transformers', 'accelerate', 'compressed_tensors'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
