"""Fp8Linear: values against the definition in float64, rounded inputs, parts of a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effllm.nn import Fp8Linear
from effllm.ops.fp8_gemm import fp8_gemm_ref
from effllm.ops.fp8_quantize import fp8_quantize_ref
from effllm.ops.fp8_quantize_tensor import fp8_quantize_tensor_ref

SCALES = ("tensor", "channel", "block")
INPUTS = ("tensor", "token", "group", "static", None)
K, N = 300, 200


def quantised(scales_per: Any, inputs_per: Any, k: int = K, n: int = N) -> Fp8Linear:
    scale = torch.tensor([0.005]) if inputs_per == "static" else None
    inputs_per = "tensor" if inputs_per == "static" else inputs_per
    return Fp8Linear.from_linear(nn.Linear(k, n), scales_per, inputs_per, scale)


def rounded(layer: Fp8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, in plain PyTorch."""
    if layer.inputs_per == "tensor":
        return fp8_quantize_tensor_ref(x, layer.input_scale)
    return fp8_quantize_ref(x, group_size=128 if layer.inputs_per == "group" else None)


@pytest.mark.parametrize("inputs_per", INPUTS)
@pytest.mark.parametrize("scales_per", SCALES)
def test_forward_is_the_definition(scales_per: str, inputs_per: str | None) -> None:
    layer = quantised(scales_per, inputs_per)
    x = torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]
    if inputs_per is None:
        expected = x.double() @ layer.weight.double().T + layer.bias.double()
    else:
        codes, scales = rounded(layer, x)
        expected = fp8_gemm_ref(
            codes, scales, layer.qweight, layer.scales, layer.bias, out_dtype=x.dtype
        )
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales_per", SCALES)
def test_weight_is_near_the_dense_one(scales_per: str) -> None:
    """By half a step of e4m3: 1/16 of each weight, or half of the smallest step."""
    linear = nn.Linear(K, N)
    linear.weight.data[7] *= 100
    layer = Fp8Linear.from_linear(linear, scales_per)
    n, k = torch.arange(N), torch.arange(K)
    scales = layer.scales[n // 128][:, k // 128] if scales_per == "block" else layer.scales
    largest = {"tensor": 1, "channel": N, "block": 6}[scales_per]
    assert layer.scales.numel() == largest
    exact = layer.qweight.double() * scales.double()
    torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-6, atol=0)
    bound = (linear.weight.abs() / 16).maximum(scales.expand(N, K) * 2.0**-10)
    assert ((layer.weight - linear.weight).abs() <= bound * 1.0001).all()


def test_outliers_cost_only_those_they_share_a_scale_with() -> None:
    linear = nn.Linear(256, 256)
    linear.weight.data[3, 5] = 1e5
    errors = {}
    for scales_per in SCALES:
        layer = Fp8Linear.from_linear(linear, scales_per)
        errors[scales_per] = (layer.weight - linear.weight)[128:, 128:].abs().max().item()
    assert max(errors["block"], errors["channel"]) < errors["tensor"] / 20


def test_zero_blocks_are_zero() -> None:
    """A block of zeros has scale 1 (a peer made 49,152 NaNs of these)."""
    linear = nn.Linear(256, 256)
    linear.weight.data.zero_()[0, 0] = 1
    layer = Fp8Linear.from_linear(linear, "block", "group")
    assert layer.scales[1, 1].item() == 1
    assert torch.equal(layer.weight.bool(), linear.weight.bool())
    assert torch.equal(layer(torch.zeros(2, 256)), linear.bias.expand(2, -1))


@pytest.mark.parametrize("scales_per", SCALES)
def test_rounding_inputs_is_the_identity_backwards(scales_per: str) -> None:
    layer = quantised(scales_per, "token")
    x = torch.randn(4, K, requires_grad=True)
    grad = torch.randn(4, N)
    out = layer(x)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("inputs_per", INPUTS)
def test_compiles_without_graph_breaks(inputs_per: str | None) -> None:
    torch._dynamo.reset()
    layer = quantised("block", inputs_per)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    compiled(theirs).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)


@pytest.mark.parametrize("parts", [[64, 64, 64], [128, 64]])
def test_rows_of_a_block_may_be_on_several_ranks(parts: list[int]) -> None:
    """N = 192 split in 3: shards of 64 rows carry the tile of scales that they share."""
    layer = quantised("block", "group", 256, 192)
    x = torch.randn(3, 256)
    found, first = [], 0
    for count in parts:
        shard = Fp8Linear(256, count, bias=False, scales_per="block", inputs_per="group")
        rows = slice(first, first + count)
        tiles = slice(first // 128, -(-(first + count) // 128))
        shard.qweight.data, shard.scales.data = layer.qweight[rows], layer.scales[tiles]
        found.append(shard(x) + layer.bias[rows])
        first += count
    torch.testing.assert_close(torch.cat(found, -1), layer(x))


def test_repr() -> None:
    assert repr(quantised("block", "static")) == (
        "Fp8Linear(in_features=300, out_features=200, bias=True, scales_per='block', "
        "inputs_per='tensor', static=True)"
    )


@pytest.mark.parametrize("strict", [True, False])
def test_a_static_scale_is_part_of_the_layer(strict: bool) -> None:
    static, dynamic = quantised("channel", "static"), quantised("channel", "tensor")
    with pytest.raises(RuntimeError, match="Fp8Linear with a static scale loads"):
        static.load_state_dict(dynamic.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="Fp8Linear without a static scale loads"):
        dynamic.load_state_dict(static.state_dict(), strict=strict)


WORDS = [
    ({"scales_per": "row"}, "scales_per must be 'tensor', 'channel' or 'block', got 'row'"),
    ({"inputs_per": "row"}, "inputs_per must be 'tensor', 'token', 'group' or None, got 'row'"),
    ({"static": True}, "a static scale is of inputs_per='tensor', got 'token'"),
]


@pytest.mark.parametrize(("options", "message"), WORDS)
def test_other_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Linear(K, N, **options)


def test_from_linear_refuses_what_has_no_scale() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="scales_per must be"):
        Fp8Linear.from_linear(linear, "row")
    linear.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        Fp8Linear.from_linear(linear)
    with pytest.raises(ValueError, match="meta"):
        Fp8Linear.from_linear(nn.Linear(8, 8, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("inputs_per", INPUTS)
@pytest.mark.parametrize("scales_per", SCALES)
def test_quantising_on_the_gpu_gives_the_same_bits(scales_per: str, inputs_per: str | None) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    scale = torch.tensor([0.005]) if inputs_per == "static" else None
    per: Any = "tensor" if inputs_per == "static" else inputs_per
    here = Fp8Linear.from_linear(linear, scales_per, per, scale)
    there = Fp8Linear.from_linear(
        linear.cuda(), scales_per, per, None if scale is None else scale.cuda()
    )
    assert torch.equal(there.qweight.view(torch.uint8).cpu(), here.qweight.view(torch.uint8))
    assert torch.equal(there.scales.cpu(), here.scales)
    x = torch.randn(7, K, dtype=torch.bfloat16)
    here = here.to(torch.bfloat16)
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=2e-2, atol=2e-2)
