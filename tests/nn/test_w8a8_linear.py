"""W8A8Linear: values against the definition to the bit, rounded inputs, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from effllm.nn import W8A8Linear
from effllm.ops.int8_gemm import int8_gemm_ref
from effllm.ops.int8_quantize import int8_quantize_ref
from effllm.ops.int8_quantize_asymmetric import int8_quantize_asymmetric_ref

SCALES = ("tensor", "channel")
K, N = 300, 200
every_kind = pytest.mark.parametrize(
    ("scales_per", "static"), [(s, static) for s in SCALES for static in (False, True)]
)


def quantised(scales_per: Any, static: bool, dtype: torch.dtype = torch.float32) -> W8A8Linear:
    scale = torch.tensor([0.02]) if static else None
    return W8A8Linear.from_linear(nn.Linear(K, N, dtype=dtype), scales_per, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_forward_is_the_definition(scales_per: str, static: bool, dtype: torch.dtype) -> None:
    layer = quantised(scales_per, static, dtype)
    x = (torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]).to(dtype)
    codes, scales = int8_quantize_ref(x, layer.input_scale)
    expected = int8_gemm_ref(
        codes, scales, layer.qweight, layer.scales, layer.bias, out_dtype=dtype
    )
    assert torch.equal(layer(x), expected)
    exact = (x.double() @ layer.weight.double().T + layer.bias.double()).flatten(0, 1)
    error = (layer(x).double().flatten(0, 1) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error[:1] if static else error).max() < 0.3
    assert static or error.max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales_per", SCALES)
def test_zero_points_of_inputs_are_the_definition(scales_per: Any, dtype: torch.dtype) -> None:
    """To the bit; and of inputs that are mostly positive errors are half those without."""
    linear = nn.Linear(K, N, dtype=dtype)
    layer = W8A8Linear.from_linear(linear, scales_per, symmetric_inputs=False)
    x = torch.nn.functional.gelu(torch.randn(2, 30, K, dtype=dtype))
    codes, scales, zeros = int8_quantize_asymmetric_ref(x)
    expected = int8_gemm_ref(
        codes, scales, layer.qweight, layer.scales, layer.bias, zeros, out_dtype=dtype
    )
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight_sums, layer.qweight.sum(1, dtype=torch.int32))
    if dtype == torch.float32:  # others round the result
        exact = nn.functional.linear(x, layer.weight, layer.bias)
        symmetric = W8A8Linear.from_linear(linear, scales_per)(x)
        assert (layer(x) - exact).norm() < 0.6 * (symmetric - exact).norm()


def test_zero_points_are_of_dynamic_scales() -> None:
    message = "symmetric_inputs=False is of inputs_per='token', got 'tensor'"
    with pytest.raises(ValueError, match=message):
        W8A8Linear(K, N, inputs_per="tensor", static=True, symmetric_inputs=False)
    with pytest.raises(ValueError, match=message):
        W8A8Linear.from_linear(
            nn.Linear(K, N), input_scale=torch.tensor([0.02]), symmetric_inputs=False
        )


@pytest.mark.parametrize("scales_per", SCALES)
def test_weight_is_near_the_dense_one(scales_per: str) -> None:
    """By half a step of its scale."""
    linear = nn.Linear(K, N)
    linear.weight.data[7] *= 100
    layer = W8A8Linear.from_linear(linear, scales_per)
    assert layer.scales.numel() == {"tensor": 1, "channel": N}[scales_per]
    rows = {"tensor": (0, 1), "channel": (1,)}[scales_per]
    amax = linear.weight.detach().abs().amax(rows, keepdim=True)
    torch.testing.assert_close(layer.scales, (amax / 127).view(layer.scales.shape))
    assert ((layer.weight - linear.weight).abs() <= layer.scales * 0.5001).all()


def test_zero_rows_are_zero() -> None:
    linear = nn.Linear(256, 4)
    linear.weight.data.zero_()[0, 0] = 1
    layer = W8A8Linear.from_linear(linear)
    assert layer.scales.flatten().tolist()[1:] == [1, 1, 1]
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer(torch.zeros(2, 256)), linear.bias.expand(2, -1))


@every_kind
def test_rounding_inputs_is_the_identity_backwards(scales_per: str, static: bool) -> None:
    layer = quantised(scales_per, static)
    x = torch.randn(4, K, requires_grad=True)
    grad = torch.randn(4, N)
    out = layer(x)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("kind", ["static", "token", "zeros"])
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    layer = quantised("channel", kind == "static")
    if kind == "zeros":
        layer = W8A8Linear.from_linear(nn.Linear(K, N), symmetric_inputs=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    assert torch.equal(compiled(x), layer(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    compiled(theirs).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)


def test_rows_may_be_on_several_ranks() -> None:
    """Slices of rows compute slices of the result, to the bit."""
    layer = quantised("channel", static=False)
    x = torch.randn(3, K)
    found = []
    for rows in (slice(0, 70), slice(70, N)):
        shard = W8A8Linear(K, rows.stop - rows.start)
        for name in ("qweight", "scales", "bias"):
            getattr(shard, name).data = getattr(layer, name)[rows]
        found.append(shard(x))
    assert torch.equal(torch.cat(found, -1), layer(x))


def test_repr() -> None:
    assert repr(quantised("tensor", static=True)) == (
        "W8A8Linear(in_features=300, out_features=200, bias=True, scales_per='tensor', "
        "inputs_per='tensor', static=True)"
    )


@pytest.mark.parametrize("strict", [True, False])
def test_a_static_scale_is_part_of_the_layer(strict: bool) -> None:
    static, dynamic = quantised("channel", static=True), quantised("channel", static=False)
    with pytest.raises(RuntimeError, match="W8A8Linear with a static scale loads"):
        static.load_state_dict(dynamic.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="W8A8Linear without a static scale loads"):
        dynamic.load_state_dict(static.state_dict(), strict=strict)
    zeros = W8A8Linear(K, N, symmetric_inputs=False)
    with pytest.raises(RuntimeError, match="a static scale, with zero points of inputs, loads"):
        zeros.load_state_dict(dynamic.state_dict(), strict=strict)


WORDS = [
    ({"scales_per": "block"}, "scales_per must be 'tensor' or 'channel', got 'block'"),
    ({"inputs_per": "group"}, "inputs_per must be 'tensor' or 'token', got 'group'"),
    ({"inputs_per": None}, "inputs_per must be 'tensor' or 'token', got None"),
    ({"inputs_per": "tensor"}, "inputs_per='tensor' is of a static scale, got static=False"),
    ({"static": True}, "a static scale is of inputs_per='tensor', got 'token'"),
]


@pytest.mark.parametrize(("options", "message"), WORDS)
def test_other_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        W8A8Linear(K, N, **options)


def test_from_linear_refuses_what_has_no_scale() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="scales_per must be 'tensor' or 'channel', got 'block'"):
        W8A8Linear.from_linear(linear, "block")
    linear.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        W8A8Linear.from_linear(linear)
    with pytest.raises(ValueError, match="meta"):
        W8A8Linear.from_linear(nn.Linear(8, 8, device="meta"))


@pytest.mark.gpu
@every_kind
def test_the_gpu_gives_the_same_bits(scales_per: str, static: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    scale = torch.tensor([0.02]) if static else None
    here = W8A8Linear.from_linear(linear, scales_per, scale)
    x = torch.randn(7, K, dtype=torch.bfloat16)
    expected = here(x)
    scale = None if scale is None else scale.cuda()
    there = W8A8Linear.from_linear(linear.cuda(), scales_per, scale)
    assert torch.equal(there.qweight.cpu(), here.qweight)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there(x.cuda()).cpu(), expected)
