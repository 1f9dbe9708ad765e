"""GgufLinear: values against the definition in float64, headers, shards, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effllm.nn import GgufLinear
from effllm.nn.gguf_linear import (
    LAYOUTS,
    BlockType,
    from_planes,
    join_headers,
    k_header,
    k_scales,
    split_headers,
    to_planes,
)

TYPES: list[BlockType] = list(LAYOUTS)
K, N = 512, 70


def random_layer(tensor_type: BlockType, bias: bool = True) -> GgufLinear:
    """All codes, scales of both signs and, in a row, of nothing."""
    layout = LAYOUTS[tensor_type]
    codes = torch.randint(0, {"q8_0": 256, "q4_k": 16, "q6_k": 64}[tensor_type], (N, K))
    headers = torch.randint(0, 256, (N, K // layout.values, layout.header_bytes)).to(torch.uint8)
    places = (0, 2) if tensor_type == "q4_k" else (layout.header_bytes - 2,)
    for place in places:
        numbers = torch.randn(N, K // layout.values, 1) * 1e-3
        numbers[3] = 0
        headers[..., place : place + 2] = numbers.half().view(torch.uint8)
    linear = nn.Linear(K, N, bias)
    return GgufLinear.from_codes(linear, codes.to(torch.uint8), headers.flatten(1), tensor_type)


def exact(layer: GgufLinear, x: Tensor) -> Tensor:
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_forward_is_the_definition(tensor_type: BlockType, bias: bool) -> None:
    layer = random_layer(tensor_type, bias)
    x = torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]
    expected = exact(layer, x)
    scale = (x.double().abs() @ layer.weight.double().abs().T).clamp(min=1)
    assert ((layer(x) - expected).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_narrow_inputs_cost_a_rounding_of_the_result(
    tensor_type: BlockType, dtype: torch.dtype
) -> None:
    """Of Q4_K two, and one of its rests, which mostly are less than a step."""
    linear = nn.Linear(K, N, dtype=dtype)
    layer = GgufLinear.from_linear(linear, tensor_type)
    x = torch.randn(40, K, dtype=dtype)
    expected = exact(layer, x)
    step = torch.finfo(dtype).eps
    # All but the rounding of the result itself is of the size of the whole row's products.
    products = (x.double().square() @ layer.weight.double().square().T).sqrt()
    limit = step * expected.abs() + (0.5 * step * products if tensor_type == "q4_k" else 1e-5)
    assert ((layer(x).double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("tensor_type", TYPES)
def test_large_minima_and_inputs(tensor_type: BlockType) -> None:
    """Blocks far from 0, whose minima are more steps than a zero point has; and fp16 inputs that
    only just fit."""
    weight = torch.randn(N, K) * 1e-3 - 1
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    layer = GgufLinear.from_linear(linear, tensor_type)
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-4, atol=1e-3)
    big = torch.zeros(1, K, dtype=torch.float16)
    big[0, 7] = 60000
    linear.weight.data = torch.randn(N, K) * 0.1
    layer = GgufLinear.from_linear(linear, tensor_type)
    torch.testing.assert_close(layer(big).double(), exact(layer, big), rtol=5e-3, atol=0.5)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_planes_hold_every_code(tensor_type: BlockType) -> None:
    last = {"q8_0": 256, "q4_k": 16, "q6_k": 64}[tensor_type]
    codes = (torch.arange(256) % last).to(torch.uint8).repeat(2, 1)
    planes = to_planes(codes, tensor_type)
    assert planes.shape == (2, 256 * LAYOUTS[tensor_type].planes)
    assert int(planes.max()) <= 15
    assert torch.equal(from_planes(planes, tensor_type), codes)


def test_headers_hold_every_scale_and_minimum() -> None:
    scales = torch.arange(64, dtype=torch.uint8).view(8, 8)
    minima = 63 - scales.flip(0)
    one = torch.ones(8, 1, dtype=torch.float16)
    header = k_header(one, 2 * one, scales, minima)
    assert header.shape == (8, 16)
    found = k_scales(header)
    assert torch.equal(found[0], scales)
    assert torch.equal(found[1], minima)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_headers_of_any_bytes_come_back(tensor_type: BlockType) -> None:
    size = 2 * LAYOUTS[tensor_type].header_bytes
    headers = torch.randint(0, 256, (50, size)).to(torch.uint8)
    parts = split_headers(headers, tensor_type)
    assert torch.equal(join_headers(parts, tensor_type), headers)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_compiles_without_graph_breaks(tensor_type: BlockType) -> None:
    torch._dynamo.reset()
    layer = random_layer(tensor_type)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    compiled(theirs).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_rows_and_blocks_may_be_on_several_ranks(tensor_type: BlockType) -> None:
    """Slices of rows at multiples of 64, and of columns at multiples of 256."""
    layer = random_layer(tensor_type, bias=False)
    x = torch.randn(3, K)
    words = layer.qweight.shape[1] // 2
    parts = []
    for i in range(2):
        rows = []
        for chosen in (slice(0, 64), slice(64, N)):
            size = chosen.stop - chosen.start
            shard = GgufLinear(256, size, bias=False, tensor_type=tensor_type)
            strip = slice(chosen.start // 64, chosen.start // 64 + 1)
            shard.qweight.data = layer.qweight[strip, i * words : (i + 1) * words]
            for name in ("d", "scales", "dmin", "minima"):
                whole = getattr(layer, name)
                if whole is not None:
                    half = whole.shape[1] // 2
                    getattr(shard, name).data = whole[chosen, i * half : (i + 1) * half]
            rows.append(shard(x[:, 256 * i : 256 * (i + 1)]))
        parts.append(torch.cat(rows, -1))
    torch.testing.assert_close(parts[0] + parts[1], layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_strided_inputs(tensor_type: BlockType) -> None:
    layer = random_layer(tensor_type)
    x = torch.randn(4, 2 * K)
    torch.testing.assert_close(layer(x[::2, ::2]), layer(x[::2, ::2].contiguous()))
    columns = torch.randn(K, 6).T
    torch.testing.assert_close(layer(columns), layer(columns.contiguous()))


@pytest.mark.parametrize("tensor_type", TYPES)
def test_bytes_are_those_of_codes_and_headers(tensor_type: BlockType) -> None:
    layer = GgufLinear(K, 128, bias=False, tensor_type=tensor_type)
    bits = 8 * sum(p.nbytes for p in layer.parameters()) / (128 * K)
    assert bits == {"q8_0": 8.5, "q4_k": 4.625, "q6_k": 8.5625}[tensor_type]


def test_repr() -> None:
    assert repr(GgufLinear(K, N, tensor_type="q6_k")) == (
        "GgufLinear(in_features=512, out_features=70, bias=True, tensor_type='q6_k')"
    )


def test_errors() -> None:
    wrong: Any = "q4_0"
    with pytest.raises(ValueError, match=r"tensor_type must be one of .*'q4_k'.*, got 'q4_0'"):
        GgufLinear(K, N, tensor_type=wrong)
    with pytest.raises(ValueError, match="in_features of q6_k must be a multiple of 256, got 320"):
        GgufLinear(320, N, tensor_type="q6_k")
    with pytest.raises(ValueError, match="in_features of q8_0 must be a multiple of 32, got 40"):
        GgufLinear.from_linear(nn.Linear(40, N), "q8_0")
    linear = nn.Linear(K, N)
    codes = torch.zeros(N, K, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"headers must be uint8 \[70, 32\], got .* \[70, 36\]"):
        GgufLinear.from_codes(linear, codes, torch.zeros(N, 36, dtype=torch.uint8), "q4_k")
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 512\], got \[3, 256\]"):
        random_layer("q4_k")(torch.randn(3, 256))
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        GgufLinear.from_linear(linear)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("tensor_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gpu_computes_the_same(tensor_type: BlockType, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    here = GgufLinear.from_linear(nn.Linear(K, N, dtype=dtype), tensor_type)
    x = torch.randn(tokens, K, dtype=dtype)
    expected = exact(here, x).to(dtype)
    there = here.cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)
    found = GgufLinear.from_linear(nn.Linear(K, N).cuda(), tensor_type)
    assert found.qweight.is_cuda
    assert found.d.is_cuda
