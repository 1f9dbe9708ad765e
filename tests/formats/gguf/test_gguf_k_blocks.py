"""The search for codes and scales of Q8_0, Q4_K and Q6_K: exact in their bytes, near the best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf_bytes import decode
from torch import Tensor, nn

from effllm.formats.gguf import TensorType, dequantize, quantize
from effllm.formats.gguf.blocks import from_blocks
from effllm.nn import GgufLinear
from effllm.nn.gguf_linear import LAYOUTS, BlockType
from effllm.quantization import GgufConfig, k_blocks
from effllm.quantization.method import GgufCodes
from effllm.quantization.statistics import InputStatistics

BLOCK_KINDS: list[BlockType] = list(LAYOUTS)


def error(dense: Tensor, exact: Tensor, mass: Tensor | float = 1.0) -> float:
    return float(((dense - exact).double().square() * mass).sum())


def k_weight(n: int = 40, k: int = 512) -> Tensor:
    """Rows of many sizes, some shifted, some with outliers."""
    torch.manual_seed(0)
    found = torch.randn(n, k) * torch.randn(n, 1).exp() * 0.02
    found[: n // 4] += 0.01 * torch.randn(n // 4, 1)
    found[n // 2 :][torch.rand(n - n // 2, k) < 0.01] *= 8
    return found


def stored(found: GgufCodes) -> Tensor:
    """The values of the bytes, by the scalar reference of the format's tests."""
    kind = found.tensor_type.upper()
    raw = from_blocks(found.codes, found.headers, TensorType[kind])
    blocks = raw.view(-1, TensorType[kind].block_bytes).numpy()
    values = [decode(kind, block.tobytes()) for block in blocks]
    return torch.tensor(values, dtype=torch.float64).view(found.codes.shape)


def blocks_of(exact: Tensor, tensor_type: BlockType, inputs: Any = None) -> GgufCodes:
    found = GgufConfig(tensor_type).quantise(exact, inputs)
    assert isinstance(found, GgufCodes)
    return found


