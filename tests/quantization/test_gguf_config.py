"""GgufConfig: the best scales of each block, and codes that GGUF files hold as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.formats.gguf import TensorType
from effllm.formats.gguf.blocks import dequantize, from_int4, quantize
from effllm.nn import Int4Linear
from effllm.quantization import GgufConfig, LinearConfig
from effllm.quantization.configs import GgufType
from effllm.quantization.statistics import InputStatistics

TYPES: list[GgufType] = ["q4_0", "q4_1"]
STORED = {"q4_0": TensorType.Q4_0, "q4_1": TensorType.Q4_1}


def weight(n: int = 24, k: int = 128) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) * torch.randn(n, 1).exp() * 0.02 + torch.randn(n, 1) * 0.01


def error(dense: Tensor, exact: Tensor, mass: Tensor | float = 1.0) -> float:
    return float(((dense - exact).double().square() * mass).sum())


def best_error(block: Tensor, zeros: range, scales: Tensor) -> float:
    """The least squared error of a block ``[32]`` over all zero points and many scales."""
    found = []
    for zero in zeros:
        codes = (torch.round(block / scales[:, None]) + zero).clamp(0, 15)
        dense = (codes - zero) * scales[:, None]
        found.append(float((dense - block).double().square().sum(-1).min()))
    return min(found)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_scales_are_nearly_the_best(tensor_type: GgufType) -> None:
    """Beside a search over 2,000 scales, and every zero point, of each block."""
    exact = weight(6, 64)
    dense = GgufConfig(tensor_type).quantise(exact, None).dense()
    ours, best = 0.0, 0.0
    for row, decoded in zip(exact.view(-1, 32), dense.view(-1, 32), strict=True):
        grid = torch.linspace(0.01, 0.16, 1000) * float(row.abs().max())
        signed = torch.cat([grid, -grid])
        zeros, scales = (range(8, 9), signed) if tensor_type == "q4_0" else (range(16), grid)
        ours += error(decoded, row)
        best += best_error(row, zeros, scales)
    assert 0.99 * best < ours < 1.02 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_files_hold_the_codes_exactly(tensor_type: GgufType, dtype: torch.dtype) -> None:
    exact = weight().to(dtype)
    found = GgufConfig(tensor_type).quantise(exact, None)
    assert found.scales.dtype == torch.float16
    assert found.group_size == 32
    assert (found.zeros is None) == (tensor_type == "q4_0")
    raw = from_int4(found.codes, found.scales, found.zeros)
    assert torch.equal(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), found.dense())


@pytest.mark.parametrize("tensor_type", TYPES)
def test_better_than_rounding(tensor_type: GgufType) -> None:
    """Than ggml rounds, and than ranges that are only cut."""
    exact = weight(64, 256)
    ours = error(GgufConfig(tensor_type).quantise(exact, None).dense(), exact)
    raw = quantize(exact, STORED[tensor_type])
    assert ours < 0.99 * error(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), exact)
    config = LinearConfig(4, GgufConfig(tensor_type).granularity, tensor_type == "q4_0", clip=True)
    assert ours < 0.995 * error(config.quantise(exact, None).dense(), exact)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_inputs_decide_which_errors_count(tensor_type: GgufType) -> None:
    exact = weight()
    x = torch.randn(200, 128) * torch.randn(128).mul(1.5).exp()
    inputs = InputStatistics(128, dtype=torch.float64)
    none = GgufConfig(tensor_type).quantise(exact, inputs).dense()
    inputs.add(x)
    plain = GgufConfig(tensor_type).quantise(exact, None).dense()
    weighted = GgufConfig(tensor_type).quantise(exact, inputs).dense()
    mass = x.double().square().sum(0)
    assert error(weighted, exact, mass) < 0.9 * error(plain, exact, mass)
    assert error(plain, exact) < error(weighted, exact)
    assert torch.equal(none, plain)


@pytest.mark.parametrize("tensor_type", TYPES)
@pytest.mark.parametrize("kind", ["zero", "a zero block", "tiny", "one sign", "equal", "short"])
def test_blocks_that_break_scales(kind: str, tensor_type: GgufType) -> None:
    exact = weight(4, 96)
    if kind == "zero":
        exact.zero_()
    elif kind == "a zero block":
        exact[1, 32:64] = 0
    elif kind == "tiny":
        exact *= 1e-9  # below the smallest number of fp16
    elif kind == "one sign":
        exact = exact.abs() + 1
    elif kind == "equal":
        exact.fill_(-0.3)
    else:
        exact = exact[:, :40]
    found = GgufConfig(tensor_type).quantise(exact, None)
    dense = found.dense()
    assert torch.isfinite(dense).all()
    assert not dense[exact == 0].any()
    assert error(dense, exact) <= error(torch.zeros_like(exact), exact)
    if kind == "equal":
        torch.testing.assert_close(dense, exact, rtol=1e-2, atol=0)
    if kind != "short":  # the format has none
        raw = from_int4(found.codes, found.scales, found.zeros)
        assert torch.equal(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), dense)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_a_model_there_and_back(tensor_type: GgufType, llama: Any, tmp_path: Path) -> None:
    """The file's head is of the same type, so it is quantised too."""
    effllm.quantize_(llama, GgufConfig(tensor_type), progress=False)
    assert all(type(m) is not nn.Linear for m in llama.modules())
    path = tmp_path / "model.gguf"
    effllm.save(llama, path, f"gguf-{tensor_type}", progress=False)
    loaded = effllm.load(path, dtype=torch.float32, progress=False)
    for name, layer in llama.named_modules():
        if isinstance(layer, Int4Linear):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight), name


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must be one of \('q4_0', 'q4_1'\), got 'q8'"):
        GgufConfig("q8")  # type: ignore[arg-type]
    for values, message in ((7e4, "beyond the largest of fp16"), (torch.nan, "NaN or infinity")):
        model = nn.Sequential(nn.Linear(64, 64))
        nn.init.constant_(model[0].weight, float(values))
        with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
            effllm.quantize_(model, GgufConfig(), progress=False)
