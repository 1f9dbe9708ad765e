"""`python -m effllm inspect PATH` and `python -m effllm convert IN OUT`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes, Kind
from formats_zoo import Zoo, edit_config, write_checkpoint

import effllm
from effllm.cli import main
from effllm.formats import inspect


def test_prints_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, Zoo("gptq", bits=3, symmetric=True))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == f"{inspect(tmp_path)}\n"
    line = next(line for line in out.splitlines() if "layers.0.mlp.down_proj" in line)
    assert line.split() == ["model.layers.0.mlp.down_proj", "gptq", "3", "32", "int4_gemm", "3,144"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Blockwise("nf4"), "nf4 4 64 lut4_gemm"),
        (Bytes("fp8", strategy="block"), "fp8 8 48 dense (e4m3 codes)"),
        (Bytes("int-quantized", floats=False), "int-quantized 8 64 int8_weight_gemm"),
    ],
    ids=lambda value: value.id if isinstance(value, Kind) else "",
)
def test_shows_every_kind_of_layer(
    kind: Kind, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, kind)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "layers.0.self_attn.q_proj" in line)
    assert " ".join(line.split()[1:-1]) == expected


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


def test_converts_between_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "a", Zoo("awq"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "gptq_v2"]
    assert main(arguments) == 0
    assert f"{inspect(tmp_path / 'b')}\n" in capsys.readouterr().out
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    before = effllm.load(tmp_path / "a", progress=False).state_dict()
    after = effllm.load(tmp_path / "b", progress=False).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(arguments) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "convert" in line)
    assert line.endswith("b exists and is no empty folder")


def test_what_a_format_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "nf4", Blockwise("nf4"))
    write_checkpoint(tmp_path / "awq", Zoo("awq"))
    write_checkpoint(tmp_path / "int8", Zoo("gptq_v2", bits=8))
    for source, format, message in (
        ("nf4", "awq", "q_proj': awq holds no Lut4Linear, only bitsandbytes may"),
        (
            "awq",
            "bitsandbytes",
            "bitsandbytes holds no Int4Linear, only compressed-tensors, gptq_v2",
        ),
        ("int8", "bitsandbytes", "the model has no Lut4Linear"),
    ):
        target = tmp_path / "target"
        assert main(["convert", str(tmp_path / source), str(target), "--format", format]) == 1
        assert message in capsys.readouterr().err
        assert not target.exists()


def test_converts_what_is_not_quantised(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "a")
    options = ["--group-size", "32", "--asymmetric"]
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 0
    rows = {row.name: row for row in inspect(tmp_path / "b").layers}
    row = rows["model.layers.0.mlp.up_proj"]
    assert (row.format, row.bits, row.group_size) == ("pack-quantized", 4, 32)
    assert rows["lm_head"].kernel == "dense"
    effllm.quantize_(
        llama,
        effllm.Int4Config(32, symmetric=False),
        lambda module, name: name != "lm_head",
    )
    loaded = effllm.load(tmp_path / "b", progress=False).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in llama.state_dict().items())