def rounded(exact: Tensor, tensor_type: BlockType) -> Tensor:
    """Rounded to nearest in blocks of the type, scales as wide as the values need."""
    if tensor_type == "q8_0":
        raw = quantize(exact, TensorType.Q8_0)
        return dequantize(raw, TensorType.Q8_0, tuple(exact.shape))
    run, last = (16, 127) if tensor_type == "q6_k" else (32, 63)
    runs = exact.view(-1, 256 // run, run)
    if tensor_type == "q6_k":
        needed, low = runs.abs().amax(-1, keepdim=True) / 31, torch.zeros_like(runs[..., :1])
    else:
        low = runs.amin(-1, keepdim=True).clamp(max=0)
        needed = (runs.amax(-1, keepdim=True).clamp(min=0) - low) / 15
    d = (needed.amax(1, keepdim=True) / last).half().float()
    dmin = (-low.amin(1, keepdim=True) / last).half().float()
    scales = (torch.round(needed / d) * d).nan_to_num(0)
    minima = (torch.round(-low / dmin) * dmin).nan_to_num(0)
    codes = torch.round((runs + minima) / scales).nan_to_num(0)
    codes = codes.clamp(-32, 31) if tensor_type == "q6_k" else codes.clamp(0, 15)
    return (codes * scales - minima).view(exact.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_values_are_those_of_the_bytes(tensor_type: BlockType, dtype: torch.dtype) -> None:
    exact = k_weight(6).to(dtype)
    found = blocks_of(exact, tensor_type)
    assert torch.equal(found.dense(), stored(found).float())
    layer = found.layer(nn.Linear(512, 6, dtype=dtype))
    assert isinstance(layer, GgufLinear)
    assert torch.equal(layer.weight, found.dense())


@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_the_gguf_package_reads_the_same_values(tensor_type: BlockType) -> None:
    quants = pytest.importorskip("gguf.quants", reason="needs the extra effllm[formats] (gguf)")
    found = blocks_of(k_weight(), tensor_type)
    kind = TensorType[tensor_type.upper()]
    raw = from_blocks(found.codes, found.headers, kind).view(40, -1).numpy()
    assert torch.equal(torch.from_numpy(quants.dequantize(raw, int(kind))), found.dense())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_blocks_are_better_than_rounded_ones(tensor_type: BlockType, weighted: bool) -> None:
    """By a fifth or more of the squared error where inputs tell which weights matter."""
    exact = k_weight()
    mass = torch.ones(512, dtype=torch.float64)
    inputs = None
    if weighted:
        inputs = InputStatistics(512, dtype=torch.float64)
        inputs.add(torch.randn(600, 512) * torch.randn(512).mul(1.5).exp())
        mass = inputs.diagonal
    ours = error(blocks_of(exact, tensor_type, inputs).dense(), exact, mass)
    plain = error(rounded(exact, tensor_type), exact, mass)
    assert ours < (0.8 if weighted else 0.93) * plain


def ggml_q4_k(exact: Tensor) -> Tensor:
    """What ggml's search without an importance matrix makes of a weight: weights count by their own
    size, least squares follow each of 21 roundings of the range, which starts at the best minimum
    so far, and scales and minima are rounded to 63rds of the largest."""
    runs = exact.view(-1, 8, 32)
    mass = runs.square().mean(-1, keepdim=True).sqrt() + runs.abs()

    def total(x: Tensor) -> Tensor:
        return (mass * x).sum(-1, keepdim=True)

    low, high = runs.amin(-1, keepdim=True).clamp(max=0), runs.amax(-1, keepdim=True)
    scales = (high - low) / 15
    codes = torch.round((runs - low) / scales).clamp(0, 15)
    least = total((codes * scales + low - runs).square())
    for step in range(21):
        codes = torch.round((runs - low) * ((14 + step / 10) / (high - low))).clamp(0, 15)
        one, two, mixed = total(codes), total(codes * codes), total(codes * runs)
        ones, first = total(torch.ones_like(runs)), total(runs)
        spread = ones * two - one * one
        this_scale, this_low = (
            (ones * mixed - first * one) / spread,
            (two * first - one * mixed) / spread,
        )
        this_scale = torch.where(this_low > 0, mixed / two, this_scale)
        this_low = this_low.clamp(max=0)
        found = total((codes * this_scale + this_low - runs).square())
        scales = torch.where(found < least, this_scale, scales)
        low = torch.where(found < least, this_low, low)
        least = torch.minimum(found, least)
    top, bottom = scales.amax(1, keepdim=True), (-low).amax(1, keepdim=True)
    stored_scales = torch.round(63 / top * scales) * (top / 63).half().float()
    stored_low = torch.round(63 / bottom * -low) * (bottom / 63).half().float()
    codes = torch.round((runs + stored_low) / stored_scales).clamp(0, 15)
    return (codes * stored_scales - stored_low).view(exact.shape)


def ggml_q6_k(exact: Tensor) -> Tensor:
    """As ``ggml_q4_k``; here weights count by their squares, over 19 places for the largest."""
    runs = exact.view(-1, 16, 16)
    mass = runs.square()
    extreme = runs.gather(-1, runs.abs().argmax(-1, keepdim=True))
    scales, gain = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    for step in (0, *range(-9, 0), *range(1, 10)):
        steps = torch.round(runs * (-(32 + step / 10) / extreme)).clamp(-32, 31)
        mixed = (mass * runs * steps).sum(-1, keepdim=True)
        two = (mass * steps * steps).sum(-1, keepdim=True)
        better = mixed * mixed > gain * two
        scales, gain = (
            torch.where(better, new, old)
            for new, old in ((mixed / two, scales), (mixed * mixed / two, gain))
        )
    top = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    whole = torch.round(-128 / top * scales).clamp(max=127)
    stored_scales = whole * (top / -128).half().float()
    steps = torch.round(runs / stored_scales).clamp(-32, 31)
    return (steps * stored_scales).view(exact.shape)


@pytest.mark.parametrize(("tensor_type", "limit"), [("q8_0", 0.9), ("q4_k", 0.97), ("q6_k", 0.95)])
def test_blocks_are_better_than_those_of_ggml(tensor_type: BlockType, limit: float) -> None:
    """Than what llama.cpp writes without an importance matrix."""
    exact = k_weight()
    search = {"q8_0": lambda w: rounded(w, "q8_0"), "q4_k": ggml_q4_k, "q6_k": ggml_q6_k}
    theirs = error(search[tensor_type](exact), exact)
    assert theirs < error(rounded(exact, tensor_type), exact) * 1.001
    assert error(blocks_of(exact, tensor_type).dense(), exact) < limit * theirs


def least_error(run: Tensor, low: int, high: int, minimum: bool) -> float:
    """Of a run over many scales, and with ``minimum`` many minima, none of which is rounded."""
    if minimum:
        reach = float(run.max().clamp(min=0) - run.min().clamp(max=0))
        grid = reach * torch.linspace(0.7, 1.15, 240) / high
    else:
        grid = float(run.abs().max()) * torch.linspace(0.8, 1.15, 2000) / -low
        grid = torch.cat([grid, -grid])
    minima = float(-run.min().clamp(max=0)) * torch.linspace(0, 1.1, 120 if minimum else 1)
    scales, minima = grid[:, None, None], minima[None, :, None]
    dense = torch.round((run + minima) / scales).clamp(low, high) * scales - minima
    return float((dense - run).double().square().sum(-1).min())


@pytest.mark.parametrize(("tensor_type", "limit"), [("q8_0", 1.12), ("q4_k", 1.06), ("q6_k", 1.06)])
def test_scales_are_nearly_the_best_there_are(tensor_type: BlockType, limit: float) -> None:
    """Beside a search over scales that need not be stored in few bits, and so get further."""
    exact = k_weight(2, 256)
    layout = LAYOUTS[tensor_type]
    low, high = {"q8_0": (-127, 127), "q4_k": (0, 15), "q6_k": (-32, 31)}[tensor_type]
    runs = exact.view(-1, layout.run)
    best = sum(least_error(run, low, high, tensor_type == "q4_k") for run in runs)
    assert error(blocks_of(exact, tensor_type).dense(), exact) < limit * best


BROKEN = {
    "zero": lambda w: torch.zeros_like(w),
    "a zero block": lambda w: w * (torch.arange(512) >= 256),
    "a zero run": lambda w: w * (torch.arange(512) % 256 >= 32),
    "tiny": lambda w: w * 1e-7,
    "below fp16": lambda w: w * 1e-12,
    "large": lambda w: w / w.abs().max() * 65504,
    "positive": lambda w: w.abs() + 1,
    "negative": lambda w: -w.abs() - 1,
    "equal": lambda w: torch.full_like(w, -0.3),
    "an outlier": lambda w: w.index_fill(1, torch.tensor([5]), 10.0),
    "a negative outlier": lambda w: w.index_fill(1, torch.tensor([5]), -10.0),
    "both": lambda w: w.index_fill(1, torch.tensor([5]), -9.0).index_fill(
        1, torch.tensor([6]), 9.0
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_k_blocks_that_break_scales(kind: str, tensor_type: BlockType) -> None:
    exact = BROKEN[kind](k_weight(4))
    found = blocks_of(exact, tensor_type)
    dense = found.dense()
    assert torch.equal(dense.double(), stored(found).float().double())
    assert torch.isfinite(dense).all()
    for block, decoded in zip(exact.view(-1, 256), dense.view(-1, 256), strict=True):
        assert error(decoded, block) <= error(torch.zeros_like(block), block)
        assert block.any() or not decoded.any()
    if kind not in ("zero", "tiny", "below fp16"):
        assert error(dense, exact) <= error(rounded(exact, tensor_type), exact) * 1.001
    if kind == "equal":
        torch.testing.assert_close(dense, exact, rtol=1e-2, atol=0)


def test_a_block_is_a_matter_of_its_row_alone() -> None:
    """Rows are searched some at a time."""
    exact = k_weight(40)
    for tensor_type in BLOCK_KINDS:
        whole = blocks_of(exact, tensor_type)
        for rows in (slice(0, 1), slice(7, 20)):
            part = blocks_of(exact[rows], tensor_type)
            assert torch.equal(part.codes, whole.codes[rows])
            assert torch.equal(part.headers, whole.headers[rows])


def test_large_weights_are_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = k_weight(7)
    for tensor_type in BLOCK_KINDS:
        whole = blocks_of(exact, tensor_type)
        monkeypatch.setattr(k_blocks, "_PIECE", 1024)
        pieces = blocks_of(exact, tensor_type)
        monkeypatch.undo()
        assert torch.equal(pieces.codes, whole.codes)
        assert torch.equal(pieces.headers, whole.headers)
