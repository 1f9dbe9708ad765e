"""effllm.load and inspect of GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_models import rounded

import effllm
from effllm.cli import main
from effllm.formats import CheckpointError, inspect
from effllm.formats.gguf import TensorType, write_model
from effllm.nn import Int4Linear

MakeLlama = Callable[..., Any]
IDS = torch.arange(24).view(2, 12) * 7 % 101


def save(model: Any, path: Path, kind: TensorType) -> None:
    write_model(path, model, kind)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_gives_the_logits_of_the_stored_weights(
    kind: str, tied: bool, bias: bool, make_llama: MakeLlama, tmp_path: Path
) -> None:
    make = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    save(make_llama(**make), tmp_path / "a.gguf", TensorType[kind])
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    assert not loaded.training
    assert loaded.config.tie_word_embeddings == tied
    packed = [name for name, module in loaded.named_modules() if isinstance(module, Int4Linear)]
    assert len(packed) == (2 * 7 + (not tied) if kind == "Q4_0" else 0)
    expected = rounded(make_llama(**make), TensorType[kind])
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_reports_what_runs_each_layer(make_llama: MakeLlama, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    save(make_llama(), path, TensorType.Q4_0)
    on_disk = {row.name: row for row in inspect(path).layers}
    loaded = {row.name: row for row in effllm.load(path, progress=False).effllm_report.layers}
    assert on_disk.keys() == loaded.keys()
    for name, row in on_disk.items():
        found = (row.format, row.bits, row.group_size, row.kernel)
        in_memory = loaded[name]
        assert found == (
            in_memory.format,
            in_memory.bits,
            in_memory.group_size,
            in_memory.kernel,
        )
    down = on_disk["model.layers.1.mlp.down_proj"]
    assert (down.format, down.bits, down.group_size) == ("q4_0", 4, 32)
    assert (down.kernel, down.bytes) == ("int4_gemm", 96 * 160 // 32 * 18)
    assert on_disk["model.embed_tokens"].kernel == "dense (Q4_0)"
    plain = tmp_path / "b.gguf"
    save(make_llama(), plain, TensorType.F16)
    (head,) = (row for row in inspect(plain).layers if row.name == "lm_head")
    assert (head.format, head.bits, head.group_size, head.kernel) == ("f16", 16, None, "dense")
    assert inspect(plain).bytes == sum(p.numel() for p in make_llama().parameters()) * 2 + (
        2 * 96 * 5  # norms are kept in fp32
    )


def test_dtype_is_that_of_the_embedding(make_llama: MakeLlama, tmp_path: Path) -> None:
    for kind, dtype in (("F16", torch.float16), ("Q4_0", torch.bfloat16)):
        save(make_llama(), tmp_path / f"{kind}.gguf", TensorType[kind])
        model = effllm.load(tmp_path / f"{kind}.gguf", progress=False)
        assert model.model.embed_tokens.weight.dtype == dtype
        assert model.model.norm.weight.dtype == dtype


def test_a_damaged_file_is_one_error(
    make_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.gguf"
    save(make_llama(), path, TensorType.Q4_0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a\.gguf: "):
        effllm.load(path)
    assert main(["inspect", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("effllm inspect: ")
